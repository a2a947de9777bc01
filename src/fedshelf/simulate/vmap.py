"""Trains many simulated clients in one computation.

Each client runs the same code as elsewhere. When that code reaches local training, it is suspended; once all clients of
a chunk are suspended, they are trained together (`training.stack`), and each resumes with its own result. Algorithms
therefore do not need to know about this, whatever they do before and after training and however often they train.
"""

import logging
from collections import deque
from dataclasses import replace
from functools import partial

from fedshelf.core.errors import FedShelfError
from fedshelf.core.messages import Broadcast, ClientMessage, Purpose, ServerMessage, Setup
from fedshelf.rounds.client import Work
from fedshelf.simulate.client_runner import ClientRunner
from fedshelf.simulate.lockstep import Lockstep
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.loop import Run
from fedshelf.training.stack import Stack, default_count
from fedshelf.training.stack_check import find_problem

logger = logging.getLogger(__name__)


class VmapBackend:
    """A backend that trains the clients of a round in chunks, each chunk in one computation.

    If the model cannot be trained this way, it logs the reason once and runs one client at a time.

    Args:
        runner: runs messages that do not train, and clients that cannot be grouped.
        chunk: maximum number of clients trained together; None derives it from the model's size.
        warn: log why a model cannot be trained this way; enough for one of several processes.
    """

    def __init__(self, runner: ClientRunner, *, chunk: int | None = None, warn: bool = True) -> None:
        self._runner = runner
        self._warn = warn
        self._chunk = chunk
        self._setup: Setup | None = None
        self._stack: Stack | None = None
        self._problem: str | None = None
        self._queue: deque[tuple[str, ServerMessage]] = deque()
        self._answers: deque[tuple[str, ClientMessage]] = deque()

    def submit(self, name: str, message: ServerMessage) -> None:
        """See `Backend`."""
        if isinstance(message, Setup):
            self.prepare(message)
        self._queue.append((name, message))

    def prepare(self, setup: Setup) -> None:
        """Set the current setup."""
        if setup != self._setup:
            self._setup, self._stack, self._problem = setup, None, None

    def next(self) -> tuple[str, ClientMessage] | None:
        """See `Backend`."""
        if not self._answers and self._queue:
            self._work()
        return self._answers.popleft() if self._answers else None

    def _work(self) -> None:
        """Answer the queue's first message together with the following ones that can be trained with it."""
        stack = self._stack_for(self._queue[0][1])
        tasks = [self._queue.popleft()]
        if stack is None:
            ((name, message),) = tasks
            self._answers.append((name, self._runner.run(name, message)))
            return
        while self._queue and len(tasks) < len(stack.bound_models) and is_training(self._queue[0][1]):
            tasks.append(self._queue.popleft())
        rounds = [
            partial(_run_on, self._runner, name, message, bound)
            for (name, message), bound in zip(tasks, stack.bound_models, strict=False)
        ]
        answers = Lockstep(stack.train).run(rounds)
        self._answers.extend((name, answer) for (name, _), answer in zip(tasks, answers, strict=True))

    def _stack_for(self, message: ServerMessage) -> Stack | None:
        """Return the stack that trains the clients of this and the next messages; None to run the message alone."""
        if not is_training(message) or self._setup is None or self._problem is not None:
            return None
        if self._stack is None:
            try:
                opened = self._runner.open(self._setup)
            except FedShelfError:
                return None  # each client then reports the problem itself
            self._problem = find_problem(opened.bound_model, opened.config.image_size)
            if self._problem is not None:
                logger.log(
                    logging.WARNING if self._warn else logging.DEBUG,
                    "the vmap engine cannot compute this model: %s. Clients are trained one after the other",
                    self._problem,
                )
                return None
            self._stack = Stack(opened.bound_model, self._chunk or default_count(opened.bound_model))
        return self._stack


def is_training(message: ServerMessage) -> bool:
    """Whether a client that receives `message` trains."""
    return isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN


def _run_on(runner: ClientRunner, name: str, message: ServerMessage, bound: BoundModel, run: Run) -> ClientMessage:
    """Return a client's answer, training on `bound` with `run`."""

    def adapt(work: Work) -> Work:
        return replace(work, trainer=replace(work.trainer, bound_model=bound, run=run))

    return runner.run(name, message, adapt=adapt)
