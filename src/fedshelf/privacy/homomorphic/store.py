"""What a store does in a round: it encrypts its upload, and, if it may, decrypts the sum.

each store:   codes -> slots -> ciphertexts and a tag (`sum_check`)
server:       adds the ciphertexts (`ciphertexts.EncryptedSum`)
one store:    1  check that at least the minimum cohort is in the sum, by the tags that the server shows
              2  check the rules of `secure_aggregation.unmasking` against the sums that it has decrypted before
              3  decrypt, and compare the tag of the sum with the sum of the tags
              4  record the sum durably, and only then send it to the server
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedshelf.compression.upload_grid import Integers
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import TaskKey
from fedshelf.core.text import counted, printable
from fedshelf.identity.keys import KeyPair
from fedshelf.privacy.homomorphic import seal, sum_check
from fedshelf.privacy.homomorphic.ceremony import StoreKeys
from fedshelf.privacy.homomorphic.ciphertexts import Bytes, Coefficients, check_upload, coefficients_of, to_bytes
from fedshelf.privacy.homomorphic.packing import Packing, Slots
from fedshelf.privacy.homomorphic.sum_check import SealedTag, Tagger
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS, RoundContext, digest, packed
from fedshelf.privacy.secure_aggregation.keys import Identities
from fedshelf.privacy.secure_aggregation.unmasking import OpenedSum, OpenedSumStore, check_opened_sum

_SUM = "the encrypted sum"
_BUFFER = "buffer"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncryptedUpload:
    """A store's upload.

    Attributes:
        vector: ciphertexts [ciphertexts, 2 · N · 6].
        tag: of its slots.
    """

    vector: Bytes
    tag: SealedTag


class UploadEncryptor:
    """Encrypts a store's uploads.

    Args:
        member: the store.
        keys: from the ceremony.
        packing: how uploads fill slots.
        identity: the store's identity key; None: nothing is signed.
    """

    def __init__(self, member: str, keys: StoreKeys, packing: Packing, *, identity: KeyPair | None) -> None:
        self._member, self._keys, self._packing, self._identity = member, keys, packing, identity
        self._encryptor = seal.Encryptor(packing.parameters, keys.public)

    def encrypt(self, context: RoundContext, codes: Sequence[Integers]) -> EncryptedUpload:
        """Encrypt an upload.

        Args:
            context: of the round.
            codes: from the grid.
        """
        packing, tagger = self._packing, Tagger(self._keys, self._packing.parameters)
        vector = np.empty((packing.num_ciphertexts, packing.parameters.ciphertext_bytes), np.uint8)
        for row, slots in zip(vector, packing.pack(codes), strict=True):
            tagger.add(slots)
            row[:] = to_bytes(self._encryptor.encrypt(slots))
        tag = sum_check.seal(tagger.tag, member=self._member, context=context, keys=self._keys, identity=self._identity)
        return EncryptedUpload(vector=vector, tag=tag)


class SumDecryptor:
    """Decrypts sums for headquarters.

    Args:
        keys: from the ceremony, with the secret key.
        packing: how uploads fill slots.
        opened_sums: the store's durable record.
        identities: identity keys of the roster; None: nothing is signed.
        min_cohort: least number of stores in a sum.
    """

    def __init__(
        self, keys: StoreKeys, packing: Packing, *, opened_sums: OpenedSumStore, identities: Identities | None,
        min_cohort: int = LEAST_MEMBERS,
    ) -> None:  # fmt: skip
        if keys.secret is None:
            raise RefusedError("this store cannot decrypt: the run's secret key is with another store alone")
        self._keys, self._packing, self._identities = keys, packing, identities
        self._opened_sums, self._min_cohort = opened_sums, max(min_cohort, LEAST_MEMBERS)
        self._decryptor = seal.Decryptor(packing.parameters, keys.secret)

    def open(self, context: RoundContext, vector: Bytes, tags: Sequence[SealedTag]) -> tuple[Integers, ...]:
        """Decrypt the sum of a round.

        Args:
            context: of the round, checked.
            vector: the encrypted sum, of any origin.
            tags: of the uploads in it, of any origin.

        Returns:
            The sums of codes.

        Raises:
            RefusedError: it is not a sum that this store may decrypt.
        """
        for one in tags:
            if one.round != context.digest:
                raise RefusedError(
                    f"the upload of '{printable(one.member)}' is for another round, attempt, model or configuration"
                )
        members = frozenset(one.member for one in tags)
        return self._open(vector, [(one, 1) for one in tags], key=context.key, model=context.model, members=members)

    def open_buffer(
        self, key: TaskKey, vector: Bytes, weighted: Sequence[tuple[SealedTag, int]]
    ) -> tuple[Integers, ...]:  # fmt: skip
        """Decrypt a weighted sum of uploads that began at different rounds, as FedBuff adds them.

        A pair of a store and the model that it has trained is in one such sum only, and that has one ciphertext.

        Args:
            key: the run, round and attempt of the sum, checked.
            vector: the encrypted sum, of any origin.
            weighted: tags and weights of the uploads in it, of any origin.

        Returns:
            The sums of codes.

        Raises:
            RefusedError: it is not a sum that this store may decrypt.
        """
        members = frozenset(packed("he buffered", one.member, one.model).decode() for one, _ in weighted)
        return self._open(vector, weighted, key=key, model=_BUFFER, members=members)

    def _open(
        self, vector: Bytes, weighted: Sequence[tuple[SealedTag, int]], *, key: TaskKey, model: str,
        members: frozenset[str],
    ) -> tuple[Integers, ...]:  # fmt: skip
        """Lines 1 to 3."""
        num_stores, packing = len({one.member for one, _ in weighted}), self._packing
        if num_stores < self._min_cohort:
            raise RefusedError(
                f"the sum to decrypt is of {counted(num_stores, 'store')}, and this store's minimum is "
                f"{self._min_cohort}: it is not decrypted"
            )
        packing.check_weights([weight for _, weight in weighted])
        if len(members) < len(weighted):
            raise RefusedError("an upload is twice in the sum to decrypt")
        wanted = sum_check.total(
            dict(weighted), keys=self._keys, identities=self._identities, parameters=packing.parameters
        )
        check_upload(vector, packing, what=_SUM)
        content = hashlib.sha256(np.ascontiguousarray(vector).data).digest()
        parts = sorted((one.content(), weight) for one, weight in weighted)
        bound = digest("he sum", content, *(field for part in parts for field in part)).hex()
        opened = OpenedSum(key=key, model=model, members=members, bound=bound)
        known = frozenset(self._opened_sums.known())
        check_opened_sum(opened, known, min_cohort=self._min_cohort)
        if model == _BUFFER and any(one.model == _BUFFER and one.members & members for one in known - {opened}):
            raise RefusedError(
                "an upload in the sum has been decrypted in another sum: from both, what they differ by would follow"
            )
        if opened not in known:
            self._opened_sums.record(opened)
        tagger = Tagger(self._keys, packing.parameters)

        def decrypted(coefficients: Coefficients) -> Slots:
            slots = self._decryptor.decrypt(coefficients)
            tagger.add(slots)
            return slots

        codes = packing.unpack(decrypted(one) for one in coefficients_of(vector, packing, what=_SUM))
        if tagger.tag != wanted:
            raise RefusedError(
                "the encrypted sum is not the sum of the uploads that the server names: it is not decrypted"
            )
        return codes
