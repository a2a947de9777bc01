"""`fedshelf enroll import`: tokens for a table of stores."""

import csv
import io
from pathlib import Path

import pytest

from fedshelf.cli.app import main
from fedshelf.config import places
from fedshelf.identity import certificates
from fedshelf.identity.chain import Chain
from fedshelf.identity.keys import KeyPair

ADDRESS = ("--server-address", "hq.example:8080")


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """In which lyon is enrolled, and nice was revoked."""
    monkeypatch.setenv("FEDSHELF_HOME", str(tmp_path / "home"))
    made = Chain(places.identity_directory())
    for name in ("lyon", "nice"):
        token = made.add(name, authority="", addresses=("hq.example:8080",))
        made.enroll(token.secret, name, certificates.signing_request(KeyPair.generate()))
    made.revoke("nice")
    return made


def test_enrolled_and_revoked_stores_get_no_token_and_are_named(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "stores.csv"
    table.write_text("name\nlyon\nnice\noslo\n\n oslo \n", encoding="utf-8")
    main(["enroll", "import", str(table), *ADDRESS])
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [row["name"] for row in rows] == ["oslo"]
    assert rows[0]["token"].startswith("fedshelf1.")
    assert "left out, enrolled already: 'lyon'" in printed.err
    assert "left out, revoked: 'nice'. 'fedshelf enroll add NAME'" in printed.err
    assert [token.name for token in chain.open_tokens()] == ["oslo"]


@pytest.mark.usefixtures("chain")
def test_a_table_in_another_encoding_enrolls_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "stores.csv"
    table.write_bytes("name\nM\xfcnchen\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        main(["enroll", "import", str(table), *ADDRESS])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "is not UTF-8" in printed.err
