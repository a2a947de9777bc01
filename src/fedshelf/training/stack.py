"""Many clients in one computation: their models are rows of one matrix, and one pass computes all their gradients.

`torch.func.vmap` maps the model's forward pass over all rows, so that many small kernels become one larger one.
Everything around the pass is the regular training loop.

Frozen tensors are shared by all clients.

Shapes: C clients of the stack, G clients of a group (batches of equal size in a step), M values of a model that change,
B batch, H height, W width.
"""

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedshelf.core.params import Params, Segment
from fedshelf.training import loop
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.cross_entropy import stacked
from fedshelf.training.loop import LocalRun
from fedshelf.training.losses import Calibration

ALIGNMENT = 16  # values, 64 bytes: alignment of rows
MOST_ROWS = 32  # more did not help in any measurement on CPUs
ROOM = 1 << 29  # bytes for values and gradients, if the free memory is unknown


def default_count(bound: BoundModel) -> int:
    """C for a model of this size. Activations need further memory: one client's times C."""
    room = ROOM
    if bound.compute.device.type == "cuda":
        room = (
            torch.cuda.get_device_properties(bound.compute.device).total_memory // 8
        )  # free memory may differ between calls
    return max(1, min(MOST_ROWS, room // (2 * 4 * max(1, bound.params.layout.num_changing))))


class Stack:
    """C bound models of one architecture whose vectors and gradients are rows of two matrices.

    Each is a regular bound model: a client trained alone on it takes the same steps as elsewhere. Local runs on several
    of them are trained together with `differentiate`.

    Args:
        bound: provides model, device and settings; left unchanged.
        count: C.
    """

    def __init__(self, bound: BoundModel, count: int) -> None:
        self._bound = bound
        pitch = -(-bound.params.layout.num_changing // ALIGNMENT) * ALIGNMENT
        self._values_CM, self._gradients_CM = torch.zeros(2, count, pitch, device=bound.compute.device).unbind()
        self.bound_models = tuple(self._row_model(row) for row in range(count))
        self._rows = {id(model): row for row, model in enumerate(self.bound_models)}
        self._specs = tuple(t for t in bound.params.layout.tensors if t.segment is not Segment.FROZEN)
        self._prefix = "" if bound.head is None else f"{bound.head}."
        self._counters = {n: b for n, b in bound.trained.named_buffers() if not b.is_floating_point()}
        self._frozen = {name for name, p in bound.module.named_parameters() if not p.requires_grad}

    def train(self, local_runs: Sequence[LocalRun]) -> float:
        """Train local runs on this stack to their end; return each one's share of the time in seconds."""
        started = time.perf_counter()
        for rate in sorted({local_run.client_lr for local_run in local_runs}):
            loop.train([local_run for local_run in local_runs if local_run.client_lr == rate], self.differentiate)
        return (time.perf_counter() - started) / len(local_runs)

    def differentiate(self, local_runs: Sequence[LocalRun]) -> Sequence[Tensor]:
        """`Differentiate` for local runs on this stack, in one pass over all of them."""
        if len(local_runs) == 1:
            return loop.differentiate_one(local_runs)
        rows = [self._rows[id(local_run.bound)] for local_run in local_runs]
        batches = [local_run.batch for local_run in local_runs if local_run.batch is not None]
        inputs = [batch.images for batch in batches]
        is_photos = inputs[0].dim() == 4  # stacked in memory as channels_last
        stacked_inputs = torch.stack([one.permute(0, 2, 3, 1) for one in inputs] if is_photos else inputs)
        labels_GB = torch.stack([batch.labels for batch in batches])
        asked = [batch.teacher_logits for batch in batches if batch.teacher_logits is not None]
        teacher_GBK = torch.stack(asked) if asked else None
        calibration_G = stacked([local_run.calibration for local_run in local_runs])
        with self._picked(rows) as (values_GM, gradients_GM), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            inputs_G = stacked_inputs.permute(0, 1, 4, 2, 3) if is_photos else stacked_inputs
            losses_G = self._pass(values_GM, gradients_GM, inputs_G, labels_GB, calibration_G, teacher_GBK)
        return losses_G.unbind()

    def _pass(
        self, values_GM: Tensor, gradients_GM: Tensor, inputs_G: Tensor, labels_GB: Tensor,
        calibration_G: Calibration | None, teacher_GBK: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Fill the gradients, update the statistics, and return the mean losses [G]."""
        values, gradients = self._views(values_GM), self._views(gradients_GM)
        trained = {spec.name: values[spec.name] for spec in self._specs if spec.trainable}
        # vmap updates statistics in place only where they are contiguous.
        moving = {spec.name: values[spec.name].contiguous() for spec in self._specs if not spec.trainable}
        if not self._bound.module.training:
            self._bound.train()

        def loss(
            trained: Mapping[str, Tensor], moving: Mapping[str, Tensor], inputs: Tensor, labels_B: Tensor,
            calibration: Calibration | None, teacher_BK: Tensor | None,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            counters = {
                name: buffer.clone() for name, buffer in self._counters.items()
            }  # updated in place, and dropped
            named = {name.removeprefix(self._prefix): tensor for name, tensor in {**trained, **moving}.items()}
            mean = self._bound.loss(
                inputs, labels_B, calibration, teacher_BK=teacher_BK,
                forward=lambda given: functional_call(self._bound.trained, {**named, **counters}, (given,)),
            )  # fmt: skip
            return mean, mean.detach()

        losses_G: Tensor
        optional = [None if each is None else 0 for each in (calibration_G, teacher_GBK)]
        together = vmap(grad(loss, has_aux=True), in_dims=(0, 0, 0, 0, *optional))
        found, losses_G = together(trained, moving, inputs_G, labels_GB, calibration_G, teacher_GBK)
        with torch.no_grad():
            for name, gradient in found.items():
                gradients[name].copy_(gradient) if name not in self._frozen else gradients[name].zero_()
            for name, moved in moving.items():
                values[name].copy_(moved)
        return losses_G

    def _views(self, matrix_GM: Tensor) -> dict[str, Tensor]:
        """The named tensors of all rows, each [G, *shape]."""
        count, pitch, start = len(matrix_GM), matrix_GM.stride(0), matrix_GM.storage_offset()
        return {
            spec.name: torch.as_strided(matrix_GM, (count, *spec.shape), (pitch, *spec.stride), start + spec.offset)
            for spec in self._specs
        }

    @contextmanager
    def _picked(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield values and gradients of some rows.

        They are views if the rows are contiguous, otherwise copies that are written back.
        """
        first, count = rows[0], len(rows)
        if list(rows) == list(range(first, first + count)):
            yield self._values_CM[first : first + count], self._gradients_CM[first : first + count]
            return
        index = torch.tensor(rows, device=self._values_CM.device)
        values_GM, gradients_GM = self._values_CM[index], self._gradients_CM[index]
        yield values_GM, gradients_GM
        self._values_CM[index], self._gradients_CM[index] = values_GM, gradients_GM

    def _row_model(self, row: int) -> BoundModel:
        """A bound model on one row, with its own module; frozen tensors are those of the given one."""
        given, layout = self._bound, self._bound.params.layout
        params = Params(self._values_CM[row, : layout.num_changing], layout)
        gradients = Params(self._gradients_CM[row, : layout.num_changing], layout)
        params.vector.copy_(given.params.changing)
        values = params.views(frozen=False)
        tensors = {**dict(given.module.named_parameters()), **dict(given.module.named_buffers())}
        shared = {spec.name: tensors[spec.name] for spec in layout.tensors if spec.segment is Segment.FROZEN}
        module = copy.deepcopy(given.module, {id(tensor): tensor for tensor in shared.values()})
        _bind(module, values, gradients.views(frozen=False))
        return replace(given, module=module, params=params, gradients=gradients.vector, forward=None)


def _bind(module: nn.Module, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.data, parameter.grad = values[name], gradients[name]
    for name, buffer in module.named_buffers():
        if name in values:
            buffer.data = values[name]
