"""A user's own local training: a function that replaces the training loop of `training.loop` at one client.

The function receives the client's module, its batches, the learning rate, and hooks, through which the algorithm takes
part in each step. It returns the mean training loss.
"""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from types import CodeType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedshelf.core.errors import FedShelfError, TrainingError
from fedshelf.core.params import Params
from fedshelf.training.batches import Batch
from fedshelf.training.cross_entropy import cross_entropy
from fedshelf.training.loop import LocalRun, clip_gradients, hook_gradients
from fedshelf.training.phases import Moves
from fedshelf.training.resources import lacks_memory

_MAX_ERROR_CHARACTERS = 300


class Hooks:
    """What FedShelf offers to a user's own training, once per training of one client.

    Attributes:
        num_examples: the client's training photos.
        round: the round.
    """

    def __init__(self, local_run: LocalRun) -> None:
        self._local_run = local_run
        self.num_examples = local_run.num_examples
        self.round = local_run.round
        self.was_called = False

    def before_step(self) -> None:
        """Clip the gradients as configured, and let the algorithm add its terms.

        Call this between `loss.backward()` and `optimizer.step()`. Algorithms such as FedProx and SCAFFOLD require it.
        """
        self.was_called = True
        bind_own_gradients(self._local_run)
        clip_gradients([self._local_run])
        hook_gradients(self._local_run)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the configured loss, with label smoothing and protection against label skew.

        Args:
            logits: the module's output [B, K].
            labels: the labels [B].

        Returns:
            The mean loss of the batch.
        """
        run = self._local_run
        return cross_entropy(
            logits, labels, run.calibration, label_smoothing=run.bound.settings.label_smoothing
        )  # fmt: skip


LocalTraining: TypeAlias = Callable[[nn.Module, Iterator[tuple[Tensor, Tensor]], float, Hooks], float | Tensor]
"""Trains a module in place on batches (photos [B, 3, H, W], labels [B]) of all local epochs, at the given learning
rate, and returns the mean training loss."""


@dataclass(frozen=True)
class OwnTraining:
    """A `Run` (see `training.loop`) that calls a user's function.

    Attributes:
        train: the function.
    """

    train: LocalTraining

    def __call__(self, local_run: LocalRun) -> float:
        """Train a local run to its end.

        Args:
            local_run: the client's training.

        Returns:
            The duration in seconds.

        Raises:
            TrainingError: the function fails, returns no loss, changes frozen values, or does not call
                `Hooks.before_step` although the algorithm needs it; or this training may move only a part of the
                values.
        """
        if local_run.moves is not Moves.ALL:
            raise TrainingError(
                "the configured personalization trains parts of the model in turn, which a function for local training "
                "does not do. Use another --personalize",
                will_repeat=True,
            )
        started, bound, hooks = perf_counter(), local_run.bound, Hooks(local_run)
        frozen, sizes = bound.params.frozen.clone(), list[int]()
        bound.train()
        bound.gradients.zero_()
        try:
            loss = self.train(bound.trained, _noted(local_run.batches, sizes), local_run.client_lr, hooks)
        except FedShelfError:
            raise
        except Exception as error:
            if lacks_memory(error):
                raise
            raise TrainingError(self._explained(error), will_repeat=True) from error
        finally:
            bind_own_gradients(local_run)
        self._check(local_run, hooks, loss, frozen)
        mean_loss = torch.tensor(float(loss.detach() if isinstance(loss, Tensor) else loss))
        for size in sizes:
            local_run.note(mean_loss, size)
        return perf_counter() - started

    def _check(self, local_run: LocalRun, hooks: Hooks, loss: object, frozen: Tensor) -> None:
        bound, name = local_run.bound, self._name
        problem = ""
        if not isinstance(loss, float | int) and not (isinstance(loss, Tensor) and loss.numel() == 1):
            problem = f"returns {type(loss).__name__}. It must return the mean training loss, a number"
        elif _is_moved(bound.trained, bound.params, "" if bound.head is None else f"{bound.head}."):
            problem = "replaces tensors of the module. Change their values in place"
        elif not torch.equal(frozen, bound.params.frozen):
            problem = "changes frozen values, perhaps by calling module.train(). FedShelf sets the mode of all layers"
        elif local_run.gradient_hook is not None and not hooks.was_called:
            problem = (
                "never calls hooks.before_step(), which this algorithm or personalization needs. Call it between "
                "loss.backward() and optimizer.step()"
            )
        if problem:
            raise TrainingError(f"the function {name} for local training {problem}", will_repeat=True)

    @property
    def _name(self) -> str:
        return getattr(self.train, "__name__", type(self.train).__name__)

    def _explained(self, error: Exception) -> str:
        """Describe an error of the function, with the line in its file."""
        code = getattr(self.train, "__code__", None)
        file = code.co_filename if isinstance(code, CodeType) else None
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if file and frame.filename == file
        ]  # fmt: skip
        where = f", line {lines[-1]}" if lines else ""
        message = " ".join(str(error).split())[:_MAX_ERROR_CHARACTERS]
        return f"the function {self._name} for local training failed{where}: {type(error).__name__}: {message}"


def bind_own_gradients(local_run: LocalRun) -> None:
    """Copy gradients that are elsewhere (after `zero_grad()`, PyTorch allocates new ones) to the flat vector."""
    bound = local_run.bound
    views = Params(bound.gradients, bound.params.layout).views(frozen=False)
    for name, parameter in bound.module.named_parameters():
        if name not in views or parameter.grad is views[name]:
            continue
        if parameter.grad is None:
            views[name].zero_()
        elif parameter.grad.data_ptr() != views[name].data_ptr():
            views[name].copy_(parameter.grad)
        parameter.grad = views[name]


def _is_moved(module: nn.Module, params: Params, prefix: str) -> bool:
    views = params.views()
    return any(
        tensor.data_ptr() != views[prefix + name].data_ptr()
        for name, tensor in module.named_parameters()
        if prefix + name in views
    )


def _noted(batches: Iterator[Batch], sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches; note their sizes."""
    for batch in batches:
        sizes.append(len(batch.labels))
        yield batch.images, batch.labels
