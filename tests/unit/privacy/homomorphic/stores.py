"""Stores of a small run under homomorphic encryption, with real keys and a server that only adds."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from fedshelf.compression.upload_grid import Integers
from fedshelf.core.messages import TaskKey
from fedshelf.identity.keys import KeyPair, PublicKey
from fedshelf.privacy.homomorphic import seal
from fedshelf.privacy.homomorphic.ceremony import KeyContext, KeyHolder, KeyMember, StoreKeys
from fedshelf.privacy.homomorphic.ciphertexts import Bytes, EncryptedSum, coefficients_of, to_bytes
from fedshelf.privacy.homomorphic.packing import Packing
from fedshelf.privacy.homomorphic.parameters import PARAMETERS
from fedshelf.privacy.homomorphic.seal import BfvKeys
from fedshelf.privacy.homomorphic.store import EncryptedUpload, SumDecryptor, UploadEncryptor
from fedshelf.privacy.homomorphic.sum_check import SealedTag
from fedshelf.privacy.secure_aggregation.context import RoundContext
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSum

SIZES = ((16, 9000), (32, 30), (64, 1400))
PACKING = Packing(sizes=SIZES, summands=64)
ROUND = RoundContext(key=TaskKey(run_id="run", round=1, attempt=0), model="m", config="c", sizes=SIZES)
CEREMONY = KeyContext(
    run_id="run", config="c", attempt=0, sizes=SIZES, summands=64, holder="store-0", is_shared=False
)  # fmt: skip
SHARED = replace(CEREMONY, is_shared=True)


class OpenedSums(list[OpenedSum]):
    """A store's record of opened sums, in memory."""

    known, record = list[OpenedSum].copy, list[OpenedSum].append


@cache
def bfv_keys(number: int = 0) -> BfvKeys:
    """Keys of BFV."""
    return seal.generate(PARAMETERS)


@cache
def identity(name: str) -> KeyPair:
    """The identity key of a store."""
    return KeyPair.generate()


def identities(count: int) -> dict[str, PublicKey]:
    """The chain's roster."""
    return {f"store-{number}": identity(f"store-{number}").public for number in range(count)}


def codes(packing: Packing, seed: int, *, at_limit: bool = False) -> tuple[Integers, ...]:
    """Codes with room for the sum; at the limit: all of the largest magnitude.

    Args:
        packing: sizes and number of summands.
        seed: of the generator.
        at_limit: whether all are at the limit, with the sign that the seed's parity gives.
    """
    generator, found = np.random.default_rng(seed), []
    for bits, size in packing.sizes:
        most = (2 ** (bits - 1) - 1) // packing.summands
        values = generator.integers(-most, most, size, endpoint=True)
        if at_limit:
            values = np.full(size, most if seed % 2 else -most)
        found.append(values.astype(f"<i{bits // 8}").view(f"<u{bits // 8}"))
    return tuple(found)


def added(uploads: Iterable[Sequence[Integers]]) -> tuple[Integers, ...]:
    """The plain sum."""
    return tuple(np.add.reduce(parts, dtype=parts[0].dtype) for parts in zip(*uploads, strict=True))


def equal(some: Sequence[Integers], others: Sequence[Integers]) -> bool:
    """Whether they are the same, bit for bit."""
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(some, others, strict=True))


def encrypted(packing: Packing, content: Sequence[Integers], keys: BfvKeys) -> Bytes:
    """An upload, without tag."""
    encryptor = seal.Encryptor(packing.parameters, keys.public)
    return np.stack([to_bytes(encryptor.encrypt(slots)) for slots in packing.pack(content)])


def decrypted(packing: Packing, vector: Bytes, keys: BfvKeys) -> tuple[Integers, ...]:
    """The codes of an upload or a sum, without checks."""
    decryptor = seal.Decryptor(packing.parameters, keys.secret)
    return packing.unpack(decryptor.decrypt(one) for one in coefficients_of(vector, packing, what="it"))


class Chain:
    """Some stores that have their keys.

    Args:
        count: number of stores.
        context: of the ceremony.
    """

    def __init__(self, count: int, context: KeyContext = CEREMONY) -> None:
        self.identities, self.opened_sums = identities(count), OpenedSums()
        self.holder = KeyHolder(context, identity=identity(context.holder), identities=self.identities)
        self.keys: dict[str, StoreKeys] = {context.holder: self.holder.keys}
        for name in list(self.identities)[1:]:
            member = KeyMember(name, context, identity=identity(name), identities=self.identities)
            self.keys[name] = member.receive(self.holder.published, self.holder.wrap(member.request))
        self.plain = {name: codes(PACKING, seed) for seed, name in enumerate(self.identities)}

    def upload(self, name: str, context: RoundContext = ROUND) -> EncryptedUpload:
        """A store's upload."""
        encryptor = UploadEncryptor(name, self.keys[name], PACKING, identity=identity(name))
        return encryptor.encrypt(context, self.plain[name])

    def sum_of(self, names: Iterable[str], context: RoundContext = ROUND) -> tuple[Bytes, list[SealedTag]]:
        """What the server has after a round."""
        total, tags = EncryptedSum(packing=PACKING), []
        for name in names:
            upload = self.upload(name, context)
            total.add(name, upload.vector)
            tags.append(upload.tag)
        return total.total(), tags

    def decryptor(self, name: str = CEREMONY.holder, *, min_cohort: int = 3) -> SumDecryptor:
        """A store that decrypts."""
        return SumDecryptor(
            self.keys[name], PACKING, opened_sums=self.opened_sums, identities=self.identities, min_cohort=min_cohort
        )
