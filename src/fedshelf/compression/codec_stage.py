"""The pipeline stage that encodes uploads with the run's codec.

The trainable segment [T] passes the codec, with error feedback if that is biased. Statistics [S - T] and auxiliary
vectors are sent in bfloat16: they are small, and must not be sparse.

Shapes: T shared trainable values, S shared values.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedshelf.compression import budget, feedback
from fedshelf.compression.chain import decode, parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import AUXILIARY, DELTA, STATISTICS, TRAINABLE, Upload
from fedshelf.core.params import Layout
from fedshelf.core.stages import Declaration

SMALL = parse("bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encode:
    """The codec's stage.

    Attributes:
        policy: the codec.
    """

    policy: CodecPolicy

    @property
    def declares(self) -> Declaration:
        budgeted, declared = self.policy.byte_budget is not None, self.policy.codec.properties
        return Declaration(
            name="codec", setting="--byte-budget" if budgeted else f"--codec-up {self.policy.codec}", encodes=True,
            modular=declared.modular and not budgeted, linear=declared.linear and not budgeted,
            chooses_values=budgeted or (declared.kept_fraction < 1 and not declared.common_seed),
            carries_over=self._has_memory, compresses=budgeted or self.policy.codec.lossless is not None,
        )  # fmt: skip

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        trainable, statistics = upload.delta.split([layout.num_trainable, layout.num_shared - layout.num_trainable])
        small = {STATISTICS: statistics, **{AUXILIARY + name: vector for name, vector in upload.auxiliary.items()}}
        vectors = {name: SMALL.encode(vector, seed=0) for name, vector in small.items() if len(vector)}
        wanted = feedback.compensate(trainable, memory) if self._has_memory else trainable
        vectors[TRAINABLE] = self.policy.encode(
            wanted, list(vectors.values()), purpose="codec-up", round=upload.key.round, client=client
        )
        left_out = feedback.residual(wanted, decode(vectors[TRAINABLE])) if self._has_memory else None
        return replace(upload, vectors=vectors), left_out

    def open(self, upload: Upload, layout: Layout) -> Upload:
        if upload.is_plain:
            raise RefusedError("it is not compressed: the client's configuration is another")
        expected = {TRAINABLE: layout.num_trainable, STATISTICS: layout.num_shared - layout.num_trainable}
        vectors = {name: self._decoded(name, vector, expected.get(name)) for name, vector in upload.vectors.items()}
        missing = [name for name, size in expected.items() if size and name not in vectors]
        if missing:
            raise RefusedError(f"it does not hold the vectors {', '.join(missing)}")
        delta = torch.cat([vectors.pop(name) for name in expected if name in vectors])
        return replace(upload, vectors={DELTA: delta, **vectors})

    @property
    def _has_memory(self) -> bool:
        return self.policy.byte_budget is not None or self.policy.codec.properties.needs_error_feedback

    def _decoded(self, name: str, vector: Tensor | Encoded, size: int | None) -> Tensor:
        if size is None and not name.startswith(AUXILIARY):
            raise RefusedError(f"it holds a vector {name!r}, which no upload has")
        if isinstance(vector, Tensor):
            raise RefusedError(f"its vector {name!r} is not encoded")
        by_budget = name == TRAINABLE and self.policy.byte_budget is not None
        allowed = None if by_budget else [self.policy.codec if name == TRAINABLE else SMALL]
        try:
            decoded = decode(vector, size=size, allowed=allowed)
        except RefusedError as error:
            raise RefusedError(f"its {name} segment cannot be decoded: {error}") from None
        if by_budget and not budget.admits(parse(vector.codec)):
            raise RefusedError(f"its {name} segment is encoded by {vector.codec}, which no byte budget leads to")
        return decoded
