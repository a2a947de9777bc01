"""A module bound to one flat vector. A process trains all of its clients on it.

Shapes: B batch, H height, W width, D features, K classes, S shared values, M values that change, P all values.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedshelf.core.errors import ModelError
from fedshelf.core.params import Params, Segment, bind, bind_gradients
from fedshelf.models.build import normalization_of
from fedshelf.models.convolution_fault import avoid_convolution_fault
from fedshelf.models.head import head_names, linear_head
from fedshelf.models.sales import SalesLinear, SalesOutput
from fedshelf.models.settings import Normalization
from fedshelf.training.cross_entropy import cross_entropy
from fedshelf.training.device import Compute
from fedshelf.training.distillation import distilled
from fedshelf.training.losses import Calibration
from fedshelf.training.settings import TrainingSettings

__all__ = ["GradientHook", "TrainingSettings", "BoundModel"]

Forward: TypeAlias = Callable[[Tensor], Tensor | SalesOutput]
"""A pass, to logits; in training with sales, also to what its other losses are made of."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundModel:
    """A module whose tensors and gradients are views of flat vectors.

    Attributes:
        module: the module.
        params: its tensors [P].
        gradients: the gradients [M] of the tensors that change.
        compute: the device and precision.
        normalization: normalization of photos.
        settings: settings of local training.
        initial_personal: initial values [M - S] of the personal tensors, at every client.
        forward: another form of the training pass, such as a compiled one; None: the module itself.
        head: name of the output layer, if all other layers are frozen: photos then enter as their features.
    """

    module: nn.Module
    params: Params
    gradients: Tensor
    compute: Compute
    normalization: Normalization
    settings: TrainingSettings
    initial_personal: Tensor
    forward: Forward | None = None
    head: str | None = None

    @classmethod
    def of(
        cls, module: nn.Module, *, compute: Compute, settings: TrainingSettings,
        personal_names: Collection[str] = frozenset(), frozen_names: Collection[str] = frozenset(),
        on_features: bool = False,
    ) -> "BoundModel":  # fmt: skip
        """Bind a module, in place: it is moved to the device and its tensors are rebound.

        Args:
            module: the module.
            compute: the device and precision.
            settings: settings of local training.
            personal_names: tensors that stay at the client.
            frozen_names: tensors that never change.
            on_features: whether only the output layer is trained, on features of the photos.

        Raises:
            ModelError: `on_features`, and the model has no single linear output layer.
        """
        normalization = normalization_of(module)
        avoid_convolution_fault(module)
        module.eval()  # until `train`, which knows what is frozen
        params = bind(
            module.to(compute.device), is_personal=lambda name: name in personal_names,
            is_frozen=lambda name: name in frozen_names,
        )  # fmt: skip
        return cls(
            module=module, params=params, gradients=bind_gradients(module, params), compute=compute,
            normalization=normalization, settings=settings, initial_personal=params.personal.clone(),
            head=linear_head(module)[0] if on_features else None,
        )  # fmt: skip

    @property
    def trained(self) -> nn.Module:
        """The part of the module that training passes through: the output layer, if photos enter as features."""
        return self.module if self.head is None else self.module.get_submodule(self.head)

    def frozen_values(self) -> Tensor | None:
        """A copy of the frozen values [F] on the CPU; None if there are none."""
        frozen = self.params.frozen
        return frozen.detach().cpu().clone() if len(frozen) else None

    @cached_property
    def output_layer(self) -> str:
        """Name of the output layer; "" if it is not a single linear one."""
        try:
            return linear_head(self.module)[0]
        except ModelError:
            return ""

    @cached_property
    def head_range(self) -> slice | None:
        """Where the output layer lies in the shared trainable values; None if it does not, or not in one piece."""
        names = head_names(self.module)
        specs = [t for t in self.params.layout.tensors if t.name in names]
        start, size = min((t.offset for t in specs), default=0), sum(t.size for t in specs)
        is_whole = all(t.segment is Segment.TRAINABLE and start <= t.offset < start + size for t in specs)
        return slice(start, start + size) if self.output_layer and specs and is_whole else None

    @property
    def num_features(self) -> int | None:
        """D, if photos enter as features, and with the figures of sales if the model takes these; None otherwise."""
        if self.head is None or not isinstance(self.trained, nn.Linear):
            return None
        return self.trained.num_inputs if isinstance(self.trained, SalesLinear) else self.trained.in_features

    @property
    def takes_sales(self) -> bool:
        """Whether photos enter with the sales of their store (`models.sales`)."""
        return self.head is not None and isinstance(self.trained, SalesLinear)

    @cached_property
    def has_batch_norm(self) -> bool:
        """Whether the module cannot train on a batch of one photo."""
        frozen = {part for child in self._frozen_modules for part in child.modules()}
        return any(isinstance(child, _BatchNorm) and child not in frozen for child in self.trained.modules())

    @cached_property
    def _frozen_modules(self) -> tuple[nn.Module, ...]:
        """The modules that compute in training as in evaluation: they have buffers or parameters, all frozen."""
        tensors = {spec.name: spec.segment is not Segment.FROZEN for spec in self.params.layout.tensors}
        found = []
        for name, child in self.module.named_modules():
            own = [*child.named_buffers(recurse=False)] or [*child.named_parameters()]
            changes = [tensors[full] for key, _ in own if (full := f"{name}.{key}" if name else key) in tensors]
            if changes and not any(changes):
                found.append(child)
        return tuple(found)

    def train(self) -> None:
        """Put the module in training mode, and its frozen parts in evaluation mode."""
        self.module.train()
        for child in self._frozen_modules:
            child.eval()

    def load(self, shared: Tensor) -> None:
        """Copy `shared` [S] into the module's shared tensors."""
        self.params.shared.copy_(shared)

    def loss(
        self, inputs: Tensor, labels_B: Tensor, calibration: Calibration | None, *,
        teacher_BK: Tensor | None = None, forward: Forward | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the mean training loss of a batch: that of its classes, and what the model adds (`models.sales`).

        Args:
            inputs: see `logits`.
            labels_B: labels.
            calibration: the client's calibration, if any.
            teacher_BK: a teacher's logits of the same inputs, if the settings say how to learn from them.
            forward: the pass to use instead of the module.
        """
        output = self._output(inputs, forward)
        logits_BK = output.logits if isinstance(output, SalesOutput) else output
        loss = cross_entropy(logits_BK, labels_B, calibration, label_smoothing=self.settings.label_smoothing)
        if teacher_BK is not None and self.settings.distillation is not None:
            loss = distilled(loss, logits_BK, teacher_BK, self.settings.distillation)
        return loss + output.added_loss(labels_B) if isinstance(output, SalesOutput) else loss

    def logits(self, inputs: Tensor, *, forward: Forward | None = None) -> Tensor:
        """Compute logits [B, K] in float32; the pass runs in bfloat16 where that is faster.

        Args:
            inputs: normalized photos [B, 3, H, W], or their features [B, D] if the model has a `head`.
            forward: the pass to use instead of the module.
        """
        output = self._output(inputs, forward)
        return output.logits if isinstance(output, SalesOutput) else output

    def _output(self, inputs: Tensor, forward: Forward | None) -> Tensor | SalesOutput:
        """The output of a pass, in float32."""
        module = self.module if inputs.dim() == 4 else self.trained
        passes = (forward, self.forward if self.module.training else None, module)
        compute = next(each for each in passes if each is not None)  # the truth of a compiled module is not defined
        if not self.compute.autocast:
            return compute(inputs)
        with torch.autocast(self.compute.device.type, dtype=torch.bfloat16):
            output = compute(inputs)
        return SalesOutput(*(part.float() for part in output)) if isinstance(output, SalesOutput) else output.float()

    @torch.no_grad()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """Compute what enters the output layer [B, D], in float32, from normalized photos.

        The pass never runs in bfloat16: it is made once, and heads computed from features need their accuracy.

        Raises:
            ModelError: the model has no single linear output layer, or it is not the last step, so that features do not
                determine the logits.
        """
        seen: list[Tensor] = []
        _, head = linear_head(self.module)
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.module.eval()
            logits_BK = self.module(images_BCHW)
        finally:
            hook.remove()
        # Values that are not finite are no reason: whoever makes the weights would learn of single photos from it.
        is_last = len(seen) == 1 and seen[0].dim() == 2
        if not is_last or not torch.allclose(head(seen[0]), logits_BK, atol=1e-3, equal_nan=True):
            raise ModelError(
                "a head on frozen features needs a model whose last step is its output layer, on one vector per photo"
            )
        return seen[0]


GradientHook = Callable[[Tensor, Tensor], None]
"""Called each step with the shared trainable gradient and values, both [T]; adds to the gradient in place."""
