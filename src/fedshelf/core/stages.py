"""What a stage of the upload pipeline is: both halves of one transformation, and what it declares about itself.

    delta → clip → noise → encode → mask or encrypt → wire

Everything that leaves a client passes all stages in order (`rounds.pipeline`). Whether a combination of stages is safe
follows from their declarations alone, before a run starts.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedshelf.core.messages import Upload
from fedshelf.core.params import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """What a stage promises and needs.

    Attributes:
        name: names the stage uniquely, and its slot in `ClientState.pipeline`.
        setting: how a person set it, for messages: `--codec-up int8`.
        clips: bounds the norm of all vectors that leave, together.
        adds_noise: adds noise that is calibrated to the bound.
        encodes: vectors are `Encoded` afterwards: stages that work on plain vectors must come before it.
        masks: adds masks that cancel in the sum of all clients.
        modular: codes are integers modulo a power of two.
        linear: sums of codes decode to the sum.
        chooses_values: each client sends only some of its values, and which ones depends on its photos.
        carries_over: what one upload leaves out is added to the next one (error feedback).
        compresses: the number of bytes depends on the values.
    """

    name: str
    setting: str
    clips: bool = False
    adds_noise: bool = False
    encodes: bool = False
    masks: bool = False
    modular: bool = False
    linear: bool = True
    chooses_values: bool = False
    carries_over: bool = False
    compresses: bool = False


class Stage(Protocol):
    """One transformation of uploads, at both ends."""

    @property
    def declares(self) -> Declaration:
        """What this stage promises and needs."""
        ...

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        """The client's half.

        Args:
            upload: as the stage before left it.
            memory: what this stage kept of the client's last counted upload; None: nothing.
            client: the client's name.
            layout: of the model.

        Returns:
            The upload that goes to the next stage, and what to keep.
        """
        ...

    def open(self, upload: Upload, layout: Layout) -> Upload:
        """The server's half: the upload as the stage before sealed it, as far as that can be restored.

        Raises:
            RefusedError: the upload is not what `seal` makes.
        """
        ...
