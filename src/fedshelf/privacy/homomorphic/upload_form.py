"""The form of encrypted uploads and sums in messages: ciphertexts, and the codes that are not encrypted.

upload:  Encoded(ciphertexts; narrow, auxiliary, wide of what is not encrypted) and the tag, in the header
sum:     Encoded(ciphertexts), to be decrypted
opened:  Encoded(narrow, auxiliary, wide), the decrypted codes
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedshelf.compression.sum_stage import PARTS, SUMMAND, EncodeSummand
from fedshelf.compression.upload_grid import Integers
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Upload, Vector
from fedshelf.core.params import Layout
from fedshelf.privacy.homomorphic.ciphertexts import Bytes
from fedshelf.privacy.homomorphic.packing import Packing
from fedshelf.privacy.homomorphic.scope import Scope
from fedshelf.privacy.homomorphic.settings import Encryption
from fedshelf.privacy.homomorphic.sum_check import SealedTag
from fedshelf.privacy.secure_aggregation import wire

CIPHERTEXTS = "ciphertexts"
"""Name of the part that is encrypted."""
_SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True, kw_only=True, eq=False)
class EncryptedForm:
    """The form of a run's encrypted uploads.

    Attributes:
        encode: encodes uploads as integers.
        layout: the model's layout.
        scope: which of them are encrypted.
        packing: how those fill ciphertexts.
    """

    encode: EncodeSummand
    layout: Layout
    scope: Scope
    packing: Packing

    @classmethod
    def of(cls, encryption: Encryption, encode: EncodeSummand, layout: Layout, head: str) -> "EncryptedForm":
        """The form for a model.

        Args:
            encryption: the settings.
            encode: encodes uploads as integers.
            layout: the model's layout.
            head: name of the output layer; "" if it is not a single linear one.

        Raises:
            UsageError: the codec has room for too many uploads, or there is no output layer to encrypt.
        """
        names = [spec.name for spec in layout.tensors if head and spec.name.startswith(f"{head}.")]
        scope = Scope.of(encode.grid(layout), layout, head=names if encryption.scope == "head" else None)
        packing = Packing(sizes=scope.sizes, summands=encode.codec.summands)
        return cls(encode=encode, layout=layout, scope=scope, packing=packing)

    @property
    def upload_bytes(self) -> int:
        """Bytes of an upload's ciphertexts, and of its codes that are not encrypted."""
        return self.packing.upload_bytes + sum(bits // 8 * size for bits, size in self._unencrypted)

    @property
    def _unencrypted(self) -> list[tuple[int, int]]:
        """Bits and number of the codes of each part that are not encrypted."""
        return [(bits, int((~mask).sum())) for bits, mask in zip(self.scope.bits, self.scope.masks, strict=True)]

    def upload(self, upload: Upload, vector: Bytes, tag: SealedTag, others: Sequence[Integers]) -> Upload:
        """The upload with ciphertexts in place of its codes.

        Args:
            upload: it, encoded.
            vector: ciphertexts [ciphertexts, 2 · N · 6].
            tag: of what is encrypted.
            others: the codes that are not.
        """
        encoded = self._encoded({CIPHERTEXTS: _flat(vector), **_parts(others)})
        return replace(
            upload, vectors={SUMMAND: encoded}, num_examples=None, num_steps=None, train_loss=None,
            tag=wire.to_text(tag),
        )  # fmt: skip

    def opened(self, upload: Upload, client: str) -> tuple[Bytes, SealedTag, tuple[Integers, ...]]:
        """The ciphertexts of an upload, its tag, and the codes that are not encrypted.

        Args:
            upload: of any origin.
            client: who sent it.

        Raises:
            RefusedError: it has another form, or another store's tag.
        """
        tag = wire.from_text(upload.tag, SealedTag)
        if tag.member != client:
            raise RefusedError("its tag names another store")
        if len(upload.vectors) != 1:
            raise RefusedError("it is not encrypted: the client's configuration is another")
        vector, others = self._read(upload.vectors.get(SUMMAND), self._unencrypted, is_encrypted=True)
        return vector, tag, others

    def sum_to_decrypt(self, vector: Bytes) -> Vector:
        """The encrypted sum as a vector of a message."""
        return self._encoded({CIPHERTEXTS: _flat(vector)})

    def read_sum(self, vector: Vector | None) -> Bytes:
        """The reverse of `sum_to_decrypt`.

        Raises:
            RefusedError: it has another form.
        """
        return self._read(vector, [(bits, 0) for bits in self.scope.bits], is_encrypted=True)[0]

    def decrypted_sum(self, codes: Sequence[Integers]) -> Vector:
        """The decrypted sum as a vector of a message."""
        return self._encoded(_parts(codes))

    def read_decrypted(self, vector: Vector | None) -> tuple[Integers, ...]:
        """The reverse of `decrypted_sum`.

        Raises:
            RefusedError: it has another form.
        """
        return self._read(vector, self.scope.sizes, is_encrypted=False)[1]

    def _encoded(self, parts: dict[str, torch.Tensor]) -> Encoded:
        size = sum(size for _, size in self.encode.grid(self.layout).sizes)
        return Encoded(codec=self.encode.codec.text, size=size, parts=parts)

    def _read(
        self, encoded: Vector | None, sizes: Sequence[tuple[int, int]], *, is_encrypted: bool
    ) -> tuple[Bytes, tuple[Integers, ...]]:  # fmt: skip
        """Check the types and lengths of a vector's parts, and view them as ciphertexts and codes."""
        if not isinstance(encoded, Encoded) or encoded.codec != self.encode.codec.text:
            raise RefusedError("its vector is not encoded as this run's are")
        due = dict(zip(PARTS, sizes, strict=True))
        wanted = {name: (_SIGNED[bits], (size,)) for name, (bits, size) in due.items() if size}
        if is_encrypted:
            wanted[CIPHERTEXTS] = torch.uint8, (self.packing.upload_bytes,)
        if {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()} != wanted:
            raise RefusedError("the parts of its encrypted vector have other names, types or lengths than those due")
        content = encoded.parts[CIPHERTEXTS].contiguous().numpy() if is_encrypted else np.zeros(0, np.uint8)
        return content.reshape(-1, self.packing.parameters.ciphertext_bytes), tuple(
            encoded.parts[name].contiguous().numpy().view(f"<u{bits // 8}") if size else np.zeros(0, f"<u{bits // 8}")
            for name, (bits, size) in due.items()
        )


def _flat(vector: Bytes) -> torch.Tensor:
    return torch.from_numpy(vector.reshape(-1))


def _parts(codes: Sequence[Integers]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.ascontiguousarray(part).view(f"<i{part.itemsize}"))
        for name, part in zip(PARTS, codes, strict=True)
        if part.size
    }
