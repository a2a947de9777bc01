"""The codec of vectors in one direction: the run's, or one chosen by a byte budget."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fedshelf.compression import budget
from fedshelf.compression.chain import Chain, parse
from fedshelf.core.encoded import Encoded
from fedshelf.core.params import Layout
from fedshelf.core.rng import Rng

HEADER_BYTES = 1024  # reserved by a budget for everything but vectors


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecPolicy:
    """The codec of one direction.

    Attributes:
        codec: the chain for the trainable segment.
        byte_budget: maximum size of a message in bytes; the codec is then chosen per message, and `codec` is
            ignored.
        rng: the run's root generator.
    """

    codec: Chain = field(default_factory=lambda: parse("none"))
    byte_budget: int | None = None
    rng: Rng = Rng(0)  # noqa: RUF009  frozen

    @property
    def is_plain(self) -> bool:
        """Whether vectors are sent unencoded."""
        return self.byte_budget is None and str(self.codec) == "none"

    def encode(
        self, vector: Tensor, others: Iterable[Encoded], *, purpose: str, round: int, client: str = ""
    ) -> Encoded:  # fmt: skip
        """Encode `vector` [T].

        Args:
            vector: the trainable segment.
            others: the other vectors of the message, which share its budget.
            purpose: keys the draws.
            round: keys the draws.
            client: keys the draws.
        """
        seed = self.rng.fork(round=round, client=client, purpose=purpose).seed
        if self.byte_budget is not None:
            rest = self.byte_budget - HEADER_BYTES - sum(encoded.num_bytes for encoded in others)
            return budget.fit(vector, max_bytes=rest, seed=seed)
        common = self.rng.fork(round=round, purpose=purpose).seed
        return self.codec.encode(vector, seed=seed, support_seed=common)


def least_budget(layout: Layout) -> int:
    """The smallest byte budget: any message with a model of `layout` fits, whatever its values."""
    num_statistics = layout.num_shared - layout.num_trainable
    return HEADER_BYTES + budget.least_bytes(layout.num_trainable) + 4 * num_statistics
