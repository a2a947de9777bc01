"""The pipeline stage that turns all of an upload into integers for a sum (`upload_grid`).

    seal:   q <- grid.encode(vectors, scalars);  send q as one encoded vector; numbers in the header are withheld
    open:   check the types and lengths of q; it stays encoded
    server: decode(sum_i q_i)                    once, with or without masks

An upload is not decoded by itself. So the sum is the same in every bit, whether the codes arrive in the clear or under
masks, which a later stage adds to the same parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedshelf.compression.upload_grid import Integers, UploadGrid
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Upload
from fedshelf.core.params import Layout
from fedshelf.core.rng import Rng
from fedshelf.core.stages import Declaration

SUMMAND = "summand"
"""Name of the encoded vector."""
PARTS = ("narrow", "auxiliary", "wide")
"""Names of its parts; empty ones are not sent."""
SCALARS = ("weight", "num_examples", "num_steps", "loss", "loss_weight")
"""Numbers that are summed. `loss` is weight times mean loss, `loss_weight` the weight of the uploads that have one."""
_SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSummand:
    """The stage.

    Attributes:
        grid: for `SCALARS`.
        weight: the algorithm's weight of an upload.
        rng: the run's root generator.
    """

    grid: UploadGrid
    weight: Callable[[Upload], float]
    rng: Rng

    @property
    def declares(self) -> Declaration:
        return Declaration(
            name="codec", setting=f"--codec-up {self.grid.codec.text}", encodes=True, modular=True, linear=True
        )

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        weight = self.weight(upload)
        has_loss = upload.train_loss is not None
        scalars = {
            "weight": weight, "num_examples": upload.num_examples or 0, "num_steps": upload.num_steps or 0,
            "loss": weight * (upload.train_loss or 0.0), "loss_weight": weight * has_loss,
        }  # fmt: skip
        seed = self.rng.fork(round=upload.key.round, client=client, purpose="codec-up").seed
        codes = self.grid.encode(upload.plain_vectors, scalars, weight=weight, seed=seed)
        return self.with_codes(upload, codes), None

    def open(self, upload: Upload, layout: Layout) -> Upload:
        self.codes(upload)
        return upload

    def with_codes(self, upload: Upload, codes: tuple[Integers, ...]) -> Upload:
        """The upload with these codes alone. Its header has none of the numbers that are summed."""
        parts = {
            name: torch.from_numpy(part.view(f"<i{part.itemsize}"))
            for name, part in zip(PARTS, codes, strict=True)
            if part.size
        }
        encoded = Encoded(codec=self.grid.codec.text, size=sum(size for _, size in self.grid.sizes), parts=parts)
        return replace(upload, vectors={SUMMAND: encoded}, num_examples=None, num_steps=None, train_loss=None)

    def codes(self, upload: Upload) -> tuple[Integers, ...]:
        """The codes of an upload, as views of its parts.

        Raises:
            RefusedError: it has another codec, or parts of another type or length.
        """
        encoded, text = upload.vectors.get(SUMMAND), self.grid.codec.text
        if not isinstance(encoded, Encoded) or len(upload.vectors) != 1:
            raise RefusedError("it is not encoded for a sum: the client's configuration is another")
        if encoded.codec != text:
            raise RefusedError("a vector encoded by another codec arrived where " + repr(text) + " was expected")
        sizes = dict(zip(PARTS, self.grid.sizes, strict=True))
        wanted = {name: (_SIGNED[bits], (size,)) for name, (bits, size) in sizes.items() if size}
        if {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()} != wanted:
            raise RefusedError("the encoded vector's parts have other names, types or lengths than those due")
        empty = dict(zip(PARTS, self.grid.zeros(), strict=True))
        return tuple(
            encoded.parts[name].contiguous().numpy().view(f"<u{bits // 8}") if size else empty[name]
            for name, (bits, size) in sizes.items()
        )
