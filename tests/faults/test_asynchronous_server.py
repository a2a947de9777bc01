"""Asynchronous rounds over real processes: a slow store holds nobody up, and a killed server loses nothing."""

import resource
from typing import Any

import pytest

from tests.processes import Site, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RECIPE = ("--algorithm", "fedbuff", "--buffer-size", "2", "--rounds", "30", "--val-fraction", "0.2")


def counted(summary: dict[str, Any], client: str) -> list[tuple[int, int]]:
    """Round and staleness of each upload of `client` that counted."""
    return [
        (round_["round"], member["staleness"])
        for round_ in summary["rounds"]
        for member in round_["clients"]
        if member["client"] == client and member["status"] == "counted"
    ]


def test_others_go_on_while_a_store_is_at_work_and_its_upload_counts_as_stale(site: Site) -> None:
    server = site.server(*RECIPE)
    slow = site.held_client(site.names[0], "hold@1")
    others = [site.client(name) for name in site.names[1:]]
    slow.wait_for("held", round=1)
    server.wait_for("round_finished", round=3)
    site.release(1)
    assert server.end() == 0, server.text()
    assert [client.end() for client in (slow, *others)] == [0] * 4
    summary = site.show(site.only_run())
    assert summary["status"] == "finished"
    assert [round_["round"] for round_ in summary["rounds"]] == list(range(1, 31))
    first_round, staleness = counted(summary, site.names[0])[0]
    assert first_round > 3
    assert staleness == first_round - 1
    assert all(len([m for m in r["clients"] if m["status"] == "counted"]) == 2 for r in summary["rounds"])
    assert all(round_["accuracy"] is not None for round_ in summary["rounds"][5:])


def test_a_killed_server_asks_again_for_what_was_out_and_counts_each_round_once(site: Site) -> None:
    server = site.server(*RECIPE)
    slow = site.held_client(site.names[0], "hold@1")
    others = [site.client(name) for name in site.names[1:]]
    slow.wait_for("held", round=1)
    server.wait_for("round_finished", round=4)
    server.kill()
    server = site.server(*RECIPE)
    first = server.wait_for("run_started")["first_round"]
    assert first >= 4  # the record of round 4 comes before its checkpoint
    site.release(1)
    assert server.end() == 0, server.text()
    assert [client.end() for client in (slow, *others)] == [0] * 4
    summary = site.show(site.only_run())
    assert [round_["round"] for round_ in summary["rounds"]] == list(range(1, 31))
    assert counted(summary, site.names[0])[0][1] >= 3, "what the store trained on the first model was not used"


def test_a_store_that_dies_at_work_is_offline_and_the_others_finish(site: Site) -> None:
    server = site.server(*RECIPE, min_clients=3)
    doomed = site.held_client(site.names[0], "hold@1")
    others = [site.held_client(name, "hold@1") for name in site.names[1:]]
    for client in (doomed, *others):
        client.wait_for("held", round=1)
    doomed.kill()
    server.wait_for("client_left", client=site.names[0])
    site.release(1)
    assert server.end() == 0, server.text()
    assert [client.end() for client in others] == [0] * 3
    summary = site.show(site.only_run())
    ends = [statuses(summary, round_["round"]).get(site.names[0]) for round_ in summary["rounds"]]
    assert set(ends) == {None, "offline"}
    assert ends.count("offline") == 1


def test_stores_that_send_what_they_should_not_are_refused_by_name_and_stop_nobody(site: Site) -> None:
    server = site.server(*RECIPE)
    reasons = {"store-3": ("stale", "stale or of another run"), "store-4": ("truncated", "truncated or altered")}
    honest = [site.client(name) for name in site.names[:2]]
    odd = [site.odd_client(name, "--do", oddity) for name, (oddity, _) in reasons.items()]
    assert server.end() == 0, server.text()
    assert [client.end() for client in (*honest, *odd)] == [0] * 4, "the odd ones are excluded, and stay connected"
    assert all(server.has("client_excluded", client=name) for name in reasons)
    assert "Traceback" not in server.text()
    members = [member for round_ in site.show(site.only_run())["rounds"] for member in round_["clients"]]
    counted = [member["client"] for member in members if member["status"] == "counted"]
    assert (len(counted), set(counted)) == (60, set(site.names[:2]))
    for name, (_, reason) in reasons.items():
        refused = [member for member in members if member["client"] == name]
        assert refused
        assert {member["status"] for member in refused} == {"refused"}
        assert all(reason in member["reason"] for member in refused)


def test_a_server_whose_disk_is_full_says_so_and_goes_on_once_there_is_room(site: Site) -> None:
    server = site.server(*RECIPE)
    slow = site.held_client(site.names[0], "hold@1")
    others = [site.client(name) for name in site.names[1:]]
    slow.wait_for("held", round=1)
    server.wait_for("round_finished", round=4)
    # From now on no file of this process may grow: what a full disk is to it, and needs no disk to fill.
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1, hard))
    assert server.end() == 1
    assert "error: cannot write" in server.text()
    assert "Traceback" not in server.text()
    before = [round_["round"] for round_ in site.show(site.only_run())["rounds"]]
    assert before == list(range(1, len(before) + 1))

    for client in (slow, *others):
        client.kill()
    server = site.server(*RECIPE)
    again = site.clients()
    assert len(before) <= server.wait_for("run_started")["first_round"] <= len(before) + 1
    assert server.end() == 0, server.text()
    assert [client.end() for client in again.values()] == [0] * 4
    summary = site.show(site.only_run())
    assert [round_["round"] for round_ in summary["rounds"]] == list(range(1, 31))
    assert all(len([m for m in r["clients"] if m["status"] == "counted"]) == 2 for r in summary["rounds"])
