"""Receipts of rounds: what they state, and that any change shows without FedShelf."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedshelf.config import places
from fedshelf.core.errors import RefusedError
from fedshelf.identity.chain import Chain
from fedshelf.identity.keys import KeyPair
from fedshelf.identity.receipts import signed, verified
from tests.unit.cli.test_command_line import fedshelf
from tests.unit.simulate.test_private_simulation import run, shown, stores

__all__ = ["stores"]
SCRIPT = Path(__file__).parents[3] / "scripts" / "check_receipt.py"


def check(receipt: Path, key: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-I", str(SCRIPT), str(receipt), key]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def chain(home: Path) -> Chain:
    return Chain(places.identity_directory())


@pytest.mark.usefixtures("stores")
def test_a_receipt_states_the_round_and_is_checked_without_fedshelf(
    chain: Chain, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = run("run", dp="sample", noise_multiplier=1.5, compare=False)
    file = tmp_path / "receipt.json"
    code, _, err = fedshelf(capsys, "privacy", "receipt", "run", "--round", "2", "--out", str(file))
    assert code == 0, err
    fields = json.loads(file.read_text(encoding="utf-8"))
    assert (fields["round"], fields["attempt"], fields["counted"]) == (2, 0, 3)
    assert fields["cohort"] == [{"store": name, "part": "counted"} for name in ("lyon", "oslo", "rome")]
    assert fields["protections"] == ["dp sample"]
    assert fields["privacy"] == shown(directory)
    assert fields["unprotected"]
    assert len(fields["config"]) == 64
    assert fields["model"]
    found = check(file, chain.key.text)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("valid: round 2 of run ")
    first = json.loads(fedshelf(capsys, "privacy", "receipt", "run", "--round", "1")[1])
    assert first["privacy"]["epsilon"] < fields["privacy"]["epsilon"]
    assert first["model"] != fields["model"]

    for name in fields:
        altered: dict[str, Any] = {**fields, name: 7 if isinstance(fields[name], list) else [1]}
        file.write_text(json.dumps(altered), encoding="utf-8")
        assert check(file, chain.key.text).returncode == 1, name
        with pytest.raises(RefusedError):
            verified(json.dumps(altered), chain.key)
    other = KeyPair.generate()
    del fields["signature"]
    file.write_text(signed(fields, other), encoding="utf-8")
    assert check(file, chain.key.text).stdout.startswith("NOT VALID: it names another key")
    assert check(file, other.public.text).returncode == 0
    changed = {**json.loads(file.read_text(encoding="utf-8")), "counted": 1000}
    file.write_text(json.dumps(changed), encoding="utf-8")
    assert check(file, other.public.text).stdout.startswith("NOT VALID: it was altered, or the signature is not")
    file.write_text("[]", encoding="utf-8")
    assert check(file, other.public.text).stdout.startswith("NOT VALID: it is not a receipt")
    missing = check(file.with_name("none.json"), other.public.text)
    assert (missing.returncode, missing.stderr) == (2, "")


@pytest.mark.usefixtures("stores")
def test_without_protection_a_receipt_says_what_the_server_saw(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    run("run", rounds=1)
    fields = json.loads(fedshelf(capsys, "privacy", "receipt", "run", "--round", "1")[1])
    assert (fields["protections"], fields["privacy"]) == ([], None)
    assert fields["unprotected"][0] == "each update, which the server saw as it was"
    code, _, err = fedshelf(capsys, "privacy", "receipt", "run", "--round", "2")
    assert code == 2
    assert "round 2 of run" in err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"signature": 3}', '{"signature": "é"}', "[" * 10_000])
def test_what_is_no_receipt_is_refused_by_both(text: str, tmp_path: Path) -> None:
    key = KeyPair.generate().public
    with pytest.raises(RefusedError):
        verified(text, key)
    (tmp_path / "receipt.json").write_text(text, encoding="utf-8")
    found = check(tmp_path / "receipt.json", key.text)
    assert (found.returncode, found.stderr) == (1, "")


def test_the_script_is_short_and_needs_cryptography_alone() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"json", "sys", "base64", "pathlib", "cryptography"}
