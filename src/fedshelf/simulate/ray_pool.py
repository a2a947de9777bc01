"""Simulated clients on several machines with Ray: actors run clients as the worker processes do.

Tensors pass through Ray's object store; a round's model is stored once for all clients. An actor returns exactly the
client's answer, so a run on a cluster is bit-identical to one on a single machine with the same threads per client.

Every node needs FedShelf and, if photos come from folders, the same folders at the same paths.
"""

import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.core.errors import FedShelfError, UsageError, WorkerLostError
from fedshelf.core.messages import PARAMS, Broadcast, ClientMessage, ServerMessage, Setup
from fedshelf.models.own_model import use_model_path
from fedshelf.simulate.client_runner import ClientRunner
from fedshelf.training.malloc import keep_freed_memory
from fedshelf.training.trainer import Score

AHEAD = 2  # tasks per actor while there are plenty: one running, one waiting


class RayPool:
    """A backend over Ray actors, which also share central evaluation.

    It connects to the cluster in `RAY_ADDRESS` ("auto" selects this machine's), or else starts a local one that ends
    with the pool.

    Args:
        runner: the client runner that each actor uses.
        num_actors: at least one.
        threads: training threads per client; each actor reserves as many cores.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at `RAY_ADDRESS`.
    """

    def __init__(self, runner: ClientRunner, num_actors: int, *, threads: int) -> None:
        self._ray = _import_ray()
        self._runner = runner
        self._setup: Setup | None = None
        self._queue: deque[tuple[str, ServerMessage]] = deque()
        self._model: tuple[Tensor, Any] | None = None  # the model stored last
        self._tasks: dict[Any, tuple[int, str]] = {}  # by the answer's reference: actor and client
        self._started = _connect(self._ray, num_actors * threads)
        try:
            _pass_tensors_as_bytes(self._ray)
            fresh = ClientRunner(
                stores=runner.stores, device=runner.device, make_module=runner.make_module,
                model_path=runner.model_path, attack=runner.attack,
            )  # fmt: skip
            given = self._ray.put(fresh)
            kind = self._ray.remote(num_cpus=threads, num_gpus=1 if runner.device == "cuda" else 0)(_Actor)
            self._actors = [kind.remote(given) for _ in range(num_actors)]
        except BaseException:
            self._disconnect()
            raise

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._model = None
        self._tasks.clear()
        self._disconnect()

    def submit(self, name: str, message: ServerMessage) -> None:
        """See `Backend`."""
        if isinstance(message, Setup):
            self._open(message)
        self._queue.append((name, message))
        self._hand_out()

    def next(self) -> tuple[str, ClientMessage] | None:
        """See `Backend`."""
        if not self._tasks:
            return None
        (done,), _ = self._ray.wait(list(self._tasks), num_returns=1)
        _, name = self._tasks.pop(done)
        answer: ClientMessage = self._get(done)
        self._hand_out()
        return name, answer

    def evaluate(self, setup: Setup, params: Tensor) -> list[Score]:
        """Evaluate `params` [S] on all test batches in contiguous shares; return one score per batch."""
        self._open(setup)
        count = len(self._actors)
        model = self._put(params)
        shares = [actor.evaluate.remote(setup, model, i, count) for i, actor in enumerate(self._actors)]
        return [score for share in shares for score in self._get(share)]

    def _open(self, setup: Setup) -> None:
        if setup != self._setup:
            self._setup = setup
            for opened in [
                actor.open.remote(setup, self._runner.states, self._runner.models) for actor in self._actors
            ]:
                self._get(opened)

    def _hand_out(self) -> None:
        load = [0] * len(self._actors)
        for index, _ in self._tasks.values():
            load[index] += 1
        while self._queue:
            index = load.index(min(load))
            if load[index] >= (AHEAD if len(self._queue) > len(load) else 1):
                return
            name, message = self._queue.popleft()
            model = None
            if isinstance(message, Broadcast):
                model, message = (
                    self._put(message.params),
                    replace(message, vectors={**message.vectors, PARAMS: message.params[:0]}),
                )
            self._tasks[self._actors[index].run.remote(name, message, model)] = index, name
            load[index] += 1

    def _put(self, params: Tensor) -> Any:
        """Return the reference of a model in the object store; the same tensor is stored once."""
        if self._model is None or self._model[0] is not params:
            self._model = params, self._ray.put(params)
        return self._model[1]

    def _get(self, reference: Any) -> Any:
        """Return an actor's result.

        Raises:
            FedShelfError: the actor failed, or its process or machine died.
        """
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FedShelfError):
                raise FedShelfError(str(cause)) from None
            raise FedShelfError(f"a Ray worker failed:\n{error}") from None
        except self._ray.exceptions.RayError as error:
            raise WorkerLostError(
                f"a Ray worker or its machine died ({type(error).__name__}; out of memory?); start the same command "
                "again to continue, with fewer --workers"
            ) from None

    def _disconnect(self) -> None:
        if self._started:
            self._ray.shutdown()


class _Actor:
    """A client runner in a Ray process."""

    def __init__(self, runner: ClientRunner) -> None:
        keep_freed_memory()
        _pass_tensors_as_bytes(_import_ray())
        use_model_path(runner.model_path)
        self._runner = runner

    def open(self, setup: Setup, states: Path | None, models: Path | None) -> None:
        self._runner.states, self._runner.models = states, models
        self._runner.prepare(setup)
        self._runner.open(setup)

    def run(self, name: str, message: ServerMessage, model: Tensor | None) -> ClientMessage:
        if isinstance(message, Broadcast) and model is not None:
            message = replace(message, vectors={**message.vectors, PARAMS: model})
        return self._runner.run(name, message)

    def evaluate(self, setup: Setup, params: Tensor, share: int, shares: int) -> Sequence[Score]:
        return self._runner.evaluate(setup, params, share=share, shares=shares)


def _import_ray() -> ModuleType:
    # Set before the first import: disables Ray's usage reports and a warning about a change in Ray.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.util
    except ImportError:
        raise UsageError("--engine ray needs Ray, which is an extra: install fedshelf[ray]") from None
    module: ModuleType = ray
    return module


def _connect(ray: ModuleType, num_cpus: int) -> bool:
    """Join a cluster or start one here; return False if Ray was already initialized."""
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    where: dict[str, Any] = {"address": address} if address else {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        with _own_signal_handlers():
            ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster can be reached{f' at RAY_ADDRESS {address}' if address else ''}: {error}"
        ) from None
    return True


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Restore the previous signal handlers afterwards, because Ray's handler aborts this process on SIGTERM."""
    if threading.current_thread() is not threading.main_thread():  # Ray sets none there either
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_tensors_as_bytes(ray: ModuleType) -> None:
    """Pass tensors as byte arrays, because Ray passes only arrays without copying."""
    ray.util.register_serializer(torch.Tensor, serializer=_to_bytes, deserializer=_from_bytes)


def _to_bytes(tensor: Tensor) -> tuple[NDArray[np.uint8], torch.dtype, tuple[int, ...]]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape)


def _from_bytes(found: tuple[NDArray[np.uint8], torch.dtype, tuple[int, ...]]) -> Tensor:
    """Return a read-only tensor on the object store's memory."""
    data, dtype, shape = found
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(data).view(dtype).reshape(shape)
