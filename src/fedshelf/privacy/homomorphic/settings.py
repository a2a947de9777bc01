"""The settings of homomorphic encryption, as a stage of the upload pipeline.

The integers that `compression.sum_stage` makes of an upload are encrypted in `rounds.encrypting_client`, because that
takes keys which come with the rounds. The stage itself changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from fedshelf.core.settings import PRIVACY, Setting
from fedshelf.core.stages import Declaration

if TYPE_CHECKING:
    from torch import Tensor

    from fedshelf.core.messages import Upload
    from fedshelf.core.params import Layout

ANY = "any"
"""The value of `--he-decryptor` with which every store may decrypt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encryption:
    """Uploads are encrypted.

    Attributes:
        is_on: whether they are.
        scope: which part of an upload is encrypted.
        decryptor: the store that decrypts sums; `any`: every store may; None: the first store by name.
    """

    is_on: Annotated[bool, Setting(key="he", panel=PRIVACY, help="Homomorphic encryption: the server adds updates that "
        "it cannot read, and a store decrypts the sum. Also works with --algorithm fedbuff. It takes 3 stores or more "
        "and the extra 'he'.")]  # fmt: skip
    scope: Annotated[Literal["model", "head"], Setting(key="he_scope", panel=PRIVACY, help="What --he encrypts: the "
        "whole model, or only the change of its output layer and all single numbers.")] = "model"  # fmt: skip
    decryptor: Annotated[str | None, Setting(key="he_decryptor", panel=PRIVACY, help="Store that decrypts sums; any: "
        "every store may (default: the first store by name).")] = None  # fmt: skip

    @property
    def declares(self) -> Declaration:
        setting = "--he" if self.scope == "model" else f"--he-scope {self.scope}"
        return Declaration(name="encryption", setting=setting, masks=True, encrypts=True)

    @property
    def any_decrypts(self) -> bool:
        """Whether every store may decrypt."""
        return self.decryptor == ANY

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        return upload, None

    def open(self, upload: Upload, layout: Layout) -> Upload:
        return upload


NOT_ENCRYPTED = Encryption(is_on=False)
