"""Clip an upload to a norm: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1, per client as in
McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models".

    client:  u <- u / max(1, ||u||_2 / C)

u holds all vectors of the upload, so that the bound covers everything that leaves the client: trainable values,
statistics, and the algorithm's vectors.

Differs from the paper: no noise is added; clipping alone gives no differential privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from fedshelf.core.settings import PRIVACY, Setting
from fedshelf.core.stages import Declaration

if TYPE_CHECKING:
    from torch import Tensor

    from fedshelf.core.messages import Upload
    from fedshelf.core.params import Layout

CLIP_NORM = Setting(
    key="clip_norm", panel=PRIVACY,
    help="Each client scales its upload down to this L2 norm before anything else happens to it (default: not at all). "
    "With --dp sample, the bound on the gradient of each photo instead (default: 1); with --dp client, the norm that "
    "uploads are scaled down to, or adaptive, which follows their norms (the default).",
)  # fmt: skip


SHRINK = 1 - 2.0**-22
"""float32 values of a norm of at most 1, scaled by this, have one of at most 1 after they are rounded, too."""
ADAPTIVE: Literal["adaptive"] = "adaptive"
ClipNorm = float | Literal["adaptive"]


def _said(norm: ClipNorm) -> str:
    return norm if isinstance(norm, str) else f"{norm:g}"


def problems_with_norm(norm: ClipNorm) -> list[str]:
    """What is wrong with a clip norm that cannot adapt."""
    return ["--clip-norm adaptive needs --dp client: give a number"] if norm == ADAPTIVE else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Scales uploads down to a maximum norm.

    Attributes:
        max_norm: the maximum norm (C).
    """

    max_norm: Annotated[float, CLIP_NORM]

    @property
    def declares(self) -> Declaration:
        return Declaration(name="clip", setting=f"--clip-norm {_said(self.max_norm)}", clips=True)

    def problems(self) -> list[str]:
        """What is wrong with the norm."""
        return problems_with_norm(self.max_norm)

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        vectors = upload.plain_vectors
        norm = math.hypot(*(float(vector.double().norm()) for vector in vectors.values()))
        if not norm > self.max_norm:  # non-finite values are left for the server to refuse by name
            return upload, None
        return upload.with_vectors(**{name: vector * (self.max_norm / norm) for name, vector in vectors.items()}), None

    def open(self, upload: Upload, layout: Layout) -> Upload:
        return upload


def in_unit_ball(upload: Upload, clip_norm: float) -> tuple[Upload, bool]:
    """The upload scaled down to `clip_norm`, as a multiple of it: all vectors together have a norm of at most 1.

    Args:
        upload: plain. Values that are not finite stay so, for the encoder to refuse.
        clip_norm: C, above 0.

    Returns:
        The upload, and whether its norm was at most C.
    """
    vectors = upload.plain_vectors
    norm = math.hypot(*(float(vector.double().norm()) for vector in vectors.values()))
    factor = SHRINK / (clip_norm if norm <= clip_norm else norm)
    return upload.with_vectors(**{name: vector * factor for name, vector in vectors.items()}), norm <= clip_norm
