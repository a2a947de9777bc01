"""kill -9 of a real server and of real clients in each stage of masked rounds: the run ends complete, and no two sums
of a round that stores have helped to open tell what fewer than the minimum cohort sent.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS
from tests.processes import PATIENCE, Process, Site, _site, draw_stores, same_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
STAGES = ("keys", "shares", "train", "survivors", "unmasking")


@pytest.fixture(scope="module")
def five_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_stores(tmp_path_factory.mktemp("photos") / "stores", num_stores=5, photos=4)


@pytest.fixture
def chain(tmp_path: Path, five_stores: Path, pytestconfig: pytest.Config) -> Iterator[Site]:
    """A machine with five stores, four of which open a sum; its processes are forked, also in the long form."""
    for site in _site(tmp_path, five_stores, pytestconfig):
        site.fresh = False
        yield site


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, five_stores: Path) -> Path:
    """The same rounds in a simulation, without masks and without faults."""
    site = Site(tmp_path_factory.mktemp("undisturbed"), five_stores)
    run = site.root / "plain"
    site.simulate(*recipe(len(STAGES)), "--codec-up", "modular:32", run_dir=run)
    return run


def recipe(num_rounds: int) -> tuple[str, ...]:
    return ("--rounds", str(num_rounds), "--no-compare", "--norm", "group", "--val-fraction", "0")


def server_of(site: Site) -> Process:
    return site.server(
        *recipe(len(STAGES)), "--secagg", "--run-dir", str(site.root / "run"), "--round-timeout", "60",
    )  # fmt: skip


def hold(stage: str, *, after: bool) -> str:
    return ("hold" if stage == "train" else f"hold-{stage}") + ("-answer" if after else "")


def opened_sums(site: Site) -> dict[tuple[int, bool], set[frozenset[str]]]:
    """By round, and whether it is evaluations that were summed, the members of all sums that any store has recorded as
    opened."""
    found: dict[tuple[int, bool], set[frozenset[str]]] = {}
    for path in (site.root / "home" / "clients").glob("*/opened-sums.jsonl"):
        for [opened] in map(json.loads, path.read_text().splitlines()):
            is_evaluation = opened.get("purpose", "train") != "train"
            found.setdefault((opened["key"]["round"], is_evaluation), set()).add(frozenset(opened["members"]))
    return found


def assert_complete(site: Site, server: Process, undisturbed: Path) -> None:
    """The run is complete, right, and has told no more than sums."""
    assert server.end() == 0, server.text()
    summary = site.show(site.root / "run")
    assert summary["status"] == "finished"
    assert [round_["round"] for round_ in summary["rounds"]] == list(range(1, len(STAGES) + 1))
    sums, all_counted = opened_sums(site), True
    for round_ in summary["rounds"]:
        told = {client["client"]: client for client in round_["clients"]}
        counted = frozenset(name for name, client in told.items() if client["status"] == "counted")
        assert len(counted) >= LEAST_MEMBERS
        assert all(client["reason"] for client in told.values() if client["status"] != "counted")
        assert counted in sums[round_["round"], False], "the round counts the stores whose sum was opened"
        for sets in (sums[round_["round"], False], sums.get((round_["round"], True), set())):
            for one in sets:
                assert all(one == other or len(one ^ other) >= LEAST_MEMBERS for other in sets), sets
        all_counted = all_counted and counted == frozenset(site.names)
    if all_counted:
        assert same_model(site.root / "run", undisturbed)


@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_server_killed_in_each_stage_completes_or_redoes_the_round(
    chain: Site, undisturbed: Path, after: bool
) -> None:
    first, *others = chain.names
    orders = [f"{hold(stage, after=after)}@{number}" for number, stage in enumerate(STAGES, start=1)]
    server, held = server_of(chain), chain.held_client(first, *orders)
    clients = [held, *(chain.client(name) for name in others)]
    for number in range(1, len(STAGES) + 1):
        held.wait_for("held", round=number)
        server.kill()
        chain.release(number)
        server = server_of(chain)
    assert_complete(chain, server, undisturbed)
    assert [client.end() for client in clients] == [0] * len(clients)
    assert all(len(sets) == 1 for sets in opened_sums(chain).values()), "all stores were there all the time"
    assert same_model(chain.root / "run", undisturbed)


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_client_killed_in_each_stage_is_left_out_or_counted_and_comes_back(
    chain: Site, undisturbed: Path, after: bool
) -> None:
    first, last, *others = chain.names
    orders = [f"{hold(stage, after=after)}@{number}" for number, stage in enumerate(STAGES, start=1)]
    server, held = server_of(chain), chain.held_client(first, *orders)
    (pace := chain.root / "pace").mkdir()
    told = [part for number in range(1, len(STAGES)) for part in ("--do", f"hold-unmasking-answer@{number}")]
    # Four of five reveal their shares: without this one, the round stays open until the killed one is back.
    clients = [chain.odd_client(last, *told, "--until", str(pace)), *map(chain.client, others)]
    for number in range(1, len(STAGES) + 1):
        held.wait_for("held", round=number)
        held.kill()
        held = chain.held_client(first, *orders[number:])
        if number < len(STAGES):
            wait_until_joined(server, first, times=number + 1)
            (pace / str(number)).touch()
    assert_complete(chain, server, undisturbed)
    assert [client.end() for client in clients] == [0] * len(clients)
    for round_ in chain.show(chain.root / "run")["rounds"]:
        stage = STAGES[round_["round"] - 1]
        status = next(client["status"] for client in round_["clients"] if client["client"] == first)
        assert (status == "counted") == (stage in ("survivors", "unmasking")), stage


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 101))
def test_any_schedule_of_kills_ends_with_a_complete_run(chain: Site, undisturbed: Path, seed: int) -> None:
    """In each of the first rounds, a store is held in some stage, and some processes are killed then or soon after."""
    chance = random.Random(seed)
    names = chain.names
    numbers = range(1, len(STAGES))  # the last round ends undisturbed
    plans = {
        number: (chance.choice(names), hold(chance.choice(STAGES), after=chance.random() < 0.5)) for number in numbers
    }

    def start(name: str, first: int) -> Process:
        orders = [f"{what}@{number}" for number, (held, what) in plans.items() if held == name and number >= first]
        return chain.held_client(name, *orders)

    server = server_of(chain)
    clients = {name: start(name, 1) for name in names}
    for number, (name, _) in plans.items():
        wait_until_held(clients[name], server, number)
        victims = chance.sample([*names, "server"], chance.choice((1, 1, 2, 3)))
        if chance.random() < 0.5:
            chain.release(number)
        for victim in victims:
            _sleep(chance)
            (server if victim == "server" else clients[victim]).kill()
        chain.release(number)
        for victim in chance.sample(victims, len(victims)):
            _sleep(chance)
            if victim == "server":
                server = server_of(chain)
            else:
                clients[victim] = start(victim, number + 1)
    assert_complete(chain, server, undisturbed)
    assert [client.end() for client in clients.values()] == [0] * len(clients)


def wait_until_joined(server: Process, name: str, *, times: int) -> None:
    def num_joins() -> int:
        return sum(event["event"] == "client_joined" and event["client"] == name for event in list(server.events))

    wait_until(lambda: num_joins() == times, server)


def wait_until_held(client: Process, server: Process, number: int) -> None:
    """Wait until a store holds a round, or that is over: the store was not there when it began."""
    wait_until(lambda: client.has("held", round=number) or server.has("round_finished", round=number), server)


def wait_until(is_so: Callable[[], bool], server: Process) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, server.text()
        assert server.running(), server.text()
        time.sleep(0.01)


def _sleep(chance: random.Random, choices: Sequence[float] = (0.0, 0.0, 0.02, 0.1, 0.4)) -> None:
    time.sleep(chance.choice(choices))
