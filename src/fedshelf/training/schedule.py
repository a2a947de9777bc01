"""The client learning rate over rounds."""

import math

from fedshelf.core.choices import Schedule


def client_lr(base: float, *, schedule: Schedule, warmup_rounds: int, round: int, num_rounds: int) -> float:
    """The learning rate of a round: linear warm-up, then constant or a half cosine.

    The cosine starts at round 1 and would reach zero one round after the last. Rounds beyond `num_rounds` (of an
    extended run) keep the last round's rate.

    Args:
        base: the peak rate.
        schedule: constant or cosine.
        warmup_rounds: rounds of linear warm-up.
        round: the round, from 1.
        num_rounds: rounds of the run.

    Source: Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts; per round, since that is the server's clock.
    """
    step = min(round, num_rounds)
    warmup = min(1.0, step / warmup_rounds) if warmup_rounds else 1.0
    if schedule == "constant":
        return base * warmup
    return base * warmup * 0.5 * (1 + math.cos(math.pi * (step - 1) / num_rounds))
