"""Clip an upload to a norm: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1, per client as in
McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models".

    client:  u <- u / max(1, ||u||_2 / C)

u holds all vectors of the upload, so that the bound covers everything that leaves the client: trainable values,
statistics, and the algorithm's vectors.

Differs from the paper: no noise is added; clipping alone gives no differential privacy.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from fedshelf.core.messages import Upload
from fedshelf.core.params import Layout
from fedshelf.core.stages import Declaration


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Scales uploads down to a maximum norm.

    Attributes:
        max_norm: the maximum norm (C).
    """

    max_norm: float

    @property
    def declares(self) -> Declaration:
        return Declaration(name="clip", setting=f"--clip-norm {self.max_norm:g}", clips=True)

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        vectors = {name: vector for name, vector in upload.vectors.items() if isinstance(vector, Tensor)}
        norm = math.hypot(*(float(vector.double().norm()) for vector in vectors.values()))
        if not norm > self.max_norm:  # non-finite values are left for the server to refuse by name
            return upload, None
        return upload.with_vectors(**{name: vector * (self.max_norm / norm) for name, vector in vectors.items()}), None

    def open(self, upload: Upload, layout: Layout) -> Upload:
        return upload
