"""A server killed anywhere, started again on what it had saved, ends with the model of a run that was never killed.

"Anywhere" is each call of a port that lasts: every event, every save, before it and after it. The clients' algorithm
remembers what was counted, so that an upload folded twice or a state lost shows in the final model.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientStatus, RoundFinished, RoundStarted, RunStatus
from fedshelf.core.messages import Purpose, TaskKey
from tests.fakes import MemoryClientStates
from tests.worlds import Remembering, World, with_batch_norm


class Killed(BaseException):
    """The process is gone: no handler of the server may run on it."""


class Switch:
    """Counts the steps of a server and kills it at the chosen one."""

    def __init__(self) -> None:
        self.step = 0
        self.kill_at: int | None = None

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._tick()  # killed before it is done
            result = call(*args, **kwargs)
            self._tick()  # killed once it is done
            return result

        return wrapped

    def _tick(self) -> None:
        self.step += 1
        if self.kill_at is not None and self.step >= self.kill_at:
            self.kill_at = None
            raise Killed


def fragile(world: World) -> Switch:
    """Put a switch around everything that `world` saves."""
    switch = Switch()
    for port, names in (
        (world.sink, ("emit",)),
        (world.checkpoints, ("save", "save_open_round")),
        (world.spool, ("put", "clear")),
    ):
        for name in names:
            setattr(port, name, switch.around(getattr(port, name)))
    return switch


def fragile_world(**settings: Any) -> tuple[World, Switch]:
    world = World(num_rounds=3, algorithm=Remembering(), module=with_batch_norm, **settings)
    return world, fragile(world)


def run_with_kills(world: World, switch: Switch, kills: list[int], *, restart_clients: bool) -> RunStatus:
    """Run to the end, killed after so many steps of each life in turn."""
    world.connect_all()
    for kill_after in kills:
        switch.kill_at = switch.step + kill_after
        try:
            return world.server().run()
        except Killed:
            if restart_clients:
                world.clients = {name: world.client(name) for name in world.names}
            world.restart()
    switch.kill_at = None
    return world.server().run()


@pytest.fixture(scope="module")
def uninterrupted() -> World:
    world, _ = fragile_world()
    world.run()
    return world


def assert_the_same(world: World, uninterrupted: World) -> None:
    assert torch.equal(world.final, uninterrupted.final)
    assert world.checkpoints.states[-1].counted == uninterrupted.checkpoints.states[-1].counted
    last = {record.round: record for record in world.finished}
    for record in uninterrupted.finished:
        assert last[record.round].accuracy == record.accuracy
        assert last[record.round].train_loss == record.train_loss
        assert last[record.round].best_round == record.best_round
        assert [m.status for m in last[record.round].clients] == [ClientStatus.COUNTED] * 3


@pytest.mark.parametrize("restart_clients", [False, True])
def test_a_server_killed_at_any_one_step_ends_with_the_same_model(uninterrupted: World, restart_clients: bool) -> None:
    world, switch = fragile_world()
    world.run()
    steps = switch.step
    assert steps > 60
    for kill_after in range(1, steps + 1):
        world, switch = fragile_world()
        run_with_kills(world, switch, [kill_after], restart_clients=restart_clients)
        assert_the_same(world, uninterrupted)


@settings(max_examples=25)
@given(kills=st.lists(st.integers(1, 60), max_size=6), restart_clients=st.booleans())
def test_a_server_killed_again_and_again_ends_with_the_same_model(
    uninterrupted: World, kills: list[int], restart_clients: bool
) -> None:
    world, switch = fragile_world()
    assert run_with_kills(world, switch, kills, restart_clients=restart_clients) is RunStatus.FINISHED
    assert_the_same(world, uninterrupted)


def test_a_restarted_server_asks_with_the_same_key_and_clients_do_not_train_twice() -> None:
    world, _ = fragile_world()
    trained: list[tuple[str, TaskKey]] = []

    class Counting(MemoryClientStates):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def stage(self, key: TaskKey, *rest: Any) -> None:
            trained.append((self.name, key))
            super().stage(key, *rest)

    world.states = {name: Counting(name) for name in world.names}
    world.clients = {name: world.client(name) for name in world.names}
    world.delays["c"] = 5.0
    emit = world.sink.emit

    def kill_once(event: Any) -> None:
        emit(event)
        if getattr(event, "client", "") == "b" and getattr(event, "num_done", 0) == 2:
            world.sink.emit = emit  # type: ignore[method-assign]
            raise Killed

    world.sink.emit = kill_once  # type: ignore[method-assign]
    world.connect_all()
    with pytest.raises(Killed):
        world.server().run()
    before = world.transport.broadcasts("line-to-c")
    world.restart()
    world.server().run()
    after = [m for m in world.transport.broadcasts("line-to-c") if m.purpose is Purpose.TRAIN]
    assert after[0].key == before[0].key
    assert len(trained) == len(set(trained)) == 9, "three clients in three rounds, nobody twice"
    again = [m.key for m in world.transport.broadcasts("line-to-a") if m.purpose is Purpose.TRAIN]
    assert before[0].key not in again, "what was spooled is not asked for again"
    assert [e.cohort for e in world.sink.of(RoundStarted)][:2] == [("a", "b", "c")] * 2


def test_a_round_that_was_recorded_but_not_saved_is_recorded_again_the_same() -> None:
    world, _ = fragile_world()
    save = world.checkpoints.save

    def killed_before_saving(*args: Any, **kwargs: Any) -> None:
        world.checkpoints.save = save  # type: ignore[method-assign]
        raise Killed

    world.checkpoints.save = killed_before_saving  # type: ignore[method-assign]
    world.connect_all()
    with pytest.raises(Killed):
        world.server().run()
    assert [r.round for r in world.sink.of(RoundFinished)] == [1]
    world.restart()
    world.server().run()
    first, again = [r for r in world.sink.of(RoundFinished) if r.round == 1]
    assert (first.accuracy, first.train_loss, first.attempt) == (again.accuracy, again.train_loss, again.attempt)


def test_a_member_that_does_not_come_back_after_a_restart_is_offline_after_the_grace() -> None:
    world, _ = fragile_world(rounds={"rejoin_grace": 20.0, "timeout": 500.0, "quorum": 2})
    world.tampers["c"] = lambda message, honest: None if getattr(message, "key", None) else honest
    world.delays["b"] = 3.0
    emit = world.sink.emit

    def kill_once(event: Any) -> None:
        emit(event)
        if getattr(event, "num_done", 0) == 1:
            world.sink.emit = emit  # type: ignore[method-assign]
            raise Killed

    world.sink.emit = kill_once  # type: ignore[method-assign]
    world.connect_all()
    with pytest.raises(Killed):
        world.server().run()
    world.names = ("a", "b")  # c does not come back
    world.restart()
    started = world.clock.now()
    world.names = ("a", "b", "c")
    world.server().run()
    record = next(r for r in world.finished if r.round == 1)
    (lost,) = [m for m in record.clients if m.client == "c"]
    assert (lost.status, lost.reason) == (ClientStatus.OFFLINE, "not connected")
    assert 20 <= record.seconds < 60, "the grace is waited for, the deadline is not"
    assert world.clock.now() - started < 100


def test_a_failed_run_can_be_started_again() -> None:
    world, _ = fragile_world(rounds={"quorum": 3, "timeout": 5.0})
    world.tampers["a"] = lambda message, honest: None if getattr(message, "key", None) else honest
    with pytest.raises(RunError, match="10 times in a row"):
        world.run()
    world.tampers.clear()
    world.restart()
    assert world.server().run() is RunStatus.FINISHED
    assert [r.round for r in world.finished] == [1, 2, 3]
