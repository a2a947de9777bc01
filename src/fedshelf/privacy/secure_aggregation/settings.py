"""The setting of secure aggregation, as a stage of the upload pipeline.

The stage itself changes nothing: masks take an exchange between all members of a round, which goes on around the
pipeline (`rounds.masking_client`). It declares that uploads are masked, so that what masks rule out is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fedshelf.core.settings import PRIVACY, Setting
from fedshelf.core.stages import Declaration

if TYPE_CHECKING:
    from torch import Tensor

    from fedshelf.core.messages import Upload
    from fedshelf.core.params import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """Uploads are masked.

    Attributes:
        is_on: whether they are.
        threshold: members whose shares open the sum; None: more than two thirds.
    """

    is_on: Annotated[bool, Setting(key="secagg", panel=PRIVACY, help="Secure aggregation: the server learns only the "
        "sum of a round's uploads. It takes 3 stores or more in each round.")]  # fmt: skip
    threshold: Annotated[int | None, Setting(key="secagg_threshold", ge=3, panel=PRIVACY, help="Stores that have to "
        "stay in a round to open its sum (default: more than two thirds; all of 3).")] = None  # fmt: skip

    @property
    def declares(self) -> Declaration:
        return Declaration(name="masks", setting="--secagg", masks=True)

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        return upload, None

    def open(self, upload: Upload, layout: Layout) -> Upload:
        return upload


NO_MASK = Mask(is_on=False)
