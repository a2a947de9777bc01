"""The networks of *pilot* and *chain*. The module imports torch only, so that peers can load it.

Shapes: B batch, C channels, H height, W width, K classes.
"""

import os
import time
from pathlib import Path

from torch import Tensor, nn

NUM_CLASSES = 43  # the groceries' coarse classes
GROUPS = 8
FIRST_STEP_FILE = "BENCHMARK_FIRST_STEP_FILE"


class ResidualBlock(nn.Module):
    """Basic block; with stride 2, the shortcut is a 1×1 convolution without normalization."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            nn.GroupNorm(GROUPS, channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.GroupNorm(GROUPS, channels),
        )
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.activation(self.body(x_BCHW) + self.shortcut(x_BCHW))
        return out


def pilot_network() -> nn.Module:
    """Build a GroupNorm ResNet of 701,515 parameters for photos of 64 px."""
    channels = [(32, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.GroupNorm(GROUPS, 32),
        nn.ReLU(inplace=True),
        *(ResidualBlock(*block) for block in channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, NUM_CLASSES),
    )


def chain_network(width: int = 16, num_classes: int = NUM_CLASSES) -> nn.Module:
    """Build a CNN for photos of 32 px: 3 × (3×3 convolution, ReLU, 2×2 pool), then linear.

    Args:
        width: Channels of the first layer; with 16, the network has 67,659 parameters.
        num_classes: Classes.
    """
    layers: list[nn.Module] = []
    for in_channels, channels in [(3, width), (width, 2 * width), (2 * width, 4 * width)]:
        layers += [nn.Conv2d(in_channels, channels, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 4 * 4, num_classes))


def record_first_step(module: nn.Module) -> None:
    """Append the time at which training first enters the network to the file that the environment names, if any."""
    path = os.environ.get(FIRST_STEP_FILE)
    if path is None:
        return

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            handle.remove()
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(f"{time.monotonic()}\n")

    handle = module.register_forward_pre_hook(record)
