"""A model as one flat vector.

`Params` owns one contiguous float32 vector and binds the module's tensors to it as views. An upload is then a slice,
and averaging, clipping, noise and quantization are single passes at memory bandwidth.

The vector is ordered ``[shared trainable | shared statistics | personal | frozen]``; inside the personal segment the
trainable tensors come first. Frozen values never change: they are sent once per run, by digest. Integer buffers
(``num_batches_tracked``) are left out: they are never averaged or sent.

Shapes: T shared trainable values, S shared values (trainable and statistics), M values that change (shared and
personal), F frozen values, P = M + F all values.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Segment(StrEnum):
    """The segment of the vector that a tensor belongs to (see the module's docstring)."""

    TRAINABLE = "trainable"
    STATISTICS = "statistics"
    PERSONAL = "personal"
    FROZEN = "frozen"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One named tensor's place in the vector.

    Attributes:
        name: the tensor's name in the module.
        shape: its shape.
        stride: its strides, in values.
        offset: index of its first value in the vector.
        segment: the segment that it belongs to.
        trainable: whether the optimizer updates it.
        nonnegative: whether its values may not fall below zero (variances).
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    segment: Segment
    trainable: bool
    nonnegative: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The order, shapes and strides of all floating-point tensors of a model."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def num_trainable(self) -> int:
        """T: number of values in the shared trainable segment."""
        return sum(t.size for t in self.tensors if t.segment is Segment.TRAINABLE)

    @cached_property
    def num_shared(self) -> int:
        """S: number of values that are sent."""
        return sum(t.size for t in self.tensors if t.segment in (Segment.TRAINABLE, Segment.STATISTICS))

    @cached_property
    def num_changing(self) -> int:
        """M: number of values that training may change."""
        return sum(t.size for t in self.tensors if t.segment is not Segment.FROZEN)

    @cached_property
    def size(self) -> int:
        """P: number of all values."""
        return sum(t.size for t in self.tensors)

    @cached_property
    def num_personal_trainable(self) -> int:
        """Number of personal values that the optimizer updates. They come first in the personal segment."""
        return sum(t.size for t in self.tensors if t.segment is Segment.PERSONAL and t.trainable)

    @property
    def num_parameters(self) -> int:
        """Number of trainable values, shared and personal; the model size that papers report."""
        return self.num_trainable + self.num_personal_trainable

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the shared and frozen tensors. Two sides with the same digest agree on every value's meaning."""
        sent = [t for t in self.tensors if t.segment is not Segment.PERSONAL]
        first_frozen = self.num_changing  # frozen values are sent by themselves, whatever is personal
        text = "\n".join(
            f"{t.name} {t.shape} {t.stride} {t.offset - first_frozen * (t.segment is Segment.FROZEN)} {t.segment}"
            for t in sent
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def at(self, index: int) -> TensorSpec:
        """The tensor that holds value `index` of the vector.

        Raises:
            IndexError: `index` is out of range.
        """
        for spec in self.tensors:
            if spec.offset <= index < spec.offset + spec.size:
                return spec
        raise IndexError(f"value {index} lies outside a layout of {self.size} values")

    def clamp(self, vector: Tensor) -> Tensor:
        """Clamp the shared variances of `vector` [S] at zero, in place; an average may round below it."""
        for spec in self.tensors:
            if spec.nonnegative and spec.segment is Segment.STATISTICS:
                vector[spec.offset : spec.offset + spec.size].clamp_(min=0)
        return vector


@dataclass(frozen=True, eq=False)
class Params:
    """One vector [P] and its layout. Slices and views share its memory."""

    vector: Tensor
    layout: Layout

    @property
    def shared(self) -> Tensor:
        """[S]: the part that is sent."""
        return self.vector[: self.layout.num_shared]

    @property
    def trainable(self) -> Tensor:
        """[T]: the part that server optimizers, proximal terms and clipping norms act on."""
        return self.vector[: self.layout.num_trainable]

    @property
    def personal(self) -> Tensor:
        """[M - S]: the part that never leaves the client."""
        return self.vector[self.layout.num_shared : self.layout.num_changing]

    @property
    def changing(self) -> Tensor:
        """[M]: the part that training may change."""
        return self.vector[: self.layout.num_changing]

    @property
    def frozen(self) -> Tensor:
        """[F]: the part that never changes."""
        return self.vector[self.layout.num_changing :]

    def views(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """The named tensors, without copying; those that change only, unless `frozen`."""
        start = self.vector.storage_offset()  # not zero where the vector is a row of a matrix
        wanted = (t for t in self.layout.tensors if frozen or t.segment is not Segment.FROZEN)
        return {t.name: torch.as_strided(self.vector, t.shape, t.stride, start + t.offset) for t in wanted}


def bind(
    module: nn.Module, *, is_personal: Callable[[str], bool] = lambda name: False,
    is_frozen: Callable[[str], bool] = lambda name: False,
) -> Params:  # fmt: skip
    """Move the floating-point tensors of `module` into one vector; from then on they are views of it.

    Convolution weights are laid out channels_last (the fast order on CPUs and tensor cores). Call this once the module
    is on its device; moving it afterwards breaks the views.

    Args:
        module: its parameters and floating-point buffers are rebound in place.
        is_personal: whether the tensor of a given name stays at the client.
        is_frozen: whether the tensor of a given name never changes; takes precedence.

    Returns:
        The vector [P] with its layout; gradients are not bound (see `bind_gradients`).
    """
    tensors = dict(_floating_tensors(module))
    trainable = {name for name, _ in module.named_parameters() if not is_frozen(name)}
    nonnegative = _variance_names(module)

    def order(name: str) -> tuple[int, bool]:
        segment = 3 if is_frozen(name) else 2 if is_personal(name) else 0 if name in trainable else 1
        return segment, name not in trainable

    specs: list[TensorSpec] = []
    offset = 0
    for name in sorted(tensors, key=order):  # a stable sort keeps the module's order inside a segment
        shape = tuple(tensors[name].shape)
        segment = tuple(Segment)[order(name)[0]]
        specs.append(
            TensorSpec(
                name=name, shape=shape, stride=_channels_last_stride(shape), offset=offset, segment=segment,
                trainable=name in trainable, nonnegative=name in nonnegative,
            )
        )  # fmt: skip
        offset += specs[-1].size
    layout = Layout(tuple(specs))
    device = next(iter(tensors.values())).device
    params = Params(torch.empty(layout.size, dtype=torch.float32, device=device), layout)
    with torch.no_grad():
        for name, view in params.views().items():
            view.copy_(tensors[name])
            tensors[name].data = view
    return params


def bind_gradients(module: nn.Module, params: Params) -> Tensor:
    """Bind the gradients of all tensors that change to one zeroed vector [M], and return that vector.

    Frozen parameters get none, so that the backward pass stops where nothing before needs a gradient.
    """
    gradients = torch.zeros_like(params.changing)
    views = Params(gradients, params.layout).views(frozen=False)
    for name, parameter in module.named_parameters():
        if name in views:
            parameter.grad = views[name]
        else:
            parameter.requires_grad_(False)
    return gradients


def _floating_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer


def _variance_names(module: nn.Module) -> set[str]:
    return {
        f"{name}.running_var" if name else "running_var"
        for name, child in module.named_modules()
        if isinstance(child, _BatchNorm)
    }


def _channels_last_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        _, channels, height, width = shape
        return (channels * height * width, 1, width * channels, channels)
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
