"""All of an upload as integers that may be added modulo 2^BITS, for sums that the server sees only as a whole.

Every value has a grid (a step, and a number of levels) that is agreed before training: it follows from the layout and
from the codec's text (``modular:BITS[:RANGE[:SUMMANDS]]``, m = SUMMANDS), and never from a store's values.

    weight tensors of the model (at least two dimensions) [N]:                         BITS bits
        L <- floor((2^(BITS-1) - 1) / m)
        s <- RANGE / L; without a RANGE, REACH / sqrt(f) / L
        f: values that one output depends on (size / first dimension), of which the scale of initial weights follows
    biases, normalization and its statistics [B], float64 vectors [D], scalars [K]:    64 bits
        L <- 2^(62 - ceil(log2 m));  s <- 2^-32
    float32 vectors of the algorithm [A]:                                              32 bits
        L <- floor((2^31 - 1) / m);  s <- 64 / L

    encode, w the upload's weight, W the largest possible one:             all in float64
     1  x <- (w / W) · x          the model's values only: the algorithm's vectors are weighted equally
     2  q <- floor(clip(x / s, ±L) + u),  u uniform in [0, 1)
     3  q mod 2^BITS, in three vectors [N], [A], [B + D + K]
    decode the sum of up to m encodings:
     4  sum_i w_i x_i  ≈  W · s · q,  q read as a signed integer

Since |q| <= L, a sum never wraps. One encoding decodes, too: it is a sum of one. Sums do not depend on the order of
their terms, so any two ways to add up the same encodings agree bit for bit: under masks, or without.

A weight w < W uses w / W of the levels. With weights by examples this needs 32 bits: with 16 bits and 64 summands,
there are 511 levels in all. Scalars are not weighted here: a mean loss is sent as the product with its count.

Sums over photos (`is_exact`) are all float64. They are rounded to the nearest integer instead, so that the same photos
give the same integers in each round, and a value beyond L is an error: a clipped sum would not be one of any photos.

The few values with 64 bits (0.4 % of a ResNet) are those of unknown scale, for which the fixed step of 2^-32 is finer
than float32 above 2^-9, and the room is 2^24 in each direction with 64 summands.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.compression.dither import Dither
from fedshelf.compression.modular import Modular
from fedshelf.compression.stage import CHUNK
from fedshelf.core.errors import TrainingError, UsageError
from fedshelf.core.messages import DELTA
from fedshelf.core.params import Layout, Segment

logger = logging.getLogger(__name__)

Integers: TypeAlias = NDArray[np.unsignedinteger]
REACH = 6.0
"""Largest change of a weight in one round, as a multiple of 1 / sqrt(f). (Measured in the first eight rounds of the
acceptance benchmark: 3.3 in the head, 2.5 in convolutions.)
"""
AUXILIARY_BITS, AUXILIARY_RANGE = 32, 64.0
WIDE_BITS, WIDE_STEP = 64, 2.0**-32
_OFTEN = 0.001
"""Share of clipped values from which it is worth a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """Values on one grid.

    Attributes:
        vector: the vector's name.
        start: its first value.
        size: number of values.
        part: which vector of integers holds the codes: 0 for BITS, 1 for 32 and 2 for 64 bits.
        step: s.
        levels: L.
    """

    vector: str
    start: int
    size: int
    part: int
    step: float
    levels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadGrid:
    """The grids of a run's uploads.

    Attributes:
        codec: BITS, RANGE and SUMMANDS.
        fields: in the order of their codes.
        scalars: names of the numbers that are summed, too.
        max_weight: W; 1 if all uploads weigh alike.
        is_exact: whether values are sums over photos.
    """

    codec: Modular
    fields: tuple[Field, ...]
    scalars: tuple[str, ...] = ()
    max_weight: float = 1.0
    is_exact: bool = False
    _offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_weight != 1 and self.codec.bits < 32:
            raise UsageError(
                f"{self.codec.text} has no room for weights by examples: use modular:32, or weigh all stores alike "
                "(--weights equal)"
            )
        offsets, used = [], [0, 0, 0]
        for one in self.fields:
            offsets.append(used[one.part])
            used[one.part] += one.size
        object.__setattr__(self, "_offsets", (*offsets, *used))

    @classmethod
    def of(
        cls, codec: Modular, layout: Layout, *, has_delta: bool = True,
        auxiliary: Mapping[str, tuple[int, torch.dtype]] | None = None, scalars: Sequence[str] = (),
        max_weight: float = 1.0, is_exact: bool = False,
    ) -> "UploadGrid":  # fmt: skip
        """The grids for a model and an algorithm.

        Args:
            codec: BITS, RANGE and SUMMANDS.
            layout: the model's layout.
            has_delta: whether uploads hold a change of the model.
            auxiliary: size and type of the algorithm's vectors by name.
            scalars: names of the numbers that are summed, too.
            max_weight: W; 1 if all uploads weigh alike.
            is_exact: whether the algorithm's vectors are sums over photos.

        Raises:
            UsageError: weights need more bits.
        """
        wide, room = 2 ** (62 - (codec.summands - 1).bit_length()), codec.levels
        fields = [
            Field(
                vector=DELTA, start=spec.offset, size=spec.size, part=0 if is_weight else 2,
                step=_step(codec, spec.shape) if is_weight else WIDE_STEP, levels=room if is_weight else wide,
            )
            for spec in layout.tensors if has_delta and spec.segment in (Segment.TRAINABLE, Segment.STATISTICS)
            for is_weight in [len(spec.shape) > 1]
        ]  # fmt: skip
        levels = (2 ** (AUXILIARY_BITS - 1) - 1) // codec.summands
        for name, (size, dtype) in (auxiliary or {}).items():
            is_double = is_exact or dtype == torch.float64
            step = WIDE_STEP if is_double else AUXILIARY_RANGE / levels
            fields.append(
                Field(
                    vector=name, start=0, size=size, part=2 if is_double else 1, step=step,
                    levels=wide if is_double else levels,
                )
            )  # fmt: skip
        fields += [Field(vector="", start=0, size=len(scalars), part=2, step=WIDE_STEP, levels=wide)]
        return cls(
            codec=codec, fields=tuple(fields), scalars=tuple(scalars), max_weight=max_weight, is_exact=is_exact
        )  # fmt: skip

    @classmethod
    def of_ball(
        cls, codec: Modular, sizes: Mapping[str, int], levels: int, *, wide: Sequence[str] = (),
        scalars: Sequence[str] = (),
    ) -> "UploadGrid":  # fmt: skip
        """One grid for vectors that together have a norm of at most 1 (`unit_ball`), all in the first part.

        Args:
            codec: BITS, RANGE and SUMMANDS. The range is 1.
            sizes: of the vectors by name.
            levels: K.
            wide: names of vectors of a single value, with 64 bits.
            scalars: names of the numbers that are summed, too.
        """
        room = 2 ** (62 - (codec.summands - 1).bit_length())
        fields = [
            Field(vector=name, start=0, size=size, part=0, step=1 / levels, levels=levels + 1)
            for name, size in sizes.items()
        ]
        fields += [
            Field(vector=name, start=0, size=size, part=2, step=WIDE_STEP, levels=room)
            for name, size in (*((name, 1) for name in wide), ("", len(scalars)))
        ]
        return cls(codec=codec, fields=tuple(fields), scalars=tuple(scalars))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Bits and number of values of the three vectors of integers."""
        bits = (self.codec.bits, AUXILIARY_BITS, WIDE_BITS)
        return tuple(zip(bits, self._offsets[-3:], strict=True))

    def encode(
        self, vectors: Mapping[str, Tensor], scalars: Mapping[str, float], *, weight: float, seed: int
    ) -> tuple[Integers, ...]:
        """Lines 1 to 3.

        Args:
            vectors: finite, on the CPU, by name: the change of the model, and those of the algorithm.
            scalars: by name.
            weight: w.
            seed: for rounding; must differ between clients and rounds.

        Returns:
            Three vectors of integers (see `sizes`).

        Raises:
            TrainingError: values are not finite, or are sums over photos that are too large.
        """
        dither, num_clipped = Dither(seed), 0
        codes = self.zeros()
        numbers = {"": torch.tensor([scalars[name] for name in self.scalars], dtype=torch.float64), **vectors}
        noise = np.empty(CHUNK, np.float32)
        for one, offset in zip(self.fields, self._offsets, strict=False):
            values = numbers[one.vector].numpy()[one.start : one.start + one.size]
            out = codes[one.part][offset : offset + one.size]
            factor = (weight / self.max_weight if one.vector == DELTA else 1.0) / one.step
            for start in range(0, one.size, CHUNK):
                chunk = values[start : start + CHUNK] * np.float64(factor)  # line 1
                low, high = float(chunk.min()), float(chunk.max())
                if not math.isfinite(high - low):
                    raise TrainingError(f"the values to send ({one.vector}) are not finite: training has diverged")
                if self.is_exact:
                    self._check_range(max(high, -low), one)
                    out[start : start + CHUNK] = np.rint(chunk, out=chunk).astype("<i8").view(out.dtype)
                    continue
                if max(high, -low) > one.levels:
                    num_clipped += int(np.count_nonzero(np.abs(chunk) > one.levels))
                    np.clip(chunk, -one.levels, one.levels, out=chunk)
                dither.fill(noise[: -(-chunk.size // 4) * 4])
                chunk += noise[: chunk.size]
                signed = np.floor(chunk, out=chunk).astype(f"<i{out.itemsize}")  # line 2
                out[start : start + CHUNK] = signed.view(out.dtype)  # line 3
        total = sum(size for _, size in self.sizes)
        if num_clipped > _OFTEN * total:
            logger.warning(
                "%d of %d values to send are outside the range of %s, and were clipped: lower the learning rate, or "
                "give it a larger RANGE", num_clipped, total, self.codec.text,
            )  # fmt: skip
        return codes

    def _check_range(self, largest: float, field: Field) -> None:
        if largest > field.levels:
            fewer = max(1, self.codec.summands // 2 ** math.ceil(math.log2(largest / field.levels)))
            raise TrainingError(
                f"a sum over the photos of this store is {largest * field.step:.4g}, and codes of which "
                f"{self.codec.summands} fit into 64 bits reach {field.levels * field.step:.4g}. Start the run with "
                f"room for fewer stores: --codec-up modular:{self.codec.bits}:0:{fewer}",
                will_repeat=True,
            )

    def zeros(self) -> tuple[Integers, ...]:
        """The sum of no encodings."""
        return tuple(np.zeros(size, f"<u{bits // 8}") for bits, size in self.sizes)

    def decode(self, codes: Sequence[Integers]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Line 4.

        Args:
            codes: the sum of encodings, of the right sizes.

        Returns:
            By name, the sums of the vectors [n], in float64, and of the scalars.
        """
        sizes: dict[str, int] = {}
        for one in self.fields:
            sizes[one.vector] = sizes.get(one.vector, 0) + one.size
        found = {name: torch.empty(size, dtype=torch.float64) for name, size in sizes.items()}
        for one, values in self._codes(codes):
            scale = one.step * (self.max_weight if one.vector == DELTA else 1.0)
            np.multiply(values, scale, out=found[one.vector].numpy()[one.start : one.start + one.size])
        scalars = found.pop("").tolist()
        return found, dict(zip(self.scalars, scalars, strict=True))

    def _codes(self, codes: Sequence[Integers]) -> Iterator[tuple[Field, NDArray[np.signedinteger]]]:
        """The signed codes of each field."""
        for one, offset in zip(self.fields, self._offsets, strict=False):
            part = codes[one.part][offset : offset + one.size]
            yield one, part.view(f"<i{part.itemsize}")


def _step(codec: Modular, shape: tuple[int, ...]) -> float:
    """s of a weight tensor."""
    return codec.step if codec.range else REACH / math.sqrt(math.prod(shape[1:])) / codec.levels
