"""What a model takes a photo for."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """A predicted product, or folder of products.

    Attributes:
        label: the product, or the folder's path.
        probability: the model's probability for it.
    """

    label: str
    probability: float
