"""A model on which gradient inversion is known to work, for the claim that a protection withstands it.

LeNet as in Zhu et al. 2019, "Deep Leakage from Gradients", with tanh for its sigmoid: with the cosine objective, a
model of 12 k values then gives a photo of 32 pixels away in 2,000 iterations, where sigmoids stop at a blur. Gradients
of ReLU tell only of active units, and batch normalization, pooling and strides hide pixels: that a run's own model
withstands the attack says little about the next attack.
"""

import math

import torch
from torch import Tensor, nn

from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.device import Compute

SIZE = 32  # pixels
CHANNELS = 12
PLAIN = TrainingSettings(
    momentum=0.0, weight_decay=0.0, label_smoothing=0.0, gradient_clip=0.0, batch_size=1, local_epochs=1,
    augmentation=None,
)  # fmt: skip


class LeNet(nn.Module):
    """Three convolutions of 5×5 with tanh, and a linear head on all of their positions.

    Args:
        num_classes: number of outputs.
        size: side of the photos in pixels.
    """

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, stride in ((3, 2), (CHANNELS, 2), (CHANNELS, 1)):
            layers += [nn.Conv2d(channels, CHANNELS, 5, stride, 2), nn.Tanh()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(CHANNELS * math.ceil(size / 4) ** 2, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, K]."""
        logits_BK: Tensor = self.head(self.body(images_BCHW).flatten(1))
        return logits_BK


def probe_model(num_classes: int, *, size: int = SIZE, seed: int = 0) -> BoundModel:
    """The probe with new weights, on the CPU, trained by plain SGD without momentum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LeNet(num_classes, size)
    return BoundModel.of(module, compute=Compute(device=torch.device("cpu"), autocast=False), settings=PLAIN)
