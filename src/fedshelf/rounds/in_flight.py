"""Tasks that are out, in asynchronous rounds: handed out, sent again, given up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fedshelf.core.messages import PARAMS, Broadcast, Failure, Purpose, TaskKey, Upload, auxiliary_vectors
from fedshelf.core.ports import Reply
from fedshelf.core.state import InFlight, ServerState
from fedshelf.rounds.plan import Context


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DispatchedTask:
    """What a client was sent, and until when its answer counts (seconds of the timer)."""

    broadcast: Broadcast
    deadline: float

    @property
    def trains(self) -> bool:
        """Whether it is to end in an upload."""
        return self.broadcast.purpose is Purpose.TRAIN


@dataclass(kw_only=True, eq=False)
class TasksInFlight:
    """One task for each client at most.

    Attributes:
        model_at: the model [S] after so many versions, as clients had it; None where it is lost.
        bytes_down: what was sent since somebody set it to zero.
    """

    context: Context
    model_at: Callable[[int, ServerState], Tensor | None]
    bytes_down: int = 0
    _out: dict[str, DispatchedTask] = field(default_factory=dict, init=False)
    _left: dict[str, DispatchedTask] = field(
        default_factory=dict, init=False
    )  # of clients that have gone, until they are back
    _lost: dict[str, InFlight] = field(default_factory=dict, init=False)  # the same, of a server before this one

    def __contains__(self, name: str) -> bool:
        return name in self._out

    def __len__(self) -> int:
        return len(self._out)

    def names(self) -> tuple[str, ...]:
        """Who is at work, sorted."""
        return tuple(sorted(self._out))

    def any_evaluates(self) -> bool:
        """Whether somebody is asked how the model does."""
        return any(not dispatched.trains for dispatched in self._out.values())

    def resume(self, state: ServerState) -> None:
        """What was out when `state` was saved is lost until `resend_lost`."""
        self._lost = {dispatched.client: dispatched for dispatched in state.in_flight if dispatched.wanted}

    def forget_lost(self, names: Iterable[str]) -> None:
        """What was out at `names` is over: a server before this one has had answers of theirs since. Asked again, they
        would do it once more, on what is counted of it already."""
        for name in names:
            self._lost.pop(name, None)

    def resend_lost(self, name: str, state: ServerState, counted: TaskKey | None) -> None:
        """Ask a client that is back for what it was at when it went, or when a server before this one stopped."""
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
        """Let a client train from the present model."""
        self._hand_out(name, self._training(key, state, state.model, counted))

    def send_evaluation(self, name: str, state: ServerState) -> None:
        """Let a client evaluate the present model."""
        key = TaskKey(run_id=self.context.plan.run_id, round=state.round, attempt=0)
        self._hand_out(name, Broadcast(key=key, purpose=Purpose.EVALUATE, client_lr=0.0, vectors={PARAMS: state.model}))

    def resend(self, name: str) -> None:
        """A client has come back: what it was sent before is lost."""
        if name in self._out:
            self._hand_out(name, self._out[name].broadcast)

    def complete(self, reply: Reply) -> DispatchedTask | None:
        """The flight that `reply` ends; None if it answers nothing that is out."""
        dispatched = self._out.get(reply.client)
        if dispatched is None or reply.task not in (dispatched.broadcast.key, None):
            return None
        if not dispatched.trains and isinstance(reply.message, Upload):
            return None  # once more: the task that made a version has the key of an evaluation of that version
        del self._out[reply.client]
        address = self.context.membership.address(reply.client)
        if address is not None:  # whoever has answered holds the model that it was sent
            failed = reply.message is None or isinstance(reply.message, Failure)
            self.context.downloads.confirm(address, failed=failed)
        return dispatched

    def drop_overdue(self) -> dict[str, bool]:
        """Wait no more for clients that have gone (True) or take too long (False)."""
        members, now = self.context.membership, self.context.timer.now()
        gone = {name for name in self._out if members.address(name) is None and name not in members.returning()}
        given_up = {
            n: n in gone for n, dispatched in sorted(self._out.items()) if n in gone or now >= dispatched.deadline
        }
        for name in given_up:
            dispatched = self._out.pop(name)
            if name in gone and self.context.ports.virtual is None:  # a simulated one has lost what it was at
                self._left[name] = dispatched
        return given_up

    def in_flight(self) -> tuple[InFlight, ...]:
        """The training that is out, to be written down."""
        dispatched_tasks = {**self._left, **self._out}
        trains = {
            n: InFlight(client=n, key=dispatched.broadcast.key)
            for n, dispatched in dispatched_tasks.items()
            if dispatched.trains
        }
        known = {**self._lost, **trains}
        return tuple(known[name] for name in sorted(known))

    def _training(self, key: TaskKey, state: ServerState, params: Tensor, counted: TaskKey | None) -> Broadcast:
        """A task that is sent again keeps the learning rate that it had."""
        context = self.context
        added = context.algorithm.broadcast(state, context.model.layout.num_trainable)
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
            message = context.downloads.message(address, broadcast, came_with=members.holds(name))
            self.bytes_down += context.ports.transport.send(address, message)
