"""What a model is built from: its settings, and the normalization of its photos."""

from dataclasses import dataclass

from fedshelf.core.choices import NormName


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Normalization of photos scaled to [0, 1]; by default ImageNet's.

    Attributes:
        mean: per channel.
        std: per channel.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Settings of a model.

    Attributes:
        name: name of the model.
        num_classes: number of outputs.
        image_size: side of the photos in pixels.
        norm: kind of normalization layers.
        width: width of `resnet10`; ignored by other models.
        pretrained: whether to load pretrained weights.
        digest: digest of the source of a user's own model.
    """

    name: str
    num_classes: int
    image_size: int
    norm: NormName = "batch"
    width: int = 16
    pretrained: bool = False
    digest: str | None = None
