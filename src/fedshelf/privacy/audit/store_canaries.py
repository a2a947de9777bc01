"""Canaries in place of stores: does the noise on a sum hide whether a store took part?

Andrew et al. 2024, "One-shot Empirical Privacy Estimation for Federated Learning": canaries are random directions of
the length of the norm bound, nearly at right angles to each other. Each is put into a sum or left out by a fair coin.
Its score is the share of its direction in the noisy mean.

Differs from the paper: one round, with every store in it, and canaries alone, since the uploads of others are no more
in their way than they are in each other's. The scores give the lower bound of `empirical_epsilon`, not an estimate.
With noise of the stores, the sum of canaries is rounded, and as many shares are added to it as the threshold.

Shapes: M canaries, V values.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedshelf.algorithms.base import Aggregate
from fedshelf.compression.modular import Modular
from fedshelf.compression.unit_ball import UnitBall
from fedshelf.core.rng import Rng
from fedshelf.privacy.audit.empirical_epsilon import EmpiricalEpsilon, empirical_epsilon
from fedshelf.privacy.audit.membership import shares
from fedshelf.privacy.client_dp import JointClip, NoisyMean, Within
from fedshelf.privacy.distributed_dp import NoiseShares
from fedshelf.privacy.noise import new_key

THRESHOLD = 3
MAX_VALUES = 1 << 15  # many more than canaries suffice: each value has noise of its own


def audit_store_noise(
    noisy_mean: NoisyMean,
    *,
    num_canaries: int,
    num_values: int,
    delta: float,
    rng: Rng,
    key: bytes | None = None,
) -> EmpiricalEpsilon:
    """Release the noisy mean of about half of the canaries, and guess which.

    Args:
        noisy_mean: the noise.
        num_canaries: M.
        num_values: values of an upload.
        delta: δ of the bound.
        rng: the auditor's coins.
        key: the noise's secret key; by default a new one.
    """
    generator, clip_norm = rng.fork(purpose="store canaries").torch(), noisy_mean.clip_norm
    directions_MV = torch.randn(num_canaries, min(num_values, MAX_VALUES), generator=generator)
    canaries_MV = directions_MV * (clip_norm / directions_MV.norm(dim=1, keepdim=True))
    is_in_M = torch.randint(2, (num_canaries,), generator=generator).bool()
    rows = list(canaries_MV[is_in_M])
    verdicts = JointClip(clip_norm)({"trainable": rows})
    mean = Aggregate(
        delta=canaries_MV[is_in_M].mean(0), num_clients=len(rows), num_trainable=canaries_MV.shape[1]
    )  # fmt: skip
    if noisy_mean.noise_at == "stores":
        mean = replace(mean, delta=_with_shares(mean.delta * len(rows), noisy_mean, num_canaries // 2) / len(rows))
    released, _ = noisy_mean.release(
        mean, Within.of(verdicts), expected=num_canaries / 2, clip_norm=clip_norm, key=new_key() if key is None else key
    )  # fmt: skip
    return empirical_epsilon(shares(released.delta, canaries_MV).tolist(), is_in_M.tolist(), delta=delta)


def _with_shares(total_V: Tensor, noisy_mean: NoisyMean, expected: int) -> Tensor:
    """The sum of canaries with the noise of as many stores as the threshold."""
    ball = UnitBall().integers(Modular(32), len(total_V))
    step = noisy_mean.clip_norm / ball.levels
    values = (total_V.double() / step).round().to(torch.int32).numpy().view(np.uint32)
    codes = values, np.zeros(0, np.uint32), np.zeros(1, np.uint64)
    for _ in range(THRESHOLD):
        NoiseShares(noisy_mean).add(codes, ball, num_members=expected, threshold=THRESHOLD)
    return torch.from_numpy(values.view(np.int32)).double().mul(step).float()
