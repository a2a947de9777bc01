"""kill -9 of a real server, wherever in a round: started again by the same command, it ends as if nothing had been."""

import random
import time
from collections.abc import Sequence

import pytest

from tests.processes import Process, Site, figures, same_model, statuses

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RECIPE = ("--rounds", "4", "--val-fraction", "0.2")
COMPRESSED = (*RECIPE, "--codec-up", "topk:0.2+int8+zstd", "--codec-down", "int4+zstd")
EXACT = ("round", "train_loss", "accuracy")


def assert_as_if_nothing_had_been(site: Site, *, ended: Process, recipe: Sequence[str] = RECIPE) -> None:
    """The one run below the working folder equals an uninterrupted one, and holds each round once."""
    assert ended.end() == 0, ended.text()
    uninterrupted = site.root / "uninterrupted"
    site.simulate(*recipe, run_dir=uninterrupted)
    run = site.only_run()
    assert same_model(run, uninterrupted)
    summary = site.show(run)
    assert summary["status"] == "finished"
    assert summary["void_rounds"] == 0
    assert figures(summary, *EXACT) == figures(site.show(uninterrupted), *EXACT)
    for round_ in (1, 2, 3, 4):
        assert statuses(summary, round_) == dict.fromkeys(site.names, "counted")


def test_a_killed_server_resumes_the_same_round_while_clients_stay_up(site: Site) -> None:
    server = site.server(*RECIPE)
    held = site.held_client(site.names[0], "hold@1", "hold-evaluation@2", "hold@4")
    others = [site.client(name) for name in site.names[1:]]

    held.wait_for("held", round=1)
    for name in site.names[1:]:
        server.wait_for("upload_received", round=1, client=name)
    server.kill()  # in the middle of a round: three of four uploads are in

    server = site.server(*RECIPE)
    assert server.wait_for("run_started")["first_round"] == 1
    for name in site.names[1:]:
        server.wait_for("upload_received", round=1, client=name, status="counted")  # found in the spool
    site.release(1)
    server.wait_for("round_finished", round=1)

    held.wait_for("held", round=2)
    assert not server.has("round_finished", round=2)
    server.kill()  # all uploads are in, the evaluation is not
    site.release(2)

    server = site.server(*RECIPE)
    server.wait_for("round_finished", round=2)
    server.wait_for("round_finished", round=3)
    server.kill()  # between rounds, before or after the checkpoint; the last round cannot end yet
    site.release(4)

    server = site.server(*RECIPE)
    assert_as_if_nothing_had_been(site, ended=server)
    assert [client.end() for client in (held, *others)] == [0] * 4


@pytest.mark.parametrize("recipe", [RECIPE, COMPRESSED], ids=["plain", "compressed"])
def test_a_killed_server_resumes_when_its_clients_were_killed_too(pair: Site, recipe: Sequence[str]) -> None:
    holding = ("hold@1", "hold-evaluation@2")
    server, first, second = pair.server(*recipe), pair.held_client("store-1", *holding), pair.client("store-2")
    first.wait_for("held", round=1)
    server.wait_for("upload_received", round=1, client="store-2")
    for process in (server, first, second):
        process.kill()

    pair.release(1)
    server, first, second = pair.server(*recipe), pair.held_client("store-1", *holding), pair.client("store-2")
    server.wait_for("round_finished", round=1)
    first.wait_for("held", round=2)
    assert not server.has("round_finished", round=2)
    for process in (server, first, second):
        process.kill()

    server, clients = pair.server(*recipe), pair.clients()
    assert server.wait_for("run_started")["first_round"] == 2
    assert_as_if_nothing_had_been(pair, ended=server, recipe=recipe)
    assert {name: client.end() for name, client in clients.items()} == dict.fromkeys(pair.names, 0)


@pytest.mark.parametrize("seed", [11, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(12, 30))])
def test_kill_9_of_everything_at_any_time_changes_nothing(pair: Site, seed: int) -> None:
    chance = random.Random(seed)
    # What is waited for, and how long after it the blow falls (in seconds): anywhere in joining, training,
    # aggregation, evaluation, checkpoint. The last round is held, or a quick machine would be done before that.
    for kind in ("client_joined", "round_started", "round_started"):
        server, held, other = pair.server(*RECIPE), pair.held_client("store-1", "hold@4"), pair.client("store-2")
        server.wait_for(kind)
        _after(chance.uniform(0.0, 0.6), server, held, other)
    server = pair.server(*RECIPE)
    pair.clients()
    assert_as_if_nothing_had_been(pair, ended=server)


def _after(seconds: float, *processes: Process) -> None:
    """kill -9 of all `processes`, the first of them `seconds` from now."""
    time.sleep(seconds)
    for process in processes:
        process.kill()


def test_a_server_killed_while_stores_compare_goes_on_with_that(pair: Site) -> None:
    recipe = (*RECIPE, "--personalize", "finetune")
    server, other = pair.server(*recipe), pair.client("store-2")
    held = pair.held_client("store-1", "hold-comparison@4")
    held.wait_for("held", round=4)
    server.wait_for("comparison_received", client="store-2", reason="")
    server.kill()

    pair.release(4)
    server = pair.server(*recipe)
    assert server.wait_for("run_started")["first_round"] == 5
    assert_as_if_nothing_had_been(pair, ended=server, recipe=recipe)
    found = pair.show(pair.only_run())["stores"]
    assert found == pair.show(pair.root / "uninterrupted")["stores"]
    assert [store["client"] for store in found] == pair.names
    assert [client.end() for client in (held, other)] == [0, 0]
