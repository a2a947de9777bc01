"""What encryption costs on this machine, measured before a run begins."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedshelf.core.text import counted
from fedshelf.privacy.homomorphic import seal
from fedshelf.privacy.homomorphic.ciphertexts import EncryptedSum, from_bytes, to_bytes
from fedshelf.privacy.homomorphic.packing import Packing
from fedshelf.privacy.homomorphic.parameters import PARAMETERS

_REPETITIONS = 16
_MEGA = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCost:
    """Seconds for one ciphertext.

    Attributes:
        encrypt: at a store.
        add: at the server.
        decrypt: at the store that decrypts.
    """

    encrypt: float
    add: float
    decrypt: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundCost:
    """What a round costs in addition to training.

    Attributes:
        ciphertexts: of an upload.
        bytes_up: of each store's encrypted codes; the sum, which a store downloads to decrypt it, has as many.
        bytes_plain: of the same codes without encryption, which is also what is sent back.
        encrypt: seconds of each store.
        add: seconds of the server.
        decrypt: seconds of the store that decrypts.
    """

    ciphertexts: int
    bytes_up: int
    bytes_plain: int
    encrypt: float
    add: float
    decrypt: float

    @property
    def text(self) -> str:
        """One sentence for people."""
        return (
            f"{_size(self.ciphertexts, self.bytes_up, self.bytes_plain)}; about "
            f"{self.encrypt:.2f} s per store to encrypt, {self.add:.2f} s to add, {self.decrypt:.2f} s to decrypt, on "
            "a machine like this one"
        )


def without_seconds(packing: Packing) -> str:
    """One sentence for people, where TenSEAL is not installed to measure seconds.

    Args:
        packing: how uploads fill slots.
    """
    return _size(packing.num_ciphertexts, packing.upload_bytes, _plain_bytes(packing))


def measure(clock: Callable[[], float], *, repetitions: int = _REPETITIONS) -> UnitCost:
    """Measure one ciphertext's cost with keys of its own.

    Args:
        clock: seconds; the difference of two calls counts.
        repetitions: ciphertexts to measure.
    """
    packing = Packing(sizes=((32, PARAMETERS.degree * repetitions),), summands=2)
    keys = seal.generate(PARAMETERS)
    encryptor, decryptor = (seal.Encryptor(PARAMETERS, keys.public), seal.Decryptor(PARAMETERS, keys.secret))
    codes = np.arange(PARAMETERS.degree * repetitions, dtype="<u4")
    times = [clock()]
    upload = np.stack([to_bytes(encryptor.encrypt(slots)) for slots in packing.pack((codes,))])
    times.append(clock())
    total = EncryptedSum(packing=packing)
    total.add("", upload)
    times.append(clock())
    for row in total.total():
        decryptor.decrypt(from_bytes(row, PARAMETERS.primes[0], what="a ciphertext"))
    times.append(clock())
    encrypt, add, decrypt = ((after - before) / repetitions for before, after in pairwise(times))
    return UnitCost(encrypt=encrypt, add=add, decrypt=decrypt)


def estimate(packing: Packing, members: int, unit: UnitCost) -> RoundCost:
    """What a round costs.

    Args:
        packing: how uploads fill slots.
        members: uploads that are added.
        unit: from `measure`.

    Raises:
        RefusedError: they are too many.
    """
    packing.parameters.check_members(members)
    count = packing.num_ciphertexts
    return RoundCost(
        ciphertexts=count, bytes_up=packing.upload_bytes,
        bytes_plain=_plain_bytes(packing), encrypt=count * unit.encrypt,
        add=count * members * unit.add, decrypt=count * unit.decrypt,
    )  # fmt: skip


def _plain_bytes(packing: Packing) -> int:
    return sum(bits // 8 * size for bits, size in packing.sizes)


def _size(ciphertexts: int, bytes_up: int, bytes_plain: int) -> str:
    return (
        f"homomorphic encryption: {counted(ciphertexts, 'ciphertext')} per upload, {bytes_up / _MEGA:.1f} MB "
        f"({bytes_up / max(1, bytes_plain):.2f} × plain)"
    )
