"""A real client that dies, is told to stop, or comes back: the round does not depend on it."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import CLASSES, Process, Site, reason, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def paused_in_round_1(site: Site, run: Path, *, quorum: int, rounds: int = 2) -> tuple[Process, Process, list[Process]]:
    """A server, a client that was stopped with its task of round 1 waiting for it, and the others, who have answered.

    The server knows the catalogue, so the first client is set up, and can be stopped, before the others start. These
    hold round 2 open, so that the run cannot end without the first.
    """
    catalogue = site.root / "catalogue.txt"
    catalogue.write_text("\n".join(CLASSES))
    server = site.server(
        "--rounds", str(rounds), "--quorum", str(quorum), "--val-fraction", "0", "--run-dir", str(run), "--catalogue",
        str(catalogue),
    )  # fmt: skip
    *rest, last = site.names
    victim = site.client(last)
    server.wait_for("client_joined", client=last)
    victim.pause()
    others = [site.held_client(name, "hold@2") for name in rest]
    for name in rest:
        server.wait_for("upload_received", round=1, client=name, status="counted")
    return server, victim, others


def wait_until_joined_again(server: Process, name: str) -> None:
    while sum(event["event"] == "client_joined" and event["client"] == name for event in server.events) < 2:
        assert server.running(), server.text()
        time.sleep(0.05)


def test_a_round_completes_by_quorum_without_a_killed_client_which_rejoins_when_restarted(site: Site) -> None:
    run = site.root / "run"
    server, victim, others = paused_in_round_1(site, run, quorum=3, rounds=3)
    victim.kill()
    server.wait_for("round_started", round=2)  # three are a quorum
    assert server.has("client_left", client="store-4")
    victim = site.client("store-4")
    wait_until_joined_again(server, "store-4")
    site.release(2)
    assert server.end() == 0, server.text()
    assert [client.end() for client in (victim, *others)] == [0] * 4
    summary = site.show(run)
    assert statuses(summary, 1) == dict.fromkeys(site.names[:3], "counted") | {"store-4": "offline"}
    assert "the process of store-4 ended without a message" in reason(summary, 1, "store-4")
    assert statuses(summary, 2) == dict.fromkeys(site.names[:3], "counted")
    assert statuses(summary, 3) == dict.fromkeys(site.names, "counted")
    assert summary["void_rounds"] == 0


@pytest.mark.parametrize("by", [signal.SIGSEGV, signal.SIGABRT])
def test_a_client_that_crashes_is_named_by_the_signal_on_both_sides(pair: Site, by: signal.Signals) -> None:
    server = pair.server("--rounds", "1", "--val-fraction", "0")
    held, victim = pair.held_client("store-1", "hold@1"), pair.client("store-2")
    for name in pair.names:
        server.wait_for("client_joined", client=name)
    victim.kill(by)
    ending = f"the process of store-2 was ended by {by.name} (a fault in native code)"
    assert server.wait_for("client_left", client="store-2")["reason"] == ending
    assert f"store-2: {ending}" in victim.text()
    assert "most recent call first" in victim.text()  # where in the code it was
    assert held.running()


def test_waiting_fails_at_once_where_another_process_has_crashed(pair: Site) -> None:
    server, client = pair.server("--rounds", "1"), pair.client("store-1")  # too few clients to begin with
    client.wait_for_text("connected to")
    os.kill(client.pid, signal.SIGSEGV)
    with pytest.raises(AssertionError, match=r"store-1.* was ended by SIGSEGV"):
        server.wait_for("round_finished", round=1)
    with pytest.raises(AssertionError, match=r"store-1.* was ended by SIGSEGV"):
        server.end()


def test_a_client_that_ends_by_itself_leaves_no_process_behind(pair: Site) -> None:
    client = pair.client("store-1", "--max-wait", "0.1")  # there is no server
    client.wait_for_text("connecting to")
    (reporter,) = psutil.Process(client.pid).children()
    assert client.end() == 1
    assert "without a message" not in client.text()
    assert not reporter.is_running()


def test_ctrl_c_of_a_client_signs_it_off_and_it_may_come_back(pair: Site) -> None:
    run = pair.root / "run"
    server, leaver, other = paused_in_round_1(pair, run, quorum=1, rounds=3)
    leaver.interrupt()
    leaver.resume()
    assert leaver.end() == 0, leaver.text()
    assert "stopping" in leaver.text()
    assert "joining again" not in leaver.text()
    assert "Traceback" not in leaver.text()
    server.wait_for("client_left", client="store-2")
    server.wait_for("round_finished", round=1)
    back = pair.client("store-2")
    wait_until_joined_again(server, "store-2")
    pair.release(2)
    assert server.end() == 0, server.text()
    assert [client.end() for client in (back, *other)] == [0, 0]
    summary = pair.show(run)
    # It may have had the task in hand when it was told to stop, and then has answered it.
    assert statuses(summary, 1)["store-2"] in ("offline", "counted")
    assert statuses(summary, 3) == {"store-1": "counted", "store-2": "counted"}
