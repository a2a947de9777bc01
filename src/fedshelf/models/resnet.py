"""A small residual network for tests, quick starts and slow machines.

ResNet with basic blocks (He et al. 2016, "Deep Residual Learning for Image Recognition", §3.3), with a 3×3 stem instead
of 7×7 with pooling, since store photos are trained at 32 to 128 px.

Shapes: B batch, C channels, K classes.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fedshelf.core.choices import NormName
from fedshelf.models.settings import ModelSettings

GROUPS = 8


def make_norm(name: NormName) -> Callable[[int], nn.Module]:
    """Batch normalization, or group normalization (Wu & He 2018) in at most 8 groups."""
    if name == "batch":
        return nn.BatchNorm2d
    return lambda channels: nn.GroupNorm(num_groups(channels), channels)


def num_groups(channels: int) -> int:
    """The largest number of groups, at most `GROUPS`, that divides `channels`."""
    return next(groups for groups in range(min(GROUPS, channels), 0, -1) if channels % groups == 0)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (projected by 1×1 where the shape changes)."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            norm(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            norm(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm(channels)
            )  # fmt: skip
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.activation(self.body(x_BCHW) + self.shortcut(x_BCHW))
        return out


class SmallResNet(nn.Module):
    """Stem (3×3, stride 2), basic blocks, global average pool, linear head.

    Args:
        num_classes: K.
        stem: channels of the stem.
        blocks: (channels, stride) of each block.
        norm: kind of normalization after each convolution.
    """

    def __init__(
        self, num_classes: int, *, stem: int, blocks: Sequence[tuple[int, int]], norm: NormName = "batch"
    ) -> None:
        super().__init__()
        make = make_norm(norm)
        layers: list[nn.Module] = []
        channels = stem
        for width, stride in blocks:
            layers.append(BasicBlock(channels, width, stride, make))
            channels = width
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), make(stem), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, K]."""
        logits_BK: Tensor = self.head(self.pool(self.blocks(self.stem(images_BCHW))).flatten(1))
        return logits_BK


def resnet10(num_classes: int, *, width: int = 16, norm: NormName = "batch") -> SmallResNet:
    """Four blocks of `width`·(1, 2, 4, 8) channels: 318 k parameters at width 16 and 81 classes."""
    blocks = [(width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)]
    return SmallResNet(num_classes, stem=width, blocks=blocks, norm=norm)


def make_resnet10(settings: ModelSettings) -> SmallResNet:
    """`resnet10` as a run configures it."""
    return resnet10(settings.num_classes, width=settings.width, norm=settings.norm)
