"""Ciphertexts as they are sent and added: coefficients, and nothing else.

An upload is a matrix of bytes [ciphertexts, 2 · N · 6]: for each ciphertext its two polynomials modulo q, each
coefficient as a little-endian integer of 48 bits. There is no header to parse, so nothing to get wrong but the size,
which is known, and coefficients of q or more, which are refused. Bytes from the network never reach SEAL's parser.

Adding ciphertexts is adding coefficients modulo q, and so is weighting them by small integers. The server needs neither
a key nor SEAL for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.errors import RefusedError
from fedshelf.core.text import printable
from fedshelf.privacy.homomorphic.packing import Packing
from fedshelf.privacy.homomorphic.parameters import COEFFICIENT_BYTES, Parameters

Bytes = NDArray[np.uint8]
Coefficients = NDArray[np.uint64]


def to_bytes(coefficients: Coefficients) -> Bytes:
    """Encode coefficients, 6 bytes each."""
    return coefficients.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :COEFFICIENT_BYTES].reshape(-1)


def from_bytes(content: Bytes, prime: int, *, what: str) -> Coefficients:
    """Decode coefficients.

    Args:
        content: of any origin; of a size that was checked.
        prime: they are smaller.
        what: for the error.

    Raises:
        RefusedError: they are not.
    """
    wide = np.zeros((content.size // COEFFICIENT_BYTES, 8), np.uint8)
    wide[:, :COEFFICIENT_BYTES] = content.reshape(-1, COEFFICIENT_BYTES)
    coefficients: Coefficients = wide.view("<u8").reshape(-1)
    if int(coefficients.max(initial=0)) >= prime:
        raise RefusedError(f"{what} has coefficients that are not reduced modulo {prime}")
    return coefficients


def check_upload(upload: Bytes, packing: Packing, *, what: str) -> None:
    """Check type and size of an encrypted upload.

    Raises:
        RefusedError: they differ from those due.
    """
    wanted = (packing.num_ciphertexts, packing.parameters.ciphertext_bytes)
    if upload.dtype != np.uint8 or upload.shape != wanted:
        raise RefusedError(f"{what} is {upload.dtype} {list(upload.shape)} instead of uint8 {list(wanted)}")


@dataclass(kw_only=True)
class EncryptedSum:
    """The sum of encrypted uploads, at the server.

    Attributes:
        packing: how uploads fill slots.
        weights: of the uploads that have been added, by name.
    """

    packing: Packing
    weights: dict[str, int] = field(default_factory=dict)
    _total: Coefficients = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parameters = self._parameters
        self._total = np.zeros((self.packing.num_ciphertexts, 2 * parameters.degree), np.uint64)

    @property
    def _parameters(self) -> Parameters:
        return self.packing.parameters

    def add(self, name: str, upload: Bytes, *, weight: int = 1) -> None:
        """Add an upload. A refused one leaves the sum as it was.

        Args:
            name: of the sender, whom the transport has authenticated; or another that is unique in the sum.
            upload: of any origin.
            weight: by which it is multiplied, from 1 to `MOST_WEIGHT`.

        Raises:
            RefusedError: the upload is malformed, one of this name has been added, or the sum has no room for it.
        """
        what = f"the encrypted upload of '{printable(name)}'"
        if name in self.weights:
            raise RefusedError(f"{what} has been added before")
        self.packing.check_weights([*self.weights.values(), weight])
        check_upload(upload, self.packing, what=what)
        prime = self._parameters.primes[0]
        for row in upload:
            from_bytes(row, prime, what=what)
        for sums, row in zip(self._total, upload, strict=True):
            added = from_bytes(row, prime, what=what)
            if weight > 1:
                added = added * np.uint64(weight) % np.uint64(prime)
            np.add(sums, added, out=sums)
            np.minimum(sums, sums - np.uint64(prime), out=sums)  # modulo q: smaller unless it wraps below zero
        self.weights[name] = weight

    def total(self) -> Bytes:
        """The encrypted sum, of the form of an upload."""
        rows = [to_bytes(total) for total in self._total]
        return np.stack(rows) if rows else np.zeros((0, self._parameters.ciphertext_bytes), np.uint8)


def coefficients_of(upload: Bytes, packing: Packing, *, what: str) -> Iterator[Coefficients]:
    """The coefficients of one ciphertext after another.

    Args:
        upload: of any origin.
        packing: how uploads fill slots.
        what: for the error.

    Raises:
        RefusedError: it is malformed.
    """
    check_upload(upload, packing, what=what)
    for row in upload:
        yield from_bytes(row, packing.parameters.primes[0], what=what)
