"""Codes of an upload as values of slots, and sums of slots as sums of codes.

    codes of BITS <= 32 bits, signed:   v <- sum_j c_j · 2^(BITS · j),  j < 32 / BITS: several codes in one slot
    codes of 64 bits:                   v_j <- (c >> W·j) mod 2^W,  W = 32 - ceil(log2 m): one code in several slots

m is the number of summands that the codec has room for (`UploadGrid`). Sums of up to m codes of BITS fit in BITS with
their sign, and sums of m values of W bits in 32 bits. So no sum wraps modulo t, and the sums are those of the plain
integers modulo 2^BITS, bit for bit.

Each vector of codes begins with a new ciphertext. Only the slots of one ciphertext exist at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedshelf.compression.upload_grid import Integers
from fedshelf.core.errors import RefusedError, UsageError
from fedshelf.core.text import counted
from fedshelf.privacy.homomorphic.parameters import PARAMETERS, SLOT_BITS, Parameters

Slots = NDArray[np.int64]
MOST_WEIGHT = 16
"""Largest weight of an upload. With weights that differ more, single uploads could be told apart in a sum."""
_LEAST_LIMB_BITS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How an upload fills slots.

    Attributes:
        sizes: bits and number of values of each vector of codes (`UploadGrid.sizes`).
        summands: m, how many uploads can be added.
        parameters: of BFV.
    """

    sizes: tuple[tuple[int, int], ...]
    summands: int
    parameters: Parameters = PARAMETERS

    def __post_init__(self) -> None:
        """Check that sums of so many uploads are exact.

        Raises:
            UsageError: they are not.
        """
        if self.summands > self.parameters.most_members or self._limb_bits < _LEAST_LIMB_BITS:
            raise UsageError(
                f"homomorphic encryption cannot add as many uploads as the codec has room for ({self.summands:,}): set "
                f"SUMMANDS to at most {min(self.parameters.most_members, 1 << (SLOT_BITS - _LEAST_LIMB_BITS)):,}"
            )
        if any(bits not in (8, 16, 32, 64) for bits, _ in self.sizes):
            raise UsageError("codes for homomorphic encryption have 8, 16, 32 or 64 bits")

    @property
    def num_ciphertexts(self) -> int:
        """Ciphertexts of an upload."""
        return sum(-(-size // self._codes_each(bits)) for bits, size in self.sizes)

    @property
    def upload_bytes(self) -> int:
        """Bytes of an encrypted upload."""
        return self.num_ciphertexts * self.parameters.ciphertext_bytes

    def pack(self, codes: Sequence[Integers]) -> Iterator[Slots]:
        """The slots of one ciphertext after another.

        Args:
            codes: of `sizes`.

        Raises:
            RefusedError: they have other types or lengths.
        """
        self._check(codes)
        for bits, part in zip((bits for bits, _ in self.sizes), codes, strict=True):
            each = self._codes_each(bits)
            for start in range(0, part.size, each):
                yield self._packed(bits, part[start : start + each])

    def unpack(self, sums: Iterable[Slots]) -> tuple[Integers, ...]:
        """The sums of codes.

        Args:
            sums: of the slots of one ciphertext after another, between -t/2 and t/2.
        """
        codes = tuple(np.empty(size, f"<u{bits // 8}") for bits, size in self.sizes)
        remaining = iter(sums)
        for (bits, size), part in zip(self.sizes, codes, strict=True):
            each = self._codes_each(bits)
            for start in range(0, size, each):
                part[start : start + each] = self._unpacked(bits, next(remaining))[: size - start]
        return codes

    def check_weights(self, weights: Sequence[int]) -> None:
        """Check that a sum of uploads with these weights is exact.

        Args:
            weights: of the uploads, 1 if they are not weighted.

        Raises:
            RefusedError: a weight is not allowed, or the codec or the noise has no room for them.
        """
        if not all(1 <= weight <= MOST_WEIGHT for weight in weights):
            raise RefusedError(f"weights under homomorphic encryption are integers from 1 to {MOST_WEIGHT}")
        if sum(weights) > self.summands:
            raise RefusedError(
                f"{counted(len(weights), 'upload')} with a total weight of {sum(weights)} cannot be added: the codec "
                f"has room for {self.summands}"
            )
        self.parameters.check_members(sum(weight**2 for weight in weights))  # their noise grows like so many

    @property
    def _limb_bits(self) -> int:
        """W."""
        return SLOT_BITS - (self.summands - 1).bit_length()

    def _codes_each(self, bits: int) -> int:
        """Codes of one ciphertext."""
        degree = self.parameters.degree
        return degree * (SLOT_BITS // bits) if bits <= SLOT_BITS else degree // self._num_limbs

    @property
    def _num_limbs(self) -> int:
        return -(-64 // self._limb_bits)

    def _packed(self, bits: int, codes: Integers) -> Slots:
        slots = np.zeros(self.parameters.degree, np.int64)
        if bits <= SLOT_BITS:
            per_slot = SLOT_BITS // bits
            padded = np.zeros(slots.size * per_slot, np.int64)
            padded[: codes.size] = codes.view(f"<i{bits // 8}")
            for number in range(per_slot):
                slots += padded[number::per_slot] << (bits * number)
            return slots
        width = self._codes_each(bits)
        for number in range(self._num_limbs):
            limbs = (codes >> np.uint64(self._limb_bits * number)) & np.uint64((1 << self._limb_bits) - 1)
            slots[number * width : number * width + codes.size] = limbs
        return slots

    def _unpacked(self, bits: int, slots: Slots) -> Integers:
        if bits <= SLOT_BITS:
            per_slot = SLOT_BITS // bits
            codes = np.empty(slots.size * per_slot, f"<i{bits // 8}")
            for number in range(per_slot):
                codes[number::per_slot] = slots  # modulo 2^bits, with sign
                slots = (slots - codes[number::per_slot]) >> bits
            return codes.view(f"<u{bits // 8}")
        width, total = self._codes_each(bits), np.zeros(self._codes_each(bits), np.uint64)
        for number in range(self._num_limbs):
            limbs = slots[number * width : (number + 1) * width] % self.parameters.plain_modulus
            total += limbs.astype(np.uint64) << np.uint64(self._limb_bits * number)
        return total

    def _check(self, codes: Sequence[Integers]) -> None:
        found = [(part.dtype.str, part.shape) for part in codes]
        wanted = [(np.dtype(f"<u{bits // 8}").str, (size,)) for bits, size in self.sizes]
        if found != wanted:
            raise RefusedError(f"the codes to encrypt are vectors of {found} instead of {wanted}")
