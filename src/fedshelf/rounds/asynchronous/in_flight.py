"""Tasks in flight in asynchronous rounds: dispatching, resending and dropping them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fedshelf.core.messages import PARAMS, Broadcast, Failure, Purpose, TaskKey, Upload, auxiliary_vectors
from fedshelf.core.ports import Reply
from fedshelf.core.state import InFlight, ServerState
from fedshelf.rounds.plan import Context


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DispatchedTask:
    """A task that was sent to a client.

    Attributes:
        broadcast: the message sent.
        deadline: until when the reply counts, in seconds of the timer.
    """

    broadcast: Broadcast
    deadline: float

    @property
    def trains(self) -> bool:
        """Whether the task ends in an upload."""
        return self.broadcast.purpose is Purpose.TRAIN


@dataclass(kw_only=True, eq=False)
class TasksInFlight:
    """The tasks in flight, at most one per client.

    Attributes:
        context: the run's shared objects.
        model_at: returns the model [S] after a number of versions, as clients had it; None if it is lost.
        bytes_down: payload sent since it was last set to zero.
    """

    context: Context
    model_at: Callable[[int, ServerState], Tensor | None]
    bytes_down: int = 0
    _out: dict[str, DispatchedTask] = field(default_factory=dict, init=False)
    _left: dict[str, DispatchedTask] = field(
        default_factory=dict, init=False
    )  # of disconnected clients, until they return
    _lost: dict[str, InFlight] = field(default_factory=dict, init=False)  # the same, from before a server restart

    def __contains__(self, name: str) -> bool:
        return name in self._out

    def __len__(self) -> int:
        return len(self._out)

    def names(self) -> tuple[str, ...]:
        """Names of the clients at work, sorted."""
        return tuple(sorted(self._out))

    def any_evaluates(self) -> bool:
        """Whether any client is evaluating the model."""
        return bool(self.evaluating())

    def evaluating(self) -> frozenset[str]:
        """Names of the clients that are evaluating the model."""
        return frozenset(name for name, dispatched in self._out.items() if not dispatched.trains)

    def resume(self, state: ServerState) -> None:
        """Load the tasks that were in flight when `state` was saved; `resend_lost` sends them again."""
        self._lost = {dispatched.client: dispatched for dispatched in state.in_flight if dispatched.wanted}

    def forget_lost(self, names: Iterable[str]) -> None:
        """Forget lost tasks of clients whose reply a previous server process has received.

        Sent again, they would repeat work that is already counted.
        """
        for name in names:
            self._lost.pop(name, None)

    def resend_lost(self, name: str, state: ServerState, counted: TaskKey | None) -> None:
        """Resend the task that a returning client had before it or the server stopped.

        Args:
            name: the client.
            state: the server's current state.
            counted: the client's newest counted upload.
        """
        if name in self._out:
            return
        left = self._left.pop(name, None)
        if left is not None and left.trains and self.context.timer.now() < left.deadline:
            self._hand_out(name, left.broadcast)
            return
        lost = self._lost.pop(name, None)
        params = None if lost is None else self.model_at(lost.key.round - 1, state)
        if lost is not None and params is not None:
            self._hand_out(name, self._training(lost.key, state, params, counted))

    def send_training(self, name: str, key: TaskKey, state: ServerState, counted: TaskKey | None) -> None:
        """Dispatch training of the current model.

        Args:
            name: the client.
            key: the task.
            state: the server's current state.
            counted: the client's newest counted upload.
        """
        self._hand_out(name, self._training(key, state, state.model.published, counted))

    def send_evaluation(self, name: str, state: ServerState) -> None:
        """Dispatch an evaluation of the current model."""
        key = TaskKey(run_id=self.context.plan.run_id, round=state.round, attempt=0)
        vectors = {PARAMS: state.model.published}
        self._hand_out(name, Broadcast(key=key, purpose=Purpose.EVALUATE, client_lr=0.0, vectors=vectors))

    def resend(self, name: str) -> None:
        """Resend the task of a client that has reconnected and lost it."""
        if name in self._out:
            self._hand_out(name, self._out[name].broadcast)

    def complete(self, reply: Reply) -> DispatchedTask | None:
        """Remove and return the task that `reply` ends; None if it answers no task in flight."""
        dispatched = self._out.get(reply.client)
        if dispatched is None or reply.task not in (dispatched.broadcast.key, None):
            return None
        if not dispatched.trains and isinstance(reply.message, Upload):
            return None  # a duplicate: the task that made a version shares its key with that version's evaluation
        del self._out[reply.client]
        address = self.context.membership.address(reply.client)
        if address is not None:  # a client that replies holds the model that it was sent
            failed = reply.message is None or isinstance(reply.message, Failure)
            self.context.downloads.confirm(address, failed=failed)
        return dispatched

    def drop_overdue(self) -> dict[str, bool]:
        """Drop tasks of clients that are gone or overdue.

        Returns:
            By client, whether it is gone (True) or overdue (False).
        """
        members, now = self.context.membership, self.context.timer.now()
        gone = {name for name in self._out if members.address(name) is None and name not in members.returning()}
        given_up = {
            n: n in gone for n, dispatched in sorted(self._out.items()) if n in gone or now >= dispatched.deadline
        }
        for name in given_up:
            dispatched = self._out.pop(name)
            if name in gone and self.context.ports.virtual is None:  # a simulated client has lost its task
                self._left[name] = dispatched
        return given_up

    def in_flight(self) -> tuple[InFlight, ...]:
        """The training tasks in flight, to be saved."""
        dispatched_tasks = {**self._left, **self._out}
        trains = {
            n: InFlight(client=n, key=dispatched.broadcast.key)
            for n, dispatched in dispatched_tasks.items()
            if dispatched.trains
        }
        known = {**self._lost, **trains}
        return tuple(known[name] for name in sorted(known))

    def _training(self, key: TaskKey, state: ServerState, params: Tensor, counted: TaskKey | None) -> Broadcast:
        """A training task. A task that is sent again keeps its learning rate."""
        context = self.context
        added = context.algorithm.broadcast(state.model, context.model.layout.num_trainable)
        return Broadcast(
            key=key, purpose=Purpose.TRAIN, client_lr=context.plan.client_lr(key.round), counted=counted,
            vectors={PARAMS: params, **auxiliary_vectors(added)},
        )  # fmt: skip

    def _hand_out(self, name: str, broadcast: Broadcast) -> None:
        context, members = self.context, self.context.membership
        deadline = context.timer.now() + context.plan.rounds.timeout
        self._out[name] = DispatchedTask(broadcast=broadcast, deadline=deadline)
        address = members.address(name)
        if address is not None:
            message = context.downloads.message(address, broadcast, held_at_join=members.holds(name))
            self.bytes_down += context.ports.transport.send(address, message)
