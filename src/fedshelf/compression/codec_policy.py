"""How the vectors of one direction are written down: by the run's codec, or by what a byte budget leads to."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fedshelf.compression import budget
from fedshelf.compression.chain import Chain, parse
from fedshelf.core.encoded import Encoded
from fedshelf.core.params import Layout
from fedshelf.core.rng import Rng

HEADER_BYTES = 1024  # what a budget sets aside for everything that is no vector


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecPolicy:
    """One direction's codec.

    Args:
        codec: the chain for the trainable segment.
        byte_budget: bytes that a message may have; the codec is then chosen for each (`codec` is not used).
        rng: the run's root.
    """

    codec: Chain = field(default_factory=lambda: parse("none"))
    byte_budget: int | None = None
    rng: Rng = Rng(0)  # noqa: RUF009  frozen

    @property
    def is_plain(self) -> bool:
        """Vectors travel as they are."""
        return self.byte_budget is None and str(self.codec) == "none"

    def encode(
        self, vector: Tensor, beside: Iterable[Encoded], *, purpose: str, round: int, client: str = ""
    ) -> Encoded:  # fmt: skip
        """`vector` [T] written down, within the budget together with what travels `beside` it."""
        seed = self.rng.fork(round=round, client=client, purpose=purpose).seed
        if self.byte_budget is not None:
            rest = self.byte_budget - HEADER_BYTES - sum(encoded.num_bytes for encoded in beside)
            return budget.fit(vector, max_bytes=rest, seed=seed)
        common = self.rng.fork(round=round, purpose=purpose).seed
        return self.codec.encode(vector, seed=seed, support_seed=common)


def least_budget(layout: Layout) -> int:
    """Bytes that any message with a model of `layout` fits into, whatever its values: the smallest byte budget."""
    num_statistics = layout.num_shared - layout.num_trainable
    return HEADER_BYTES + budget.least_bytes(layout.num_trainable) + 4 * num_statistics
