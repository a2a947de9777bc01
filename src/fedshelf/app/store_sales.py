"""A store's sales, and how they join its photos.

Shapes: N photos, V views, D features of a photo, K classes, W figures of a product.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedshelf.core.sales_columns import WIDTH
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.photo_files import SALES
from fedshelf.data.photo_set import PhotoSet
from fedshelf.data.sales import read_sales
from fedshelf.data.sales_features import SalesHistory, mix_of


@dataclass(frozen=True, kw_only=True, eq=False)
class StoreSales:
    """What a store's sales say about its photos.

    Attributes:
        history: the sales; None if the store has none.
        mix: log of each class's share among the store's training photos, times K [K].
    """

    history: SalesHistory | None
    mix: NDArray[np.float32]

    @classmethod
    def of(cls, folder: Path, catalogue: Catalogue, labels_M: NDArray[np.int64]) -> Self:
        """Read the sales in a store's folder.

        Args:
            folder: the folder, with `sales.csv` if there are any.
            catalogue: the classes.
            labels_M: classes of the store's training photos.

        Raises:
            DataError: the sales cannot be used (see `data.sales`).
        """
        path = folder / SALES
        sales = read_sales(path, catalogue) if path.exists() else None
        return cls(history=SalesHistory(sales) if sales else None, mix=mix_of(labels_M, len(catalogue)))

    @classmethod
    def none(cls, num_classes: int) -> Self:
        """Those of a store that has no sales."""
        return cls(history=None, mix=np.zeros(num_classes, np.float32))

    def block(self, days_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """The figures [N, K · W] of photos of these days (0: unknown); zeros without sales."""
        if self.history is None:
            return np.zeros((len(days_N), len(self.mix) * WIDTH), np.float32)
        return self.history.block(days_N, self.mix)

    def joined(self, photos: PhotoSet, days_N: NDArray[np.int64]) -> PhotoSet:
        """Features of photos [N, V, D] with the figures of their sales behind them [N, V, D + K · W]."""
        _, views, _ = photos.images.shape
        block = np.repeat(self.block(days_N)[:, None], views, axis=1)
        return PhotoSet(np.concatenate([photos.images, block], axis=2), photos.labels)
