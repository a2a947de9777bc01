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
    "the server scales uploads down to, or adaptive, which follows their norms (the default).",
)  # fmt: skip


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
