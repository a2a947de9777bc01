"""Distillation: a student learns from what a teacher says of the same view of a photo.

Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network":

    for each batch of photos x with labels y:
     1  v <- a random view of x, for teacher and student alike
     2  z <- the student's logits of v; u <- the teacher's, without a gradient
     3  p <- softmax(z / T); q <- softmax(u / T)
     4  minimize (1 - alpha) · CE(z, y) + alpha · T² · KL(q ‖ p)

T² keeps the second term's gradient at the size of the first's (its section 2). Line 1 is Beyer et al. 2022, "Knowledge
distillation: A good teacher is patient and consistent": a teacher that sees another view describes another photo. A
view is a crop in shares of the photo, a mirroring, a rotation and a lighting, drawn once per photo and batch. Teacher
and student each render it from their own decoded copy of the photo, at their own size and with their own normalization,
so that a teacher at 96 pixels sees 96 pixels of what the student sees 48 of.

Differs from the paper: teacher and student are divided by the same T in training, and neither in use; the labels' term
has the run's label smoothing and calibration (`training.losses`), the teacher's has neither; batch normalization and
dropout of the teacher work as in evaluation.

Shapes: B batch, H = W pixels a side, K classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedshelf.data.augmentation import Augmentation, augment, normalize
from fedshelf.models.settings import Normalization


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """How much a student learns from its teacher.

    Attributes:
        weight: share of the teacher in the loss (alpha), above 0 and up to 1.
        temperature: what logits are divided by (T).
    """

    weight: float
    temperature: float


class Rendering(NamedTuple):
    """How a batch of photos is made into what a model takes.

    Attributes:
        normalization: of the model.
        augmentation: random views; None: photos as they are.
        device: the model's device.
    """

    normalization: Normalization
    augmentation: Augmentation | None
    device: torch.device

    def __call__(self, images_BHWC: Tensor, generator: torch.Generator | None) -> Tensor:
        """Views [B, 3, H, W] of photos (uint8), drawn from `generator`, which draws alike for all sizes."""
        mean, std = self.normalization.mean, self.normalization.std
        if self.augmentation is None or generator is None:
            return normalize(images_BHWC, device=self.device, mean=mean, std=std)
        return augment(
            images_BHWC, settings=self.augmentation, generator=generator, device=self.device, mean=mean, std=std
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A trained model that is only asked.

    Attributes:
        module: the module, on the device of the training.
        image_size: side of its photos in pixels.
        normalization: normalization of its photos.
        rows: by class of the student, the teacher's output [K] for it; None: they have the same order.
    """

    module: nn.Module
    image_size: int
    normalization: Normalization
    rows: Tensor | None = None

    def logits(self, views_BCHW: Tensor) -> Tensor:
        """The teacher's logits [B, K] of views, in the order of the student's classes."""
        self.module.eval()
        with torch.no_grad():
            logits_BK: Tensor = self.module(views_BCHW)
        return logits_BK if self.rows is None else logits_BK.index_select(1, self.rows)

    def of_photos(
        self, images_NHWC: NDArray[np.uint8], *, augmentation: Augmentation | None,
        generator: torch.Generator | None, device: torch.device,
    ) -> Tensor:  # fmt: skip
        """The teacher's logits [B, K] of one view of each photo.

        Args:
            images_NHWC: photos at the teacher's size.
            augmentation: random views; None: photos as they are.
            generator: in the state in which the student's views were drawn from it.
            device: the device of the training.
        """
        render = Rendering(self.normalization, augmentation, device)
        return self.logits(render(torch.from_numpy(images_NHWC), generator))

    def bytes_needed(self, batch_size: int) -> int:
        """Memory for asking it about a batch: its values, as received and in the module, and its largest layer.

        Args:
            batch_size: number of photos.
        """
        values = [*self.module.parameters(), *self.module.buffers()]
        most = 0

        def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            nonlocal most
            tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, Tensor)]
            most = max(most, sum(tensor.numel() * tensor.element_size() for tensor in tensors))

        layers = [module for module in self.module.modules() if not any(module.children())]
        hooks = [layer.register_forward_hook(note) for layer in layers]
        try:
            self.logits(torch.zeros(1, 3, self.image_size, self.image_size, device=values[0].device))
        finally:
            for hook in hooks:
                hook.remove()
        return 2 * sum(tensor.numel() * tensor.element_size() for tensor in values) + batch_size * most


def distilled(label_loss: Tensor, logits_BK: Tensor, teacher_BK: Tensor, distillation: Distillation) -> Tensor:
    """Line 4: the mean loss (nats, scalar) of a batch.

    Args:
        label_loss: mean loss of the labels.
        logits_BK: the student's logits.
        teacher_BK: the teacher's logits of the same views.
        distillation: alpha and T.
    """
    alpha, temperature = distillation.weight, distillation.temperature
    log_p_BK = F.log_softmax(logits_BK / temperature, dim=1)
    log_q_BK = F.log_softmax(teacher_BK / temperature, dim=1)
    divergence = F.kl_div(log_p_BK, log_q_BK, reduction="batchmean", log_target=True)
    return (1 - alpha) * label_loss + alpha * temperature**2 * divergence
