"""Worker processes that run clients.

Tensors are in shared files, everything else goes through pipes. A model is written once for all clients. A worker
writes its answers to files of its own, and learns with its next task which of them it may reuse.

Work goes to the worker with the least of it, the longest tasks first, so that no worker is left with a long task at the
end. While there is plenty, workers have tasks queued, so that none waits for this process on a busy machine. The less
is left, the fewer tasks are queued (guided self-scheduling, Polychronopoulos & Kuck 1987).

A worker that has work but computes nothing for a minute is replaced: a fork copies locks of native libraries as they
are, and one that a thread held in this process is never released in the other. The tasks' results do not depend on it.

Shapes: S shared values of the model.
"""

import heapq
import logging
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from types import TracebackType
from typing import Any

from torch import Tensor

from fedshelf.core import process_exit
from fedshelf.core.errors import FedShelfError, WorkerLostError
from fedshelf.core.messages import ClientMessage, Ready, ServerMessage, Setup
from fedshelf.core.text import counted
from fedshelf.simulate.client_runner import ClientRunner
from fedshelf.simulate.ipc import pack, unpack
from fedshelf.simulate.processes import Processes, start_method
from fedshelf.simulate.shared import Mappings, Reference, SharedFiles, SharedFolders
from fedshelf.simulate.vmap import VmapBackend, is_training
from fedshelf.training.malloc import keep_freed_memory
from fedshelf.training.trainer import Score

HUNG_SECONDS = 60.0  # without computing, though there is work
IDLE_SECONDS = 0.02  # of CPU time, which the threads of a process that waits take
MOST_REPLACED = 3  # in one pool; after that, it is no accident
MOST_AHEAD = 8  # tasks queued at a worker besides the current one; their small parts fit into a pipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Open:
    """Build the setup's objects before the first task needs them. Has no answer."""

    setup: Setup
    states: Path | None
    models: Path | None


@dataclass(frozen=True, kw_only=True)
class _RunOne:
    name: str
    message: ServerMessage


@dataclass(frozen=True, kw_only=True)
class _RunTogether:
    """A worker's share of a round, trained in one computation. Answers come in the same order."""

    rounds: tuple[_RunOne, ...]


@dataclass(frozen=True, kw_only=True)
class _Evaluate:
    setup: Setup
    params: Tensor
    share: int
    shares: int


_Task = _Open | _RunOne | _RunTogether | _Evaluate


@dataclass(frozen=True, kw_only=True)
class _Crashed:
    trace: str


@dataclass(kw_only=True, eq=False)
class _Worker:
    """The parent's view of a worker.

    Attributes:
        number: the worker's number.
        connection: the parent's end of the pipe.
        tasks: unanswered tasks; they keep their models' files from being reused.
        released: files of the worker's answers that are no longer needed here.
        activity: see `Processes.activity`.
        active: when that last changed, or the worker was given a task, by `time.monotonic`.
    """

    number: int
    connection: Connection
    tasks: deque[_Task] = field(default_factory=deque)
    released: deque[tuple[str, int]] = field(default_factory=deque)
    activity: float = -1.0
    active: float = 0.0


