"""What is written down of how a run ended, and of how a client left."""

import pytest

from fedshelf.core.errors import WorkerLostError
from fedshelf.core.events import ClientLeft, RunEnded, RunStarted, RunStatus
from fedshelf.core.messages import Broadcast, ServerMessage
from fedshelf.core.ports import Left
from tests.fakes import Answer
from tests.worlds import World


class Raising:
    """Raises when the first task is handed out, and may ask the server to stop before."""

    def __init__(self, world: World, error: BaseException, *, stop: bool = False) -> None:
        self.world, self.error, self.stop = world, error, stop

    def __call__(self, message: ServerMessage, honest: Answer) -> Answer:
        if not isinstance(message, Broadcast):
            return honest
        if self.stop:
            self.world.stop.set()
        raise self.error


def ending(world: World) -> RunEnded:
    (ended,) = world.sink.of(RunEnded)
    return ended


def test_a_failure_of_our_own_making_is_written_down_and_clients_hear_no_details() -> None:
    world = World()
    world.tampers["b"] = Raising(world, KeyError("/srv/secret"))
    with pytest.raises(KeyError):
        world.run()
    assert ending(world) == RunEnded(status=RunStatus.FAILED, reason="KeyError: '/srv/secret'")
    assert world.transport.closed == "the run failed: an error inside the server"


@pytest.mark.parametrize("stop", [True, False])
def test_a_worker_that_is_asked_to_stop_with_its_parent_is_no_failure(stop: bool) -> None:
    world = World()
    world.tampers["b"] = Raising(world, WorkerLostError("a worker process was ended by SIGTERM"), stop=stop)
    if stop:
        assert world.run() is RunStatus.STOPPED
        assert ending(world) == RunEnded(status=RunStatus.STOPPED, reason="stopped on request")
        return
    with pytest.raises(WorkerLostError):
        world.run()
    assert ending(world) == RunEnded(status=RunStatus.FAILED, reason="a worker process was ended by SIGTERM")


def test_a_run_that_a_second_ctrl_c_ends_says_so() -> None:
    world = World()
    world.tampers["b"] = Raising(world, KeyboardInterrupt(), stop=True)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert ending(world) == RunEnded(status=RunStatus.STOPPED, reason="stopped at once on request")
    assert world.transport.closed is None, "clients wait for the server to come back"


@pytest.mark.parametrize(
    ("left", "said", "absent"),
    [
        (Left(address="line-to-c", signed_off=True), "signed off", "signed off"),
        (Left(address="line-to-c"), "no sign of life", "not connected"),
    ],
)
def test_a_client_that_signs_off_is_told_from_one_that_falls_silent(left: Left, said: str, absent: str) -> None:
    world = World(names=("a", "b", "c"), rounds={"quorum": 2})

    def leave(message: ServerMessage, honest: Answer) -> Answer:
        if not isinstance(message, Broadcast):
            return honest
        world.transport.arrive(left)
        return None

    world.tampers["c"] = leave
    world.run()
    assert [(event.client, event.reason) for event in world.sink.of(ClientLeft)] == [("c", said)]
    assert [m.reason for m in world.finished[0].clients if m.client == "c"] == [absent]


def test_only_a_new_run_needs_the_clients_of_its_start() -> None:
    world = World(names=("a", "b"), num_rounds=1, plan={"start_clients": 2})
    world.run()
    world.restart()
    world.run_connected(num_rounds=2)
    assert [(event.first_round, event.min_clients) for event in world.sink.of(RunStarted)] == [(1, 2), (2, 0)]
