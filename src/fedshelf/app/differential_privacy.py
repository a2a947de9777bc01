"""Differential privacy of a run: what it cannot be combined with, and how much noise it needs.

The server checks a configuration when the run is created. With noise in the stores (--dp sample), every store checks it
again before it trains.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from fedshelf.algorithms.base import Algorithm
from fedshelf.app.components import (
    algorithm_of,
    client_noise_of,
    has_noise_of_stores,
    hides_uploads,
    is_sampling_secret,
    mask_of,
    personalization_of,
    protection_of,
)
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Mechanism
from fedshelf.privacy.base import DEFAULT_DELTA, Noise
from fedshelf.privacy.budget import NO_BUDGET, Budget
from fedshelf.privacy.client_dp import ClientDP, NoisyMean
from fedshelf.privacy.dp_sgd import PrivateTraining, SampleDP, num_steps, poisson, sampling_rate
from fedshelf.privacy.gradient_check import find_problem
from fedshelf.privacy.private_ridge import PrivateRidge
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.own_training import OwnTraining
from fedshelf.training.phases import Phase
from fedshelf.training.trainer import Trainer

_Rules = Mapping[str, tuple[set[Any], str]]
_UNCOVERED: _Rules = {
    "scaffold_option": ({"1"}, "control variates of option 1 are gradients without noise: use 2"),
    "warm_start": ({"ridge"}, "stores send exact sums over their photos; --algorithm ridge adds noise to them"),
    "refit_head": ({True}, "stores send exact sums over their photos; --algorithm ridge adds noise to them"),
    "loss": ({"fedrs", "fedlc"}, "the loss depends on how many photos a store has of each product"),
    "dynamic_batch": ({True}, "the noise is calibrated to --batch-size"),
    "local_work": ({"dynamic", "cut"}, "the noise is calibrated to a number of local steps"),
    "engine": ({"vmap", "auto"}, "the gradient of each photo is computed for one store at a time: use local or ray"),
}
"""By field: values whose releases the noise of photos' gradients does not cover, and why."""
_NOT_A_SUM: _Rules = {
    "algorithm": ({"ridge", "fedasync", "fedbuff"}, "the noise is added to the sum of a round's bounded uploads"),
    "aggregator": ({"median", "trimmed-mean", "multi-krum"}, "the noise is calibrated to a sum of bounded uploads"),
    "warm_start": ({"ridge"}, "stores send exact sums over their photos"),
    "refit_head": ({True}, "stores send exact sums over their photos"),
    "sampling": ({"size", "availability"}, "every store is drawn with the same probability"),
    "local_work": ({"dynamic", "cut"}, "uploads of unequal work are scaled after they are bounded"),
    "best_metric": ({"accuracy", "train_loss"}, "the choice of a round would follow figures without noise; use "
        "central_accuracy, with --test-dir"),
}  # fmt: skip
"""By field: values with which the published model depends on more than the noisy sums, and why."""
_OF_ONE_ALGORITHM = {"scaffold_option": "scaffold"}


def problems_with_configuration(config: RunConfig) -> list[str]:
    """What --dp cannot be combined with, each with its reason."""
    protection, found = protection_of(config), []
    rules = _UNCOVERED if isinstance(protection, SampleDP) else _NOT_A_SUM if isinstance(protection, ClientDP) else {}
    if isinstance(protection, ClientDP):
        found += [
            f"--{key} with --dp client: {reason}"
            for key, is_set, reason in (
                ("over-selection", config.over_selection > 0, "a store is drawn with a known probability"),
                ("straggler-factor", config.straggler_factor is not None, "who is counted would depend on their speed"),
                ("norm-bound", config.norm_bound not in ("auto", "off"), "--clip-norm bounds uploads"),
                ("patience", config.patience > 0 and config.test_dir is None, "it needs --test-dir, because what "
                 "stores report has no noise"),
                ("noise-at stores", protection.noise_at == "stores" and not mask_of(config).is_on, "a share of the "
                 "noise protects the sum of all uploads, and none by itself. Add --secagg"),
            )
            if is_set
        ]  # fmt: skip
    for field, (values, reason) in rules.items():
        value = getattr(config, field)
        if value in values and _OF_ONE_ALGORITHM.get(field, config.algorithm) == config.algorithm:
            flag = f"--{field.replace('_', '-')}" + ("" if value is True else f" {value}")
            found.append(f"{flag} with --dp {config.dp}: {reason}")
    if isinstance(protection, SampleDP) and config.algorithm == "ridge" and config.rounds + config.extend > 1:
        found.append(
            "--algorithm ridge with --dp sample: one round gives the final output layer, and each round costs as much "
            "privacy. Use --rounds 1"
        )
    return found