class WorkerPool:
    """A backend over worker processes, which also share central evaluation.

    Args:
        runner: the client runner that each worker uses; here, it answers what needs no worker.
        num_workers: at least one.
        threads: training threads per client.
        together: train each worker's share of a round in one computation (see `simulate.vmap`).
    """

    def __init__(self, runner: ClientRunner, num_workers: int, *, threads: int, together: bool = False) -> None:
        self._runner = runner
        self.together = together
        self._round: list[_RunOne] = []  # to be trained together, until an answer is requested
        self._setup: Setup | None = None
        self._folders = SharedFolders()
        self._files = SharedFiles(self._folders.paths, "models")
        self._mappings = Mappings()
        self._sizes: dict[str, int] = {}  # number of training photos by client
        self._queue: list[tuple[int, int, _RunOne]] = []
        self._count = 0
        self._answers: deque[tuple[str, ClientMessage]] = deque()
        self._scores: dict[int, list[Score]] = {}  # of central evaluation, by share
        method = start_method(runner.device, threads=threads)
        self._processes = Processes(partial(_work, runner, self._folders.paths), num_workers, method)
        self._workers = [
            _Worker(number=number, connection=connection)
            for number, connection in enumerate(self._processes.connections)
        ]
        self._num_replaced = 0
        self._selector = DefaultSelector()
        for worker in self._workers:
            self._selector.register(worker.connection, EVENT_READ, worker)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        self._processes.close()
        self._folders.close()

    def submit(self, name: str, message: ServerMessage) -> None:
        """See `Backend`."""
        if isinstance(message, Setup):
            self._open(message)
            ready = self._runner.ready(name, message)
            if ready is not None:
                self._completed(name, ready)
                return
        run = _RunOne(name=name, message=message)
        if self.together and is_training(message):
            self._round.append(run)
            return
        self._count += 1
        heapq.heappush(self._queue, (-self._sizes.get(name, 0), self._count, run))
        self._hand_out()

    def next(self) -> tuple[str, ClientMessage] | None:
        """See `Backend`."""
        self._share_out()
        while not self._answers:
            if not any(worker.tasks for worker in self._workers):
                return None
            self._collect()
        return self._answers.popleft()

    def evaluate(self, setup: Setup, params: Tensor) -> list[Score]:
        """Evaluate `params` [S] on all test batches in contiguous shares.

        A worker's share is its next task; running clients continue (in rounds that do not wait for all of them).

        Returns:
            One score per batch.
        """
        self._open(setup)
        self._scores.clear()
        for share, worker in enumerate(self._workers):
            task = _Evaluate(setup=setup, params=params, share=share, shares=len(self._workers))
            worker.tasks.append(task)
            self._send(worker, task)
        while len(self._scores) < len(self._workers):
            self._collect()
        return [score for _, scores in sorted(self._scores.items()) for score in scores]

    def _collect(self) -> None:
        """Wait for an answer, receive all available ones, and assign more work."""
        while not (ready := self._selector.select(HUNG_SECONDS / 10)):
            for each in tuple(self._workers):
                self._replace_if_hung(each)
        for key, _ in ready:
            worker: _Worker = key.data
            answer = self._receive(worker)
            match worker.tasks.popleft():
                case _RunOne(name=name):
                    self._completed(name, answer)
                case _RunTogether(rounds=rounds):
                    for run, each in zip(rounds, answer, strict=True):
                        self._completed(run.name, each)
                case _Evaluate(share=share):
                    self._scores[share] = answer
        self._hand_out()

    def _replace_if_hung(self, worker: _Worker) -> None:
        activity, now = self._processes.activity(worker.number), time.monotonic()
        if not worker.tasks or abs(activity - worker.activity) > IDLE_SECONDS:
            worker.activity, worker.active = activity, now
        if now - worker.active < HUNG_SECONDS:
            return
        what = f"{self._process_of(worker)} has computed nothing for {HUNG_SECONDS:g} s"
        if self._num_replaced == MOST_REPLACED:
            raise WorkerLostError(f"{what}, like {counted(MOST_REPLACED, 'process', 'processes')} before it")
        self._num_replaced += 1
        logger.warning("%s: another process does its work. What it waits for is printed here", what)
        self._selector.unregister(worker.connection)
        new = _Worker(number=worker.number, connection=self._processes.replace(worker.number), tasks=worker.tasks)
        self._workers[worker.number] = new
        self._selector.register(new.connection, EVENT_READ, new)
        if self._setup is not None:
            self._send(new, self._open_task(self._setup))
        for task in new.tasks:
            self._send(new, task)

    def _open_task(self, setup: Setup) -> _Open:
        return _Open(setup=setup, states=self._runner.states, models=self._runner.models)

    def _open(self, setup: Setup) -> None:
        if setup != self._setup:
            self._setup = setup
            for worker in self._workers:
                self._send(worker, self._open_task(setup))

    def _completed(self, name: str, answer: ClientMessage) -> None:
        if isinstance(answer, Ready):
            self._sizes[name] = answer.num_train or 0
        self._answers.append((name, answer))

    def _hand_out(self) -> None:
        while self._queue:
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            ahead = min(MOST_AHEAD, len(self._queue) // (2 * len(self._workers)))
            if len(worker.tasks) > ahead:
                return
            task = heapq.heappop(self._queue)[-1]
            worker.tasks.append(task)
            self._send(worker, task)

    def _share_out(self) -> None:
        """Assign equal shares in the order of dispatch, even if workers are idle: grouping affects the last bits."""
        count = len(self._workers)
        bounds = [len(self._round) * share // count for share in range(count + 1)]
        for worker, start, end in zip(self._workers, bounds, bounds[1:], strict=False):
            if end > start:
                task = _RunTogether(rounds=tuple(self._round[start:end]))
                worker.tasks.append(task)
                self._send(worker, task)
        self._round.clear()

    def _send(self, worker: _Worker, task: _Task) -> None:
        worker.active = time.monotonic()
        released = [worker.released.popleft() for _ in range(len(worker.released))]
        try:
            worker.connection.send_bytes(pack((released, task), self._files.publish))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(worker) from None

    def _receive(self, worker: _Worker) -> Any:
        def load(reference: Reference) -> Tensor:
            return self._mappings.read(
                reference, done=partial(worker.released.append, (reference.path, reference.capacity))
            )

        try:
            answer = unpack(worker.connection.recv_bytes(), load)
        except (EOFError, ConnectionResetError):
            raise self._died(worker) from None
        if isinstance(answer, _Crashed):
            raise FedShelfError(answer.trace)
        return answer

    def _died(self, worker: _Worker) -> WorkerLostError:
        """Describe a worker that died: its client, and the cause."""
        ending = process_exit.describe_exit(self._process_of(worker), self._processes.exit_code(worker.number))
        return WorkerLostError(
            f"{ending}; start the same command again to continue, with fewer --workers if memory is short"
        )

    def _process_of(self, worker: _Worker) -> str:
        match worker.tasks[0] if worker.tasks else None:
            case _RunOne(name=name):
                return f"the process of {name}"
            case _RunTogether(rounds=rounds):
                others = f" and {len(rounds) - 1} more" if len(rounds) > 1 else ""
                return f"the process of {rounds[0].name}{others}"
        return "a worker process"


def _work(runner: ClientRunner, folders: Sequence[Path], connection: Connection, number: int) -> None:
    """Run a worker: one task after the other, until the parent closes the pipe or dies."""
    keep_freed_memory()
    files, mappings = SharedFiles(folders, f"worker-{number}"), Mappings()
    together = VmapBackend(runner, warn=number == 0)
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        released, task = unpack(data, mappings.read)
        for path, capacity in released:
            files.release(path, capacity)
        try:
            answer = _run_task(task, runner, together)
        except FedShelfError as error:
            answer = _Crashed(trace=str(error))
        except Exception:  # noqa: BLE001  the parent must receive any error
            answer = _Crashed(trace=f"a worker process failed:\n{traceback.format_exc()}")
        if answer is not None:
            try:
                connection.send_bytes(pack(answer, files.write))
            except (BrokenPipeError, ConnectionResetError):  # the parent has died in the meantime
                return


def _run_task(task: _Task, runner: ClientRunner, together: VmapBackend) -> Any:
    match task:
        case _Open():
            runner.states, runner.models = task.states, task.models
            runner.prepare(task.setup)
            runner.open(task.setup)
            together.prepare(task.setup)
        case _RunOne():
            return runner.run(task.name, task.message)
        case _RunTogether():
            for run in task.rounds:
                together.submit(run.name, run.message)
            answers = [together.next() for _ in task.rounds]
            return [answer[1] for answer in answers if answer is not None]
        case _Evaluate():
            return runner.evaluate(task.setup, task.params, share=task.share, shares=task.shares)
    return None
