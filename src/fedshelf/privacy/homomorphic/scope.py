"""Which codes of an upload are encrypted: all, or those of the output layer.

With ``model``, the server reads no code. With ``head``, it reads the change of the other layers of each store; the
output layer, whose rows belong to products, is encrypted, and so are the vectors of the algorithm and all scalars.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedshelf.compression.upload_grid import Field, Integers, UploadGrid
from fedshelf.core.errors import UsageError
from fedshelf.core.messages import DELTA
from fedshelf.core.params import Layout


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scope:
    """Which codes are encrypted.

    Attributes:
        bits: of the codes of each vector.
        masks: for each vector of codes, whether each code is encrypted.
    """

    bits: tuple[int, ...]
    masks: tuple[NDArray[np.bool_], ...]

    @classmethod
    def of(cls, grid: UploadGrid, layout: Layout, *, head: Collection[str] | None) -> "Scope":
        """The scope of a run's uploads.

        Args:
            grid: of the uploads.
            layout: of the model.
            head: names of the tensors of the output layer (``--he-scope head``); None: all is encrypted.

        Raises:
            UsageError: the model has no output layer that is trained.
        """
        names = {spec.offset: spec.name for spec in layout.tensors if spec.size}
        if head is not None and not set(head) & {names.get(one.start) for one in grid.fields if one.vector == DELTA}:
            raise UsageError("--he-scope head: this model sends no output layer; use --he-scope model")

        def is_encrypted(one: Field) -> bool:
            return head is None or one.vector != DELTA or names.get(one.start) in head

        masks: list[list[NDArray[np.bool_]]] = [[np.zeros(0, np.bool_)] for _ in grid.sizes]
        for one in grid.fields:
            masks[one.part].append(np.full(one.size, is_encrypted(one)))
        return cls(bits=tuple(bits for bits, _ in grid.sizes), masks=tuple(map(np.concatenate, masks)))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Bits and number of values of the vectors that are encrypted."""
        return tuple((bits, int(mask.sum())) for bits, mask in zip(self.bits, self.masks, strict=True))

    def split(self, codes: Sequence[Integers]) -> tuple[tuple[Integers, ...], tuple[Integers, ...]]:
        """The codes to encrypt, and the others."""
        pairs = list(zip(codes, self.masks, strict=True))
        return tuple(part[mask] for part, mask in pairs), tuple(part[~mask] for part, mask in pairs)

    def join(self, encrypted: Sequence[Integers], others: Sequence[Integers]) -> tuple[Integers, ...]:
        """The reverse of `split`."""
        codes = tuple(
            np.empty(mask.size, f"<u{bits // 8}") for bits, mask in zip(self.bits, self.masks, strict=True)
        )  # fmt: skip
        for part, mask, inside, outside in zip(codes, self.masks, encrypted, others, strict=True):
            part[mask], part[~mask] = inside, outside
        return codes
