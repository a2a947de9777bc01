"""The pipeline stage that turns all of an upload into integers for a sum (`upload_grid`).

    seal:   q <- grid.encode(vectors, scalars);  send q as one encoded vector; numbers in the header are withheld
            of vectors in the unit ball: again, until ‖q‖² is within the bound (`unit_ball`)
    open:   check the types and lengths of q; it stays encoded
    server: decode(sum_i q_i)                    once, with or without masks

An upload is not decoded by itself. So the sum is the same in every bit, whether the codes arrive in the clear or under
masks, which a later stage adds to the same parts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedshelf.compression.modular import Modular
from fedshelf.compression.unit_ball import ATTEMPTS, WITHIN, IntegerBall, UnitBall
from fedshelf.compression.upload_grid import Integers, UploadGrid
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import DELTA, Upload
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
        codec: BITS, RANGE and SUMMANDS.
        vectors: returns size and type of an upload's vectors by name.
        weight: the algorithm's weight of an upload, at most `max_weight`.
        max_weight: the largest weight; 1 if all uploads weigh alike.
        rng: the run's root generator.
        is_exact: whether uploads are sums over photos.
        unit_ball: how vectors are encoded that clients scale to a norm of at most 1; None: they do not.
    """

    codec: Modular
    vectors: Callable[[Layout], Mapping[str, tuple[int, torch.dtype]]]
    weight: Callable[[Upload], float]
    max_weight: float
    rng: Rng
    is_exact: bool = False
    unit_ball: UnitBall | None = None
    _grids: dict[str, UploadGrid] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def declares(self) -> Declaration:
        return Declaration(
            name="codec", setting=f"--codec-up {self.codec.text}", encodes=True, modular=True, linear=True
        )

    def of_sums(self, vectors: Callable[[Layout], Mapping[str, tuple[int, torch.dtype]]]) -> "EncodeSummand":
        """The stage for uploads that are sums over photos, which all weigh alike.

        Args:
            vectors: returns size and type of such an upload's vectors by name.
        """
        return EncodeSummand(
            codec=self.codec, vectors=vectors, weight=lambda upload: 1.0, max_weight=1.0, rng=self.rng, is_exact=True
        )  # fmt: skip

    def grid(self, layout: Layout) -> UploadGrid:
        """The grids of this run's uploads."""
        found = self._grids.get(layout.digest)
        if found is None:
            found = self._grids[layout.digest] = self._grid(layout)
        return found

    def ball(self, layout: Layout) -> IntegerBall | None:
        """The bound on the integers of an upload; None: they have none.

        Raises:
            UsageError: there is no room for a sum of them.
        """
        if self.unit_ball is None:
            return None
        return self.unit_ball.integers(self.codec, sum(size for size, _ in self.vectors(layout).values()))

    def _grid(self, layout: Layout) -> UploadGrid:
        auxiliary, ball = dict(self.vectors(layout)), self.ball(layout)
        if ball is not None and self.unit_ball is not None:
            sizes = {name: size for name, (size, _) in auxiliary.items() if size}
            wide = (WITHIN,) if self.unit_ball.has_within else ()
            return UploadGrid.of_ball(self.codec, sizes, ball.levels, wide=wide, scalars=SCALARS)
        size, _ = auxiliary.pop(DELTA)
        return UploadGrid.of(
            self.codec, layout, has_delta=size > 0, auxiliary=auxiliary, scalars=SCALARS, max_weight=self.max_weight,
            is_exact=self.is_exact,
        )  # fmt: skip

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        weight = min(self.weight(upload), self.max_weight)
        has_loss = upload.train_loss is not None
        scalars = {
            "weight": weight, "num_examples": upload.num_examples or 0, "num_steps": upload.num_steps or 0,
            "loss": weight * (upload.train_loss or 0.0), "loss_weight": weight * has_loss,
        }  # fmt: skip
        seed = self.rng.fork(round=upload.key.round, client=client, purpose="codec-up").seed
        vectors = {name: vector.cpu() for name, vector in upload.plain_vectors.items() if len(vector)}
        grid, ball = self.grid(layout), self.ball(layout)
        codes = grid.encode(vectors, scalars, weight=weight, seed=seed)
        if ball is not None:
            for attempt in range(1, ATTEMPTS + 1):
                if ball.contains(codes[0].view(f"<i{codes[0].itemsize}")):
                    break
                if attempt == ATTEMPTS:
                    vectors = {name: vector if name == WITHIN else ball.toward_zero(vector)
                               for name, vector in vectors.items()}  # fmt: skip
                codes = grid.encode(vectors, scalars, weight=weight, seed=seed + attempt)
        return self.with_codes(upload, codes), None

    def open(self, upload: Upload, layout: Layout) -> Upload:
        self.codes(upload, layout)
        return upload

    def with_codes(self, upload: Upload, codes: tuple[Integers, ...]) -> Upload:
        """The upload with these codes alone. Its header has none of the numbers that are summed."""
        parts = {
            name: torch.from_numpy(part.view(f"<i{part.itemsize}"))
            for name, part in zip(PARTS, codes, strict=True)
            if part.size
        }
        encoded = Encoded(codec=self.codec.text, size=sum(part.size for part in codes), parts=parts)
        return replace(upload, vectors={SUMMAND: encoded}, num_examples=None, num_steps=None, train_loss=None)

    def codes(self, upload: Upload, layout: Layout) -> tuple[Integers, ...]:
        """The codes of an upload, as views of its parts.

        Raises:
            RefusedError: it has another codec, or parts of another type or length.
        """
        encoded, text, grid = upload.vectors.get(SUMMAND), self.codec.text, self.grid(layout)
        if not isinstance(encoded, Encoded) or len(upload.vectors) != 1:
            raise RefusedError("it is not encoded for a sum: the client's configuration is another")
        if encoded.codec != text:
            raise RefusedError("a vector encoded by another codec arrived where " + repr(text) + " was expected")
        sizes = dict(zip(PARTS, grid.sizes, strict=True))
        wanted = {name: (_SIGNED[bits], (size,)) for name, (bits, size) in sizes.items() if size}
        if {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()} != wanted:
            raise RefusedError("the encoded vector's parts have other names, types or lengths than those due")
        empty = dict(zip(PARTS, grid.zeros(), strict=True))
        return tuple(
            encoded.parts[name].contiguous().numpy().view(f"<u{bits // 8}") if size else empty[name]
            for name, (bits, size) in sizes.items()
        )