def problem_with_model(config: RunConfig, bound: BoundModel) -> str | None:
    """Why the gradient of a photo cannot be bounded in this model; None if it can."""
    if not isinstance(protection_of(config), SampleDP):
        return None
    if bound.has_batch_norm:
        name = next(name for name, layer in bound.module.named_modules() if isinstance(layer, _BatchNorm))
        return (
            f"--dp {config.dp}: the batch normalization {name!r} mixes the photos of a batch, so that no bound on a "
            "photo's influence holds. Use --norm group, or --freeze-norm with pretrained weights"
        )
    problem = find_problem(bound, config.image_size)
    return None if problem is None else f"--dp {config.dp} does not work with --model {config.model}: {problem}"


def released(config: RunConfig, num_photos: int, noise_multiplier: float) -> Mechanism:
    """What one round's upload tells about a photo.

    Args:
        config: the run's configuration.
        num_photos: training photos of the store.
        noise_multiplier: standard deviation of the noise, as a multiple of the clip norm.
    """
    if algorithm_of(config).sums:
        return Mechanism(noise_multiplier=noise_multiplier, sampling_rate=1.0, steps=1)
    return Mechanism(
        noise_multiplier=noise_multiplier, sampling_rate=sampling_rate(num_photos, config.batch_size),
        steps=sum(_steps(config, phase, num_photos) for phase in personalization_of(config).phases),
    )  # fmt: skip


def _steps(config: RunConfig, phase: Phase, num_photos: int) -> int:
    return num_steps(num_photos, config.batch_size, config.local_epochs if phase.epochs is None else phase.epochs)


def noise_for(
    config: RunConfig, protection: SampleDP, num_photos: int, *, run_id: str = "", budget: Budget = NO_BUDGET
) -> float:
    """The noise multiplier of a store, which plans for every round: how often it is drawn is the server's secret.

    Args:
        config: the run's configuration.
        protection: the run's differential privacy.
        num_photos: training photos of the store.
        run_id: the run.
        budget: the store's privacy budget.

    Raises:
        BudgetError: no noise is enough for the target.
        PolicyError: the budget leaves nothing for this run.
        UsageError: `dp-accounting` is not installed.
    """
    if protection.noise_multiplier is not None:
        return protection.noise_multiplier
    one = released(config, num_photos, 1.0)
    return budget.noise_multiplier(
        run_id, target_epsilon=protection.target_epsilon or math.inf, delta=protection.delta,
        sampling_rate=one.sampling_rate, steps=one.steps * config.rounds,
    )  # fmt: skip


def tells_of_validation(config: RunConfig) -> bool:
    """Whether stores answer with figures on validation photos, which have no noise and are not masked."""
    return not (has_noise_of_stores(config) or hides_uploads(config))


def delta_of(config: RunConfig) -> float:
    """The probability with which the run's guarantee may fail."""
    protection = protection_of(config)
    return protection.delta if isinstance(protection, Noise) else DEFAULT_DELTA


def noisy_mean_of(config: RunConfig) -> NoisyMean | None:
    """The noise on the sum of uploads, with --dp client.

    Raises:
        BudgetError: no noise is enough for the target.
        UsageError: `dp-accounting` is not installed.
    """
    protection = protection_of(config)
    if not isinstance(protection, ClientDP):
        return None
    rate = config.fraction if is_sampling_secret(config) else 1.0
    return NoisyMean.of(protection, client_noise_of(config, protection), sampling_rate=rate)


def private(
    trainer: Trainer, config: RunConfig, *, run_id: str, budget: Budget = NO_BUDGET
) -> tuple[Trainer, Mechanism | None]:
    """The trainer with noise, and what each of its uploads tells about a photo; the same trainer without --dp sample.

    Args:
        trainer: a store's trainer.
        config: the run's configuration.
        run_id: the run.
        budget: the store's privacy budget.

    Raises:
        PolicyError: the budget leaves nothing for this run.
        RefusedError: the noise would not cover all that an upload tells.
        BudgetError: no noise is enough for the target.
        UsageError: `dp-accounting` is not installed.
    """
    protection = protection_of(config)
    if not isinstance(protection, SampleDP):
        return trainer, None
    problems = [
        *protection.problems(), *problems_with_configuration(config), problem_with_model(config, trainer.bound_model),
    ]  # fmt: skip
    if isinstance(trainer.run, OwnTraining):
        problems.append(f"--dp {config.dp} with a function for local training: its steps would have no noise")
    if found := [problem for problem in problems if problem]:
        raise RefusedError(*found)
    noise = noise_for(config, protection, len(trainer.train), run_id=run_id, budget=budget)
    training = PrivateTraining(noise_multiplier=noise, clip_norm=protection.clip_norm, clipping=protection.clipping)
    return replace(trainer, run=training, draw=poisson, is_private=True), released(config, len(trainer.train), noise)


def with_noise(algorithm: Algorithm, mechanism: Mechanism | None) -> Algorithm:
    """A store's half of an algorithm that adds noise itself, with that of the store; other algorithms as they are."""
    if mechanism is not None and isinstance(algorithm, PrivateRidge):
        return replace(algorithm, noise_multiplier=mechanism.noise_multiplier)
    return algorithm
