"""`--he` in simulations: the same bits as without encryption, and what it cannot be combined with."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.core.errors import UsageError
from fedshelf.privacy.homomorphic import seal
from fedshelf.privacy.homomorphic.ciphertexts import to_bytes
from tests.unit.simulate.test_masked_simulation import run, stores
from tests.unit.tracking.test_runs_commands import output

__all__ = ["stores"]  # the fixture


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize(
    ("codec", "given"),
    [
        ("modular:32", {}),
        ("modular:16", {"weights": "equal", "he_decryptor": "any"}),
        ("modular:32", {"he_scope": "head", "he_decryptor": "rome", "norm": "group"}),
        ("modular:32", {"algorithm": "scaffold"}),
        ("modular:32", {"workers": 2, "fraction": 0.75}),
        ("modular:32", {"codec_down": "int8", "clip_norm": 0.5, "algorithm": "fedadam"}),
        ("modular:32:0:64", {"algorithm": "fedbuff", "min_clients": 4}),
    ],
    ids=str,
)
def test_an_encrypted_run_has_the_bits_of_one_without_encryption(codec: str, given: dict[str, Any]) -> None:
    encrypted, rounds = run("encrypted", he=True, compare=False, **given)
    rest = {key: value for key, value in given.items() if not key.startswith("he_")}
    plain, others = run("plain", codec_up=codec, compare=False, **{"min_clients": 3, **rest})
    assert torch.equal(encrypted, plain)
    assert [round_.train_loss for round_ in rounds] == [round_.train_loss for round_ in others]
    for member in (member for round_ in rounds for member in round_.clients):
        assert (member.num_examples, member.num_steps, member.train_loss) == (None, None, None)
    assert {round_.accuracy for round_ in rounds} == {None}  # no store's figures are sent
    assert not [member.reason for round_ in rounds for member in round_.clients if member.reason]


@pytest.mark.usefixtures("stores")
def test_an_encrypted_run_continues_with_the_same_bits() -> None:
    finals = []
    for name, given in (("encrypted", {"he": True}), ("plain", {"codec_up": "modular:32"})):
        run(name, rounds=2, **given)
        model, rounds = run(name, rounds=2, extend=1, **given)
        assert len(rounds) == 3
        finals.append(model)
    assert torch.equal(*finals)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"aggregator": "median"}, "--aggregator median with --he: the server decodes the sum"),
        ({"secagg": True}, "--secagg with --he: each hides all uploads but their sum"),
        ({"algorithm": "fedasync"}, "--algorithm fedasync with --he"),
        ({"algorithm": "ridge"}, "--algorithm ridge with --he: it is not encrypted. Use --secagg"),
        ({"local_work": "dynamic"}, "--local-work dynamic with --he"),
        ({"norm_bound": 3.0}, "--norm-bound 3.0 with --he"),
        ({"sampling": "size"}, "--sampling size with --he"),
        ({"dp": "client", "noise_multiplier": 1.0}, "--dp client with --he"),
        ({"codec_up": "topk:0.1"}, "--he encrypts integers: use --codec-up modular:16 or modular:32"),
        ({"codec_up": "modular:16"}, "--codec-up modular:16 has no room for weights by photos"),
        ({"he_decryptor": "nobody"}, "--he-decryptor nobody: there is no such store. The stores are"),
        ({"min_clients": 2}, "--min-clients 2 with --he: a sum of fewer than 3 stores hides nothing"),
        ({"algorithm": "fedbuff", "codec_up": "modular:32:0:60"}, "use modular:32:0:64"),
        ({"algorithm": "fedbuff", "buffer_size": 2}, "a sum of fewer than 3 uploads hides nothing"),
        ({"algorithm": "fedbuff", "min_clients": 3}, "Use --min-clients 4 or more"),
    ],
    ids=str,
)
def test_what_needs_single_uploads_is_refused(stores: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        run("run", he=True, **given)
    assert any(said in str(problem) for problem in raised.value.args), raised.value.args
    assert not Path("run").exists()


@pytest.mark.usefixtures("stores")
def test_a_combination_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageError) as raised:
        run("run", he=True, algorithm="ridge")
    assert len(raised.value.args) == 1


@pytest.mark.usefixtures("stores")
def test_the_protection_is_in_what_a_run_shows() -> None:
    run("run", he=True, he_scope="head", rounds=1, compare=False)
    shown = json.loads(output("show", "run", "--json"))
    assert shown["protections"] == ["he-scope head"]
    assert shown["codec_up"] == "modular:32"


@pytest.mark.usefixtures("stores")
def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal.sealapi", None)
    seal._tenseal.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"pip install 'fedshelf\[he\]'"):
            run("run", he=True)
    finally:
        seal._tenseal.cache_clear()
    assert not Path("run").exists()


@pytest.mark.usefixtures("stores")
def test_no_secret_key_is_in_a_file_or_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    secrets: list[bytes] = []
    generate = seal.generate

    def recorded(*given: Any) -> Any:
        keys = generate(*given)
        secrets.extend([keys.secret.tobytes()[:96], to_bytes(keys.secret).tobytes()[:96]])
        return keys

    monkeypatch.setattr(seal, "generate", recorded)
    run("run", he=True, rounds=2, he_decryptor="any")
    assert len(secrets) == 4  # of the cost estimate, and of the run
    files = [path for path in home.parent.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), path
    assert not any(secret.hex() in caplog.text for secret in secrets)
