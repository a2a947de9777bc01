"""A vector in another form than float32: what a codec makes, and what the wire carries."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """A float32 vector of `size` values as the chain `codec` wrote it down.

    `parts` are one-dimensional tensors of the types that the wire knows (see `serialization.messages`): codes, scales,
    indices. What they mean is the codec's matter.
    """

    codec: str
    size: int
    parts: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())
