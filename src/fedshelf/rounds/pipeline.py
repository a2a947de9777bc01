"""What happens to an upload between training and the wire, and what undoes it at the server.

    delta → clip → noise → encode → mask or encrypt → wire

Encoding is the one stage there is so far. Each stage declares what it is; `problems` are checks on the declarations,
made when a run is configured, so that no unsafe combination ever starts.

The trainable segment [T] passes the run's codec, with error feedback where that is biased. Statistics [S - T] and
auxiliary vectors travel in bfloat16 then: they are small, and must not be sparse.

Shapes: T shared trainable values, S shared values.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedshelf.compression import budget, feedback
from fedshelf.compression.chain import Chain, decode, parse
from fedshelf.compression.codec_policy import HEADER_BYTES, CodecPolicy
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import AUXILIARY, STATISTICS, TRAINABLE, CompressedUpload, Upload
from fedshelf.core.params import Layout
from fedshelf.core.state import ClientState

MEMORY = "pipeline.memory"
"""Where a client's state keeps what its codec has left out so far [T]."""
SMALL = parse("bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Protection:
    """What privacy asks of the pipeline: `masked` by secure aggregation, `noised` for differential privacy."""

    masked: bool = False
    noised: bool = False


def problems(chain: Chain, protection: Protection) -> list[str]:
    """Why uploads may not be encoded by `chain` under `protection`; each with its remedy."""
    declared, found = chain.properties, []
    if protection.masked and not (declared.modular and declared.linear):
        found.append(
            f"--codec-up {chain} does not turn values into integers modulo a power of two, so masks would not cancel: "
            "use modular:BITS:RANGE, alone or after randk"
        )
    if protection.masked and declared.kept_fraction < 1 and not declared.common_seed:
        found.append(
            f"--codec-up {chain} lets every client choose which values it sends: masked sums need the same ones from "
            "all, and the choice itself tells of the photos: use randk, which all clients draw from one seed"
        )
    if protection.noised and declared.needs_error_feedback:
        found.append(
            f"--codec-up {chain} needs error feedback, which carries what was clipped and left out into later rounds: "
            "the noise is not measured for that. Use a codec without a sparsifier"
        )
    if protection.masked and chain.lossless is not None:
        found.append(f"--codec-up {chain}: masked values are random and cannot be made smaller: leave zstd out")
    return found


def least_budget(layout: Layout) -> int:
    """Bytes that any message with a model of `layout` fits into, whatever its values: the smallest byte budget."""
    num_statistics = layout.num_shared - layout.num_trainable
    return HEADER_BYTES + budget.least_bytes(layout.num_trainable) + 4 * num_statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadPipeline:
    """Both ends of the way of an upload."""

    codec_policy: CodecPolicy = CodecPolicy()  # noqa: RUF009  frozen

    def seal(
        self, upload: Upload, *, client: str, before: ClientState, after: ClientState, layout: Layout
    ) -> tuple[Upload | CompressedUpload, ClientState]:
        """What leaves the client, and the state it leads to: `after` (the algorithm's) and the codec's memory."""
        if self.codec_policy.is_plain:
            return upload, after
        trainable, statistics = upload.delta.split([layout.num_trainable, layout.num_shared - layout.num_trainable])
        small = {STATISTICS: statistics, **{AUXILIARY + name: v for name, v in upload.auxiliary.items()}}
        vectors = {name: SMALL.encode(vector, seed=0) for name, vector in small.items() if len(vector)}
        wanted = feedback.compensate(trainable, before.tensors.get(MEMORY)) if self._has_memory else trainable
        vectors[TRAINABLE] = self.codec_policy.encode(
            wanted, list(vectors.values()), purpose="codec-up", round=upload.key.round, client=client
        )  # fmt: skip
        if self._has_memory:
            left_out = feedback.residual(wanted, decode(vectors[TRAINABLE]))
            after = replace(after, tensors={**after.tensors, MEMORY: left_out})
        sealed = CompressedUpload(
            key=upload.key, vectors=vectors, num_examples=upload.num_examples, num_steps=upload.num_steps,
            train_loss=upload.train_loss, seconds=upload.seconds, batch_size=upload.batch_size,
            client_lr=upload.client_lr,
        )  # fmt: skip
        return sealed, after

    def open(self, sealed: Upload | CompressedUpload, layout: Layout) -> Upload:
        """The upload as the algorithm knows it.

        Raises:
            RefusedError: it is of another codec than the run's, or another size, or its parts contradict themselves.
        """
        if self.codec_policy.is_plain != isinstance(sealed, Upload):
            raise RefusedError(
                f"it is {'' if self.codec_policy.is_plain else 'not '}compressed: the client's configuration is another"
            )
        if isinstance(sealed, Upload):
            return sealed
        due = {TRAINABLE: layout.num_trainable, STATISTICS: layout.num_shared - layout.num_trainable}
        vectors = {name: self._decoded(name, encoded, due.get(name)) for name, encoded in sealed.vectors.items()}
        missing = [name for name, size in due.items() if size and name not in vectors]
        if missing:
            raise RefusedError(f"it does not hold the vectors {', '.join(missing)}")
        return Upload(
            key=sealed.key, delta=torch.cat([vectors.pop(name) for name in due if name in vectors]),
            num_examples=sealed.num_examples, num_steps=sealed.num_steps, train_loss=sealed.train_loss,
            seconds=sealed.seconds, batch_size=sealed.batch_size, client_lr=sealed.client_lr,
            auxiliary={name.removeprefix(AUXILIARY): vector for name, vector in vectors.items()},
        )  # fmt: skip

    @property
    def _has_memory(self) -> bool:
        return self.codec_policy.byte_budget is not None or self.codec_policy.codec.properties.needs_error_feedback

    def _decoded(self, name: str, encoded: Encoded, size: int | None) -> Tensor:
        if size is None and not name.startswith(AUXILIARY):
            raise RefusedError(f"it holds a vector {name!r}, which no upload has")
        by_budget = name == TRAINABLE and self.codec_policy.byte_budget is not None
        allowed = None if by_budget else [self.codec_policy.codec if name == TRAINABLE else SMALL]
        try:
            decoded = decode(encoded, size=size, allowed=allowed)
        except RefusedError as error:
            raise RefusedError(f"its {name} segment cannot be decoded: {error}") from None
        if by_budget and not budget.admits(parse(encoded.codec)):
            raise RefusedError(f"its {name} segment is encoded by {encoded.codec}, which no byte budget leads to")
        return decoded
