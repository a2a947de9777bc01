"""Growth of a model by classes: its output layers get new rows, and the values of the others stay as they are.

Shapes: K classes before and L > K after; T shared trainable, S shared and M - S personal values of the grown model.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedshelf.core.errors import ModelError
from fedshelf.core.params import Layout, Segment, TensorSpec
from fedshelf.core.text import counted

_TRAINABLE = frozenset({Segment.TRAINABLE})
_SHARED = _TRAINABLE | {Segment.STATISTICS}
_PERSONAL = frozenset({Segment.PERSONAL})


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """The growth of a model's vectors by classes, which come after the known ones.

    A new row of the model is the mean of the others. The logit of a new class is then the mean of the others, so that
    it never is the first guess, and its probability is at most 1 / (K + 1) (Jensen's inequality) until it is trained.

    Attributes:
        layout: the grown model's layout.
        rows: names of the tensors with one row of values per class.
        before: K.
        after: L.

    Raises:
        ModelError: the model cannot grow.
    """

    layout: Layout
    rows: frozenset[str]
    before: int
    after: int

    def __post_init__(self) -> None:
        specs = [spec for spec in self.layout.tensors if spec.name in self.rows]
        if not 0 < self.before < self.after or not specs:
            raise ModelError(
                f"a model cannot grow from {self.before} to {counted(self.after, 'class', 'classes')}: "
                + ("it has no output layer that could be found" if not specs else "classes are only added")
            )
        if any(spec.segment is Segment.FROZEN for spec in specs):
            raise ModelError("the output layer of this run is frozen, so it cannot learn a new product")
        if wrong := [spec.name for spec in specs if spec.shape[0] != self.after]:
            raise ModelError(f"{', '.join(wrong)} does not have one row for each class ({self.after})")

    def shared(self, vector: Tensor) -> Tensor:
        """A model's shared values [S]."""
        return self._grown(vector, _SHARED, None)

    def personal(self, vector: Tensor) -> Tensor:
        """A model's personal values [M - S]."""
        return self._grown(vector, _PERSONAL, None)

    def trainable(self, vector: Tensor, *, fill: float = 0.0) -> Tensor:
        """A vector that an algorithm keeps for the trainable values [T], such as a momentum.

        Args:
            vector: the vector, before.
            fill: the value of each new coordinate: what it has before the first round.
        """
        return self._grown(vector, _TRAINABLE, fill)

    def of_size(self, vector: Tensor) -> Tensor | None:
        """A vector of trainable or shared values with zeros for the new rows; None if it is neither."""
        for segments in (_TRAINABLE, _SHARED):
            if len(vector) == sum(self._size(spec) for spec in self._specs(segments)):
                return self._grown(vector, segments, 0.0)
        return None

    def _specs(self, segments: Collection[Segment]) -> Sequence[TensorSpec]:
        return [spec for spec in self.layout.tensors if spec.segment in segments]

    def _size(self, spec: TensorSpec) -> int:
        """The size of a tensor before."""
        return spec.size // self.after * self.before if spec.name in self.rows else spec.size

    def _grown(self, vector: Tensor, segments: Collection[Segment], fill: float | None) -> Tensor:
        specs = self._specs(segments)
        sizes = [self._size(spec) for spec in specs]
        if len(vector) != sum(sizes):
            raise ModelError(
                f"a vector of {counted(len(vector), 'value')} is not that of the model before its growth, which has "
                f"{sum(sizes):,}: its size depends on the classes in more than its output layer"
            )
        parts = [vector[:0]]
        for spec, part in zip(specs, vector.split(sizes), strict=True):
            parts.append(part)
            if spec.name in self.rows:
                rows = part.reshape(self.before, -1)
                row = rows.double().mean(0).to(rows) if fill is None else rows.new_full((rows.shape[1],), fill)
                parts.append(row.repeat(self.after - self.before))
        return torch.cat(parts)
