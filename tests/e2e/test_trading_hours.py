"""Clients that may work at some times only: real servers and real clients."""

import datetime
import threading
import time
from pathlib import Path

import pytest
import torch

from fedshelf.core.errors import TransportError
from fedshelf.core.messages import Broadcast, ClientMessage, ServerMessage, Upload
from fedshelf.core.ports import Left, Reply
from fedshelf.deploy import registration, waiting
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.waiting import Availability
from fedshelf.scheduling.active_hours import DAY, active_hours
from tests.ports import free_port
from tests.processes import Site, statuses
from tests.unit.deploy.echo import PATIENCE, ThreadClient, echo, expect, joined, task

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NIGHT, DAYTIME = 20_000 * DAY + 23 * 3600, 20_000 * DAY + 12 * 3600


class Clock:
    """A clock on a wall, set by the test."""

    def __init__(self, now: float) -> None:
        self.now = now

    def availability(self) -> Availability:
        return Availability(active_hours("22:00-06:00", "UTC"), lambda: self.now)


@pytest.fixture(autouse=True)
def quick_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a test sets is looked at often."""
    monkeypatch.setattr(waiting, "NAP_SECONDS", 0.05)


def test_the_task_at_hand_is_delivered_late_and_the_client_comes_back_when_its_hours_do() -> None:
    clock, started, go_on = Clock(NIGHT), threading.Event(), threading.Event()

    def slow(message: ServerMessage) -> ClientMessage:
        if isinstance(message, Broadcast):
            started.set()
            assert go_on.wait(PATIENCE)
        return echo(message)

    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as server:
        transport = server.transport()
        with ThreadClient(server.address, "lyon", handle=slow, availability=clock.availability()) as client:
            address = joined(transport)["lyon"]
            transport.send(address, task(torch.zeros(3)))
            assert started.wait(PATIENCE)
            clock.now = DAYTIME
            go_on.set()
            reply = expect(transport, Reply).message
            assert isinstance(reply, Upload)
            assert torch.equal(reply.delta, torch.ones(3))
            assert expect(transport, Left).address == address
            client.says("outside of its hours (22:00-06:00, UTC): it joins at 22:00, in 10 h 0 min")
            assert transport.receive(0.5) is None, "it stays away"
            clock.now = NIGHT + DAY
            again = joined(transport)["lyon"]
            transport.send(again, task(torch.ones(3), round=2))
            assert isinstance(expect(transport, Reply).message, Upload)
            assert not any("joining again" in status for status in client.statuses), "nothing was lost"


def test_work_that_comes_after_closing_is_not_begun() -> None:
    clock, begun = Clock(NIGHT), threading.Event()

    def handle(message: ServerMessage) -> ClientMessage:
        begun.set()
        return echo(message)

    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as server:
        transport = server.transport()
        with ThreadClient(server.address, "lyon", handle=handle, availability=clock.availability()):
            address = joined(transport)["lyon"]
            time.sleep(0.3)  # until it asks for work
            clock.now = DAYTIME
            transport.send(address, task(torch.zeros(3)))  # it is asking at this moment, and is handed it
            assert expect(transport, Left).address == address
            assert not begun.is_set()


def test_a_closed_client_hears_that_it_is_to_stop() -> None:
    with ThreadClient(f"127.0.0.1:{free_port()}", "lyon", availability=Clock(DAYTIME).availability()) as client:
        client.says("outside of its hours")
        client.stop.set()
        assert client.result.result(PATIENCE).reason == "stopped"
    assert not any("cannot connect" in status for status in client.statuses), "it does not even try"


def test_time_outside_of_the_hours_is_no_time_that_a_server_was_away() -> None:
    clock = Clock(DAYTIME)
    with ThreadClient(f"127.0.0.1:{free_port()}", "lyon", availability=clock.availability(), max_wait=1.0) as client:
        client.says("outside of its hours")
        time.sleep(1.5)  # longer than it would wait for a server
        clock.now = NIGHT
        client.says("cannot connect")
        with pytest.raises(TransportError, match="did not answer for 1 s"):
            client.result.result(PATIENCE)


def test_time_at_a_server_is_no_time_that_it_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "GLITCH_SECONDS", 0.2)
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as server:
        client = ThreadClient(server.address, "lyon", max_wait=1.0)
        joined(server.transport())
        time.sleep(1.5)
    with client:
        client.says("cannot connect")
        with pytest.raises(TransportError, match="did not answer for 1 s"):
            client.result.result(PATIENCE)


def clock_time(moment: datetime.datetime) -> str:
    return f"{moment:%H:%M:%S}"


def test_a_client_joins_a_run_when_its_hours_begin(pair: Site) -> None:
    run = pair.root / "run"
    server = pair.server("--rounds", "2", "--run-dir", str(run))
    first = pair.client("store-1")
    opens = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=12)
    hours = f"{clock_time(opens)}-{clock_time(opens + datetime.timedelta(hours=2))}"
    second = pair.client("store-2", "--active-hours", hours, "--time-zone", "UTC")
    server.wait_for("client_joined", client="store-2")
    assert datetime.datetime.now(datetime.UTC) >= opens.replace(microsecond=0)
    assert server.end() == 0, server.text()
    assert [client.end() for client in (first, second)] == [0, 0]
    for number in (1, 2):
        assert statuses(pair.show(run), number) == dict.fromkeys(pair.names, "counted")


def test_ctrl_c_wakes_a_client_that_waits_for_its_hours(pair: Site) -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=3)
    file = Path(pair.root / "client.toml")
    hours = f"{clock_time(later)}-{clock_time(later + datetime.timedelta(hours=1))}"
    file.write_text(f'active-hours = "{hours}"\ntime-zone = "UTC"\n')
    client = pair.client("store-1", "--config", str(file))
    client.wait_for_text(f"outside of its hours ({hours}, UTC): it joins at {later:%H:%M}")
    client.interrupt()
    assert client.end() == 0, client.text()
    assert "cannot connect" not in client.text(), "there is no server, and nobody has asked"
