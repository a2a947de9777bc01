"""The parameters of BFV, what they protect, and how many uploads they can add.

Brakerski 2012; Fan and Vercauteren 2012, "Somewhat Practical Fully Homomorphic Encryption". A ciphertext is a pair of
polynomials modulo q that encrypts N values modulo t (*slots*). Ciphertexts are only ever added.

    N = 4096       slots of a ciphertext
    t = 4294991873 the smallest prime above 2^32 with t ≡ 1 (mod 2N), which batching needs: a slot holds 32 bits
    q, q'          the two largest primes of 48 bits with q ≡ 1 (mod 2N). Keys are modulo q·q', ciphertexts modulo q

Security: the secret is ternary. For it, the standard of HomomorphicEncryption.org (Albrecht et al. 2018, table 1,
classical attacks) allows log2(q·q') up to 109 at N = 4096 for 128 bits. It is 96 here.

Noise: encryption modulo q·q' followed by division by q' leaves a rounding error of variance (1 + 2N/3) / 12 in each
coefficient. A sum of n decrypts correctly if its error is below q / (2t), and errors of honest members are independent.
"""

import hashlib
import math
from dataclasses import dataclass

from fedshelf.core.errors import RefusedError, UsageError
from fedshelf.core.text import counted

SECURITY_BITS = 128
MOST_MODULUS_BITS = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
"""Largest log2 of the keys' modulus by N, for `SECURITY_BITS`, classical attacks, and a ternary secret."""
COEFFICIENT_BYTES = 6
"""Bytes of a coefficient modulo q."""
SLOT_BITS = 32
"""Bits of integers that a slot can hold, with sign or without."""
_DEVIATIONS = 9.0  # the error of one of 10^12 coefficients is larger with a probability of 2e-7


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameters of BFV.

    Attributes:
        degree: N.
        primes: q and q'.
        plain_modulus: t.
    """

    degree: int = 4096
    primes: tuple[int, int] = (0xFFFF_FFFE_E001, 0xFFFF_FFFF_C001)
    plain_modulus: int = 4_294_991_873

    def __post_init__(self) -> None:
        """Check the parameters.

        Raises:
            UsageError: they do not have the security level, or do not fit together.
        """
        most = MOST_MODULUS_BITS.get(self.degree)
        if most is None:
            raise UsageError(f"N = {self.degree} is not in the table of HomomorphicEncryption.org: use 4096")
        bits = math.log2(math.prod(self.primes))
        if bits > most:
            raise UsageError(
                f"a modulus of {bits:.0f} bits with N = {self.degree} has less than {SECURITY_BITS} bits of security: "
                f"HomomorphicEncryption.org allows at most {most} bits"
            )
        if any(number % (2 * self.degree) != 1 for number in (*self.primes, self.plain_modulus)):
            raise UsageError(f"all moduli have to be 1 modulo 2N = {2 * self.degree}, which batching needs")
        if self.plain_modulus.bit_length() != SLOT_BITS + 1 or max(self.primes).bit_length() > 8 * COEFFICIENT_BYTES:
            raise UsageError(
                f"the plain modulus must have {SLOT_BITS + 1} bits, and each prime at most {8 * COEFFICIENT_BYTES}"
            )
        if self.most_members < 1:
            raise UsageError("the first prime leaves no room for the noise of a single upload")

    @property
    def most_members(self) -> int:
        """n: how many ciphertexts may be added."""
        deviation = math.sqrt((1 + 2 * self.degree / 3) / 12 + 1 / 12)  # of one; the rounding of q · m / t comes on top
        return int((self.primes[0] / (2 * self.plain_modulus) / (_DEVIATIONS * deviation)) ** 2)

    @property
    def ciphertext_bytes(self) -> int:
        """Bytes of a ciphertext as it is sent."""
        return 2 * self.degree * COEFFICIENT_BYTES

    @property
    def digest(self) -> bytes:
        """Identifies the parameters."""
        return hashlib.sha256(f"BFV {self.degree} {self.primes} {self.plain_modulus}".encode()).digest()

    def check_members(self, members: int) -> None:
        """Check that the uploads of so many members can be added.

        Raises:
            RefusedError: they are too many.
        """
        if members > self.most_members:
            raise RefusedError(
                f"{counted(members, 'upload')} cannot be added under homomorphic encryption: noise could make the "
                f"sum wrong, and the limit is {self.most_members:,}"
            )


PARAMETERS = Parameters()
"""Those that FedShelf uses."""
