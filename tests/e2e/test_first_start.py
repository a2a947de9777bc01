"""A server and its clients started at the same moment, on a machine where none ever ran."""

import re
import shlex
import shutil
import ssl
from pathlib import Path

import pytest

from fedshelf.deploy import credentials
from fedshelf.deploy.client_part import EndKind
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.tls import client_context, ensure_server_tls
from tests.ports import free_port
from tests.processes import Site, statuses
from tests.unit.deploy.echo import PATIENCE, ThreadClient, joined

pytestmark = pytest.mark.e2e


def test_an_authority_made_while_a_client_connects_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSHELF_HOME", str(tmp_path / "home"))
    tls = ensure_server_tls(tmp_path / "tls")
    real = client_context

    def just_too_early(ca: Path | None) -> ssl.SSLContext:
        context = real(ca)
        (tmp_path / "home" / "tls").mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / "tls" / "ca.pem").write_bytes(tls.ca.read_bytes())
        return context

    monkeypatch.setattr(credentials, "client_context", just_too_early)
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=tls) as server:
        transport = server.transport()
        with ThreadClient(server.address, "lyon", insecure=False) as client:
            assert set(joined(transport)) == {"lyon"}
            transport.close("done")
            assert client.result.result(PATIENCE).kind is EndKind.CLOSED


def test_an_authority_of_somebody_else_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSHELF_HOME", str(tmp_path / "home"))
    ensure_server_tls(tmp_path / "home" / "tls")
    printable = ensure_server_tls(tmp_path / "foreign")
    with (
        EmbeddedServer(host="127.0.0.1", port=free_port(), tls=printable) as server,
        ThreadClient(server.address, "lyon", insecure=False) as client,
    ):
        client.says("not to be trusted")


@pytest.mark.slow
def test_two_stores_join_by_the_line_that_the_server_prints_and_by_the_same_folder_name(pair: Site) -> None:
    """Each store keeps its photos in a folder `local_data`; the second one leaves `--name` out."""
    for name in pair.names:
        shutil.copytree(pair.stores / name, pair.root / name / "local_data")
    run = pair.root / "run"
    port = pair.address.rpartition(":")[2]
    server = pair.server("--rounds", "1", "--run-dir", str(run), "--advertise", f"localhost:{port}")
    server.wait_for_text("need no --token)")
    found = re.search(r"fedshelf client --data-dir ./local_data --server-address \S+ --token \S+", server.text())
    assert found is not None, server.text()
    assert f"--server-address localhost:{port}" in found[0]
    elsewhere = {**pair.environment, "FEDSHELF_HOME": str(pair.root / "another machine")}
    pair.environment, here = elsewhere, pair.environment
    line = [part.replace("./local_data", "store-1/local_data") for part in shlex.split(found[0])[1:]]
    first = pair.fedshelf(*line, "--name", "lyon")
    pair.environment = here
    second = pair.fedshelf("client", "--data-dir", "store-2/local_data", "--server-address", pair.address)
    assert server.end() == 0, server.text()
    assert [first.end(), second.end()] == [0, 0]
    lyon, other = sorted(statuses(pair.show(run), 1), key=lambda name: name != "lyon")
    assert lyon == "lyon"
    assert other.startswith("local_data-")
