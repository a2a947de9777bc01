"""The client's side of the federation, top to bottom: what a store answers to each message."""

from collections.abc import Callable
from dataclasses import dataclass

from fedshelf.algorithms.base import Algorithm
from fedshelf.core.errors import FedShelfError
from fedshelf.core.messages import (
    Broadcast,
    ClientMessage,
    Evaluation,
    Failure,
    Purpose,
    Ready,
    ServerMessage,
    Setup,
)
from fedshelf.core.ports import ClientStates
from fedshelf.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What a `Setup` becomes at a client: its half of the algorithm, its photos on a workbench, and the answer."""

    algorithm: Algorithm
    trainer: Trainer
    ready: Ready


class Client:
    """Answers the server's messages, one at a time.

    Args:
        prepare: builds the work that a setup asks for.
        states: what this client keeps between rounds.
    """

    def __init__(self, *, prepare: Callable[[Setup], Work], states: ClientStates) -> None:
        self._prepare = prepare
        self._states = states
        self._setup: Setup | None = None
        self._work: Work | None = None

    def handle(self, message: ServerMessage) -> ClientMessage:
        """Do what `message` asks and return the one answer to it. Expected failures are answers, too."""
        key = message.key if isinstance(message, Broadcast) else None
        try:
            return self._set_up(message) if isinstance(message, Setup) else self._take_part(message)
        except FedShelfError as error:
            return Failure(key=key, reason=str(error))

    def _set_up(self, setup: Setup) -> Ready:
        if self._work is None or setup != self._setup:
            self._work, self._setup = self._prepare(setup), setup
        return self._work.ready

    def _take_part(self, broadcast: Broadcast) -> ClientMessage:
        if self._work is None or broadcast.key.run_id != self._work.ready.run_id:
            return Failure(key=broadcast.key, reason=f"run {broadcast.key.run_id} was never set up at this client")
        work = self._work
        if broadcast.purpose is Purpose.EVALUATE:
            work.trainer.workbench.load(broadcast.params)
            score = work.trainer.evaluate()
            return Evaluation(
                key=broadcast.key, num_examples=score.num_examples, num_correct=score.num_correct,
                loss_sum=score.loss_sum,
            )  # fmt: skip
        state = self._states.settle(broadcast)  # what the last counted round changed now holds; the rest never was
        answered = self._states.answered(broadcast.key)
        if answered is not None:
            return answered  # a restarted server asks again, and gets the same bytes
        upload, next_state = work.algorithm.client_round(broadcast, state, work.trainer)
        self._states.hold(broadcast.key, upload, next_state)
        return upload
