"""Lines that break amid a model or an answer: the transfer goes on where it was, and not one bit is another."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedshelf.core.messages import Upload
from fedshelf.core.ports import Left, Reply
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.grid_transport import GridTransport
from fedshelf.deploy.tls import ServerTls, ensure_server_tls
from tests.cutting_proxy import DOWN, UP, cutting_proxy
from tests.processes import Site, same_model
from tests.unit.deploy.echo import PATIENCE, ThreadClient, expect, joined, process_client, task

pytestmark = pytest.mark.e2e

COUNT = 5_000_000  # values: 20 MB
SIZE = 4 * COUNT
SLACK = 3_000_000  # bytes that a break may cost: what was under way, and the messages


@pytest.fixture(scope="module")
def params() -> torch.Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ServerTls:
    return ensure_server_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(host="127.0.0.1", port=0, tls=None) as running:
        yield running


def assert_answered(transport: GridTransport, params: torch.Tensor) -> None:
    """The next arrival is the echo's upload, to the last bit."""
    reply = expect(transport, Reply)
    assert isinstance(reply.message, Upload)
    assert torch.equal(reply.message.delta, params + 1)
    assert SIZE < reply.num_bytes < SIZE + 1000


@pytest.mark.parametrize("direction", [UP, DOWN])
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_transfer_goes_on_where_the_line_broke(
    params: torch.Tensor, tls: ServerTls, direction: str, encrypted: bool
) -> None:
    with (
        EmbeddedServer(host="127.0.0.1", port=0, tls=tls if encrypted else None) as server,
        cutting_proxy(server.address) as proxy,
        ThreadClient(proxy.address, "lyon", insecure=not encrypted, ca=tls.ca if encrypted else None),
    ):
        transport = server.transport()
        address = joined(transport)["lyon"]
        before = dict(proxy.passed)
        proxy.cut_at(direction, 7_000_000, 14_000_000)
        transport.send(address, task(params))
        assert_answered(transport, params)
        assert proxy.num_cuts == 2
        for way in (UP, DOWN):
            assert SIZE <= proxy.passed[way] - before[way] < SIZE + 2 * SLACK


def test_a_restarted_client_goes_on_with_the_upload_that_it_was_killed_in(
    server: EmbeddedServer, params: torch.Tensor
) -> None:
    transport = server.transport()
    with cutting_proxy(server.address) as proxy:
        with process_client(proxy.address, "lyon") as killed:
            address = joined(transport)["lyon"]
            proxy.stall_at(UP, 12_000_000)
            transport.send(address, task(params))
            assert proxy.stalled.wait(PATIENCE)
            killed.kill()
        proxy.release()
        assert expect(transport, Left).address == address
        before = proxy.passed[UP]
        with process_client(proxy.address, "lyon"):
            transport.send(joined(transport)["lyon"], task(params))
            assert_answered(transport, params)
            assert proxy.passed[UP] - before < SIZE - 12_000_000 + SLACK


def test_a_restarted_client_fetches_the_model_that_it_was_killed_in(
    server: EmbeddedServer, params: torch.Tensor
) -> None:
    transport = server.transport()
    with cutting_proxy(server.address) as proxy:
        with process_client(proxy.address, "lyon") as killed:
            address = joined(transport)["lyon"]
            proxy.stall_at(DOWN, 12_000_000)
            transport.send(address, task(params))
            assert proxy.stalled.wait(PATIENCE)
            killed.kill()
        proxy.release()
        assert expect(transport, Left).address == address
        with process_client(proxy.address, "lyon"):
            transport.send(joined(transport)["lyon"], task(params))
            assert_answered(transport, params)


def test_a_server_killed_amid_an_upload_goes_on_with_it_and_ends_with_the_same_bits(pair: Site) -> None:
    recipe = ("--rounds", "2", "--val-fraction", "0", "--width", "32")
    run = pair.root / "run"
    server, direct = pair.server(*recipe, "--insecure", "--run-dir", str(run)), pair.address
    with cutting_proxy(direct) as proxy:
        other = pair.client("store-1", "--insecure")
        pair.address = proxy.address
        proxied = pair.client("store-2", "--insecure")
        pair.address = direct
        server.wait_for("client_joined", client="store-2")
        proxy.stall_at(UP, 4_000_000)
        server.wait_for("upload_received", round=1, client="store-1")
        assert proxy.stalled.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while size_below(run / "incoming") < 2_000_000 and time.monotonic() < deadline:
            time.sleep(0.02)  # what has passed the proxy may still be on its way to the disk
        server.kill()
        part, before = size_below(run / "incoming"), proxy.passed[UP]
        assert part > 2_000_000
        proxy.release()
        server = pair.server(*recipe, "--insecure", "--run-dir", str(run))
        server.wait_for("upload_received", round=1, client="store-2", status="counted")
        model = server.wait_for("run_started")["num_parameters"] * 4
        assert proxy.passed[UP] - before < model - part + SLACK
        assert server.end() == 0, server.text()
        assert [other.end(), proxied.end()] == [0, 0]
    pair.simulate(*recipe, run_dir=pair.root / "uninterrupted")
    assert same_model(run, pair.root / "uninterrupted")
    assert size_below(run / "incoming") == 0


def size_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
