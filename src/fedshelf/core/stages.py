"""The interface of a stage in the upload pipeline: both halves of one transformation, and its declared properties.

    delta → clip → noise → encode → mask or encrypt → wire

Everything that leaves a client passes all stages in order (`rounds.pipeline`). Their order, and whether a combination
of stages is safe, follow from their declarations alone, before a run starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # stages are components (`core.settings`), which the command line imports
    from torch import Tensor

    from fedshelf.core.messages import Upload
    from fedshelf.core.params import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """The properties of a stage.

    Attributes:
        name: identifies the stage, and its slot in `ClientState.pipeline`.
        setting: how the user enabled it, for messages: `--codec-up int8`.
        clips: bounds the joint norm of all vectors in the upload.
        adds_noise: adds noise calibrated to the bound.
        encodes: outputs `Encoded` vectors, so stages that work on plain vectors must come before it.
        masks: hides values until they are added up over all clients.
        encrypts: only the sum over all clients is decrypted, so earlier stages open the sum.
        modular: codes are integers modulo a power of two.
        linear: a sum of codes decodes to the sum of the values.
        chooses_values: each client sends only some of its values, selected depending on its photos.
        carries_over: adds what one upload leaves out to the next (error feedback).
        compresses: the number of bytes depends on the values.
    """

    name: str
    setting: str
    clips: bool = False
    adds_noise: bool = False
    encodes: bool = False
    masks: bool = False
    encrypts: bool = False
    modular: bool = False
    linear: bool = True
    chooses_values: bool = False
    carries_over: bool = False
    compresses: bool = False

    @property
    def position(self) -> int:
        """The stage's place: clipping, noise, other stages on plain vectors, encoding, masks."""
        return 4 if self.masks else 3 if self.encodes else 1 if self.adds_noise else 0 if self.clips else 2


class Stage(Protocol):
    """One transformation of uploads, at both ends."""

    @property
    def declares(self) -> Declaration:
        """The properties of this stage."""
        ...

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        """Apply the client's half.

        Args:
            upload: the output of the previous stage.
            memory: state that this stage kept with the client's last counted upload; None if there is none.
            client: the client's name.
            layout: the model's layout.

        Returns:
            The upload for the next stage, and the state to keep.
        """
        ...

    def open(self, upload: Upload, layout: Layout) -> Upload:
        """Apply the server's half: restore the input of `seal` as far as possible.

        Raises:
            RefusedError: the upload is not a valid output of `seal`.
        """
        ...
