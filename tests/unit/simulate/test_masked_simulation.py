"""`--secagg` in simulations: the same bits as without masks, and what it cannot be combined with."""

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.config.files import load
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.events import RunStatus
from fedshelf.privacy.secure_aggregation import client
from fedshelf.privacy.secure_aggregation.keys import advertise
from fedshelf.privacy.secure_aggregation.shares import deal
from fedshelf.simulate.engine import simulate
from fedshelf.tracking.queries import run_summary
from tests.unit.data.samples import write_pack
from tests.unit.simulate.test_simulation import final
from tests.unit.tracking.test_runs_commands import output

CLASSES = ("apple", "milk")
STORES = ("lyon", "oslo", "paris", "rome")


@pytest.fixture
def stores(home: Path) -> Path:
    for number, name in enumerate(STORES):
        write_pack(Path("stores") / name, dict.fromkeys(CLASSES, 3 + number))
    write_pack(Path("test"), dict.fromkeys(CLASSES, 2))
    return Path("stores")


def run(name: str, **values: Any) -> tuple[torch.Tensor, list[Any]]:
    given: dict[str, Any] = {
        "data_dir": "stores", "test_dir": "test", "image_size": 16, "width": 8, "rounds": 2, "batch_size": 4,
        "device": "cpu", "run_dir": name, "val_fraction": 0.2,
    }  # fmt: skip
    status, directory = simulate(load(RunConfig, None, {**given, **values}))
    assert status is RunStatus.FINISHED
    return final(directory), list(run_summary(directory.path).rounds)


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize(
    ("codec", "given"),
    [
        ("modular:32", {}),
        ("modular:16", {"weights": "equal"}),
        ("modular:32", {"algorithm": "fedadam"}),
        ("modular:32", {"algorithm": "fedavgm", "norm": "group"}),
        ("modular:32", {"algorithm": "scaffold"}),
        ("modular:32", {"algorithm": "fedprox", "personalize": "fedper"}),
        ("modular:32", {"workers": 2, "fraction": 0.75}),
        ("modular:32", {"codec_down": "int8", "clip_norm": 0.5}),
    ],
    ids=str,
)
def test_a_masked_run_has_the_bits_of_one_without_masks(codec: str, given: dict[str, Any]) -> None:
    masked, rounds = run("masked", secagg=True, compare=False, **given)
    plain, others = run("plain", codec_up=codec, compare=False, **given)
    assert torch.equal(masked, plain)
    assert [round_.train_loss for round_ in rounds] == [round_.train_loss for round_ in others]
    for member in (member for round_ in rounds for member in round_.clients):
        assert (member.num_examples, member.num_steps, member.train_loss) == (None, None, None)
    assert {round_.accuracy for round_ in rounds} == {None}  # no store's figures are sent
    assert 'codec-up = "modular' in Path("masked/config.toml").read_text()
    if not given:
        without, _ = run("without", compare=False)
        assert not torch.equal(masked, without), "nothing is encoded"


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize(("weights", "error"), [("equal", 1e-4), ("examples", 1e-2)])
def test_a_round_makes_the_model_of_one_without_a_codec_but_for_rounding(weights: str, error: float) -> None:
    given = {"rounds": 1, "weights": weights, "norm": "group", "compare": False, "client_lr": 0.2}
    masked, _ = run("masked", secagg=True, codec_up="modular:32", **given)
    without, _ = run("without", norm_bound="off", **given)
    unmoved, _ = run("unmoved", norm_bound="off", **{**given, "client_lr": 1e-9})
    assert float((without - unmoved).abs().max()) > 10 * error, "the round changes too little to tell"
    torch.testing.assert_close(masked, without, rtol=0, atol=error)


@pytest.mark.usefixtures("stores")
def test_a_masked_run_continues_with_the_same_bits() -> None:
    finals = []
    for name, given in (("masked", {"secagg": True}), ("plain", {"codec_up": "modular:32"})):
        run(name, rounds=2, **given)
        model, rounds = run(name, rounds=2, extend=1, **given)
        assert len(rounds) == 3
        finals.append(model)
    assert torch.equal(*finals)


@pytest.mark.usefixtures("stores")
def test_stores_that_drop_out_do_not_harm_the_others() -> None:
    given = {"slowdowns": "1,1,50,1", "straggler_factor": 2.0, "min_clients": 3, "quorum": 3}
    masked, rounds = run("masked", secagg=True, secagg_threshold=3, **given)
    counts = [sum(member.status.value == "counted" for member in round_.clients) for round_ in rounds]
    assert counts == [4, 3], "the slow store is waited for in the second round, too"
    plain, _ = run("plain", codec_up="modular:32", **given)
    assert torch.equal(masked, plain)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"aggregator": "median"}, "--aggregator median with --secagg: the server decodes the sum"),
        ({"algorithm": "fedbuff"}, "--algorithm fedbuff with --secagg"),
        ({"algorithm": "ridge"}, "--secagg with --algorithm ridge"),
        ({"local_work": "dynamic"}, "--local-work dynamic with --secagg"),
        ({"norm_bound": 3.0}, "--norm-bound 3.0 with --secagg"),
        ({"sampling": "size"}, "--sampling size with --secagg"),
        ({"codec_up": "topk:0.1"}, "--secagg masks integers: use --codec-up modular:16 or modular:32"),
        ({"codec_up": "modular:16"}, "--codec-up modular:16 has no room for weights by photos"),
        ({"min_clients": 2}, "--min-clients 2 with --secagg: a sum of fewer than 3 stores hides nothing"),
    ],
    ids=str,
)
def test_what_needs_single_uploads_is_refused(stores: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        run("run", secagg=True, **given)
    assert any(said in str(problem) for problem in raised.value.args), raised.value.args
    assert not Path("run").exists()


@pytest.mark.usefixtures("stores")
def test_too_many_uploads_for_the_codec_end_the_run_with_the_remedy() -> None:
    with pytest.raises(RunError, match="modular:32:0:4"):
        run("run", secagg=True, codec_up="modular:32:0:3")


@pytest.mark.usefixtures("stores")
def test_the_protection_is_in_what_a_run_shows() -> None:
    run("run", secagg=True, rounds=1, compare=False)
    shown = json.loads(output("show", "run", "--json"))
    assert shown["protections"] == ["secagg"]
    assert shown["codec_up"] == "modular:32"


@pytest.mark.usefixtures("stores")
def test_no_secret_of_a_round_is_in_a_file_or_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    secrets: list[bytes] = []

    def recorded(*given: Any) -> Any:
        found, shown = advertise(*given)
        secrets.extend([found.seed, found.mask_key.private_bytes_raw(), found.seal_key.private_bytes_raw()])
        return found, shown

    def recorded_shares(*given: Any) -> Any:
        dealt = deal(*given)
        secrets.extend(share for shares in dealt.values() for share in (shares.seed, shares.mask_key))
        return dealt

    monkeypatch.setattr(client, "advertise", recorded)
    monkeypatch.setattr(client, "deal", recorded_shares)
    with caplog.at_level(logging.DEBUG):
        run("run", secagg=True, rounds=2)
    assert len(secrets) == 2 * 4 * (3 + 2 * 4)
    forms = [form for secret in secrets for form in (secret, secret.hex().encode(), base64.b64encode(secret))]
    files = [path for path in home.parent.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not any(form in content for form in forms), path
    assert not any(form.decode("latin-1") in caplog.text for form in forms)
