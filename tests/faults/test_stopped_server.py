"""A real server that is told to stop, or cannot write any more: nothing is lost, and the same command goes on."""

import re
import resource

import pytest

from fedshelf.app.predictor import model_folder
from tests.processes import Process, Site, same_model, same_weights, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RECIPE = ("--rounds", "3", "--val-fraction", "0.2")


def assert_uninterrupted(site: Site, server: Process) -> None:
    """`server` ends the only run as one that was never stopped."""
    assert server.end() == 0, server.text()
    site.simulate(*RECIPE, run_dir=site.root / "uninterrupted")
    assert same_model(site.only_run(), site.root / "uninterrupted")
    summary = site.show(site.only_run())
    assert summary["status"] == "finished"
    assert [round_["round"] for round_ in summary["rounds"]] == [1, 2, 3]
    assert all(statuses(summary, n) == dict.fromkeys(site.names, "counted") for n in (1, 2, 3))


def test_ctrl_c_of_the_server_keeps_the_round_and_the_same_command_goes_on(
    pair: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = pair.server(*RECIPE)
    held = pair.held_client("store-1", "hold@2")
    other = pair.client("store-2")
    held.wait_for("held", round=2)
    server.wait_for("upload_received", round=2, client="store-2")
    server.interrupt()
    assert server.end() == 0  # a service manager does not restart what an operator has stopped
    assert server.has("run_ended", status="stopped")
    assert "Traceback" not in server.text()
    summary = pair.show(pair.only_run())
    assert summary["status"] == "stopped"
    assert [round_["round"] for round_ in summary["rounds"]] == [1]
    assert held.running()
    assert other.running()  # they wait for the server to come back

    server = pair.server(*RECIPE)
    assert server.wait_for("run_started")["first_round"] == 2
    server.wait_for("upload_received", round=2, client="store-2", status="counted")
    pair.release(2)
    assert_uninterrupted(pair, server)
    assert [held.end(), other.end()] == [0, 0]
    for number in (1, 2, 3):  # a client says what it does
        assert re.search(rf"store-2: round {number}: \d+ photos, loss \d\.\d+, sent \d+\.\d kB, \d\.\d s", other.text())
    own = pair.root / "home" / "clients" / "store-2" / "model"
    assert f"store-2: its model is in {own}" in other.text()
    assert same_weights(own, pair.only_run() / "model")
    monkeypatch.setenv("FEDSHELF_HOME", str(pair.root / "home"))
    assert model_folder(None, best=False) == own


def test_a_server_whose_disk_is_full_says_so_and_goes_on_once_there_is_room(pair: Site) -> None:
    server = pair.server(*RECIPE)
    clients = [pair.held_client("store-1", "hold@2"), pair.client("store-2")]
    clients[0].wait_for("held", round=2)
    # From now on no file of this process may grow: what a full disk is to it, and needs no disk to fill.
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1, hard))
    pair.release(2)
    assert server.end() == 1
    assert "error: cannot write" in server.text()
    assert "Traceback" not in server.text()
    summary = pair.show(pair.only_run())
    assert summary["status"] in ("stopped", "failed")
    assert [round_["round"] for round_ in summary["rounds"]] == [1]

    for client in clients:
        client.kill()
    server = pair.server(*RECIPE)
    again = pair.clients()
    assert server.wait_for("run_started")["first_round"] == 2
    assert_uninterrupted(pair, server)
    assert [client.end() for client in again.values()] == [0, 0]
