"""A vector in another form than float32, as a codec produces it and the wire carries it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """An encoded float32 vector.

    Attributes:
        codec: the codec chain that encoded it.
        size: number of float32 values.
        parts: one-dimensional tensors of the types that the wire supports (see `serialization.messages`), such as
            codes, scales and indices. Their meaning is up to the codec.
    """

    codec: str
    size: int
    parts: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Total size of all parts in bytes."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())
