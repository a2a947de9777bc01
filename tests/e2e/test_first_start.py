"""A server and its clients started at the same moment, on a machine where none ever ran."""

import ssl
from pathlib import Path

import pytest

from fedshelf.core.errors import TransportError
from fedshelf.deploy import client_loop
from fedshelf.deploy.client_part import EndKind
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.tls import client_context, ensure_server_tls
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

    monkeypatch.setattr(client_loop, "client_context", just_too_early)
    with EmbeddedServer(host="127.0.0.1", port=0, tls=tls) as server:
        transport = server.transport()
        with ThreadClient(server.address, "lyon", insecure=False) as client:
            assert set(joined(transport)) == {"lyon"}
            transport.close("done")
            assert client.result.result(PATIENCE).kind is EndKind.CLOSED


def test_an_authority_of_somebody_else_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSHELF_HOME", str(tmp_path / "home"))
    ensure_server_tls(tmp_path / "home" / "tls")
    printable = ensure_server_tls(tmp_path / "foreign")
    with (
        EmbeddedServer(host="127.0.0.1", port=0, tls=printable) as server,
        ThreadClient(server.address, "lyon", insecure=False) as client,
        pytest.raises(TransportError, match="not to be trusted"),
    ):
        client.result.result(PATIENCE)
