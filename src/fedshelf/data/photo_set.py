"""Photos as arrays, ready for batching. Apart from their files, so that training needs no decoder.

Shapes: N photos, S the image size, V views, D features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class PhotoSet:
    """Photos and their classes.

    Attributes:
        images: uint8 [N, S, S, 3], RGB; read-only (index it with a list, which copies, to make a batch). Or, instead of
            the photos, features of V views of each: float32 [N, V, D] (`training.features`).
        labels: int64 [N], indices into the catalogue.
        teacher_images: the same photos at a teacher's size (`training.distillation`); None: there is no teacher, or it
            takes `images`.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]
    teacher_images: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)
