"""Worker processes that play clients; vectors pass through shared memory, everything else through pipes.

A broadcast's model is written once, whoever it goes to; a worker writes an upload's delta where it was told to. Work
goes to whoever is idle, so a slow client delays nobody.

Shapes: S shared values of the model.
"""

import multiprocessing
import signal
import traceback
from collections import deque
from dataclasses import dataclass, fields
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from torch import Tensor

from fedshelf.core.errors import FedShelfError
from fedshelf.core.messages import Broadcast, ClientMessage, ServerMessage, Setup, Upload
from fedshelf.simulate.player import Player
from fedshelf.simulate.shared import SharedVectors, open_vector
from fedshelf.training.trainer import BatchScore


@dataclass(frozen=True, kw_only=True)
class _Play:
    """A client's message."""

    name: str
    message: ServerMessage


@dataclass(frozen=True, kw_only=True)
class _PlayRound:
    """A broadcast without its model, which stands in the file `params`; the delta is to go to the file `delta`.
    `setup` is there when this worker has not seen it yet."""

    name: str
    broadcast: dict[str, Any]
    params: str
    delta: str
    size: int
    setup: Setup | None


@dataclass(frozen=True, kw_only=True)
class _Evaluate:
    setup: Setup
    params: str
    size: int
    batches: range


@dataclass(frozen=True, kw_only=True)
class _UploadWithoutDelta:
    fields: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Crashed:
    trace: str


class WorkerPool:
    """A backend over `num_workers` processes, and central evaluation shared out among them."""

    def __init__(self, player: Player, num_workers: int) -> None:
        self._vectors = SharedVectors()
        self._queue: deque[tuple[str, ServerMessage]] = deque()
        self._busy: dict[Connection, tuple[str, ServerMessage, Tensor | None]] = {}
        self._setup: Setup | None = None
        self._informed: set[Connection] = set()  # workers that have seen the setup
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._processes = []
        connections = []
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, player), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            connections.append(ours)
        self._connections = tuple(connections)
        self._idle = list(connections)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()  # a worker reads the end of its pipe, and ends
        for process in self._processes:
            process.join(timeout=2)
            if process.is_alive():
                process.terminate()
        self._vectors.close()

    def submit(self, name: str, message: ServerMessage) -> None:
        self._queue.append((name, message))
        self._hand_out()

    def next(self) -> tuple[str, ClientMessage] | None:
        if not self._busy:
            return None
        connection = wait(list(self._busy))[0]
        if not isinstance(connection, Connection):
            raise TypeError(f"waited for a connection, got {connection!r}")
        name, _, delta = self._busy.pop(connection)
        answer = _receive(connection)
        self._idle.append(connection)
        self._hand_out()
        if isinstance(answer, _UploadWithoutDelta) and delta is not None:
            return name, Upload(**answer.fields, delta=delta)
        return name, answer

    def evaluate(self, setup: Setup, params: Tensor, num_batches: int) -> list[BatchScore]:
        """Score `params` [S] on all test batches, in contiguous shares.

        Raises:
            FedShelfError: clients are at work; rounds evaluate when all have answered.
        """
        if self._busy:
            raise FedShelfError("central evaluation was asked for while clients are at work")
        path, count = self._vectors.put(params), len(self._connections)
        bounds = [num_batches * i // count for i in range(count + 1)]
        for connection, start, stop in zip(self._connections, bounds, bounds[1:], strict=False):
            connection.send(_Evaluate(setup=setup, params=path, size=params.numel(), batches=range(start, stop)))
        return [score for connection in self._connections for score in _receive(connection)]

    def _hand_out(self) -> None:
        while self._queue and self._idle:
            connection = self._idle.pop()
            name, message = self._queue.popleft()
            delta: Tensor | None = None
            if isinstance(message, Broadcast):
                size = message.params.numel()
                path, delta = self._vectors.make(size)
                connection.send(
                    _PlayRound(
                        name=name, broadcast=_without(message, "params"), params=self._vectors.put(message.params),
                        delta=path, size=size, setup=None if connection in self._informed else self._setup,
                    )
                )  # fmt: skip
            else:
                self._setup = message
                connection.send(_Play(name=name, message=message))
            self._informed.add(connection)
            self._busy[connection] = (name, message, delta)  # holds the model: its file is not used again meanwhile


def _receive(connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError):
        raise FedShelfError(
            "a worker process died (out of memory?); start the same command again to go on, with fewer --workers"
        ) from None
    if isinstance(answer, _Crashed):
        raise FedShelfError(answer.trace)
    return answer


def _work(connection: Connection, player: Player) -> None:
    """A worker's life: one task after the other, until its parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = _do(task, player)
        except FedShelfError as error:
            answer = _Crashed(trace=str(error))
        except Exception:  # noqa: BLE001  whatever it was, the parent must hear of it
            answer = _Crashed(trace=f"a worker process failed:\n{traceback.format_exc()}")
        connection.send(answer)


def _do(task: _Play | _PlayRound | _Evaluate, player: Player) -> Any:
    match task:
        case _Play():
            return player.play(task.name, task.message)
        case _Evaluate():
            return player.evaluate(task.setup, _mapped(task.params, task.size), task.batches)
        case _PlayRound():
            if task.setup is not None:
                player.open(task.setup)
            broadcast = Broadcast(**task.broadcast, params=_mapped(task.params, task.size))
            answer = player.play(task.name, broadcast)
            if not isinstance(answer, Upload):
                return answer
            _mapped(task.delta, task.size).copy_(answer.delta)
            return _UploadWithoutDelta(fields=_without(answer, "delta"))


@lru_cache(maxsize=4096)
def _mapped(path: str, size: int) -> Tensor:
    return open_vector(path, size)


def _without(message: Broadcast | Upload, name: str) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in fields(message) if field.name != name}
