"""FedDF: Lin, Kong, Stich & Jaggi 2020, "Ensemble Distillation for Robust Model Fusion in Federated Learning", Alg. 1.

    server, with the models x_k of a round's clients S and their average x_0:
     1  for j in 1..N:
     2    d <- a random batch of unlabelled photos
     3    q <- softmax(1/|S| sum_k f(x_k, d))
     4    x_j <- x_{j-1} - eta · grad KL(q ‖ softmax(f(x_{j-1}, d)))
     5  return x_N

Line 4 is a step of Adam, its learning rate falling to zero along a cosine, as in the paper. Line 3 averages logits,
each client's with the same weight. Where all clients hold the same model, q is what x_0 says, and without batch
normalization line 4 changes nothing.

Differs from the paper: photos are augmented as in local training (the paper's are those of another data set); N is
fixed, while the paper stops early by a labelled validation set, which a server without labels does not have; x_0 is
what the run's algorithm makes of the uploads, of which the average is one case.

Shapes: N steps, B photos of a batch, K classes, S shared values, M photos.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.core.rng import Rng
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.distillation import Rendering


@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble:
    """Fuses the models of a round's clients into one.

    Attributes:
        bound_model: computes; used by nothing else at the same time.
        images: unlabelled photos, uint8 [M, H, W, 3].
        num_steps: N.
        learning_rate: of the first step (eta).
    """

    bound_model: BoundModel
    images: NDArray[np.uint8]
    num_steps: int
    learning_rate: float

    def fuse(self, models: Iterable[Tensor], start: Tensor, rng: Rng) -> Tensor:
        """Lines 1 to 5.

        Args:
            models: of the clients, each [S]; at least one.
            start: their average [S].
            rng: draws batches and views.

        Returns:
            The fused model [S], on the CPU.
        """
        chosen_NB = self._batches(rng.fork(purpose="batches"))

        def views(step: int) -> Tensor:  # made anew for each model: all at once would need much memory
            render = Rendering(bound.normalization, bound.settings.augmentation, bound.compute.device)
            return render(torch.from_numpy(self.images[chosen_NB[step]]), rng.fork(purpose=f"views-{step}").torch())

        bound = self.bound_model
        logits_NBK = self._mean_logits(models, views)
        bound.load(start)
        self._train(views, logits_NBK)
        return bound.params.shared.detach().cpu().clone()

    def _batches(self, rng: Rng) -> list[NDArray[np.int64]]:
        size, generator = min(self.bound_model.settings.batch_size, len(self.images)), rng.torch()
        return [torch.randperm(len(self.images), generator=generator)[:size].numpy() for _ in range(self.num_steps)]

    def _mean_logits(self, models: Iterable[Tensor], views: Callable[[int], Tensor]) -> list[Tensor]:
        """The mean of the models' logits [B, K] for the batch of each step."""
        bound, count = self.bound_model, 0
        sums: list[Tensor] = []
        for count, params in enumerate(models, 1):  # noqa: B007
            bound.load(params)
            bound.module.eval()
            with torch.no_grad():
                found = [bound.logits(views(step)) for step in range(self.num_steps)]
            sums = [before + own for before, own in zip(sums, found, strict=True)] if sums else found
        return [total / count for total in sums]

    def _train(self, views: Callable[[int], Tensor], logits_NBK: list[Tensor]) -> None:
        """Line 4 for each batch."""
        bound, num_trainable = self.bound_model, self.bound_model.params.layout.num_trainable
        values = torch.nn.Parameter(bound.params.trainable)  # shares their memory
        values.grad = bound.gradients[:num_trainable]
        optimizer = torch.optim.Adam([values], lr=self.learning_rate)
        bound.train()
        for step, logits_BK in enumerate(logits_NBK):
            optimizer.param_groups[0]["lr"] = self.learning_rate * (1 + math.cos(math.pi * step / self.num_steps)) / 2
            bound.gradients.zero_()
            log_p_BK = F.log_softmax(bound.logits(views(step)), dim=1)
            log_q_BK = F.log_softmax(logits_BK, dim=1)
            F.kl_div(log_p_BK, log_q_BK, reduction="batchmean", log_target=True).backward()
            optimizer.step()
