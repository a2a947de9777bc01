"""What --dp cannot be combined with is refused before a run exists; what it trains is noised and reported."""

from typing import Any

import pytest

from fedshelf.app import run
from fedshelf.app.differential_privacy import noise_for, noisy_mean_of, released
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.privacy.accounting import SampledGaussian, compose
from fedshelf.privacy.client_dp import FIRST_NORM
from fedshelf.privacy.dp_sgd import SampleDP

SAMPLE: dict[str, Any] = {"dp": "sample", "noise_multiplier": 1.0, "norm": "group", "width": 8, "image_size": 16}
CLIENT: dict[str, Any] = {"dp": "client", "noise_multiplier": 1.0}


def config_of(**given: Any) -> RunConfig:
    return RunConfig(**given)


def problems(**given: Any) -> str:
    opening = run.open_run(config_of(**given), watchers=())
    with pytest.raises(UsageError) as refused, opening:
        pass
    return str(refused.value)


@pytest.mark.parametrize("dp", ["sample", "client"])
def test_either_the_noise_or_the_target_is_given(dp: str) -> None:
    assert f"--dp {dp} needs --target-epsilon or --noise-multiplier" in problems(dp=dp)
    assert "not both" in problems(dp=dp, noise_multiplier=1.0, target_epsilon=1.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"norm": "batch"}, "the batch normalization 'stem.1' mixes the photos of a batch"),
        ({"algorithm": "ridge", "train": "head", "rounds": 2}, "--algorithm ridge with --dp sample: one round gives"),
        ({"algorithm": "scaffold", "scaffold_option": "1"}, "--scaffold-option 1 with --dp sample"),
        ({"warm_start": "ridge"}, "--warm-start ridge with --dp sample"),
        ({"refit_head": True}, "--refit-head with --dp sample"),
        ({"loss": "fedlc"}, "--loss fedlc with --dp sample: the loss depends on how many photos"),
        ({"dynamic_batch": True}, "--dynamic-batch with --dp sample"),
        ({"local_work": "dynamic"}, "--local-work dynamic with --dp sample"),
        ({"engine": "vmap"}, "--engine vmap with --dp sample"),
        ({"clip_norm": "adaptive"}, "--clip-norm adaptive needs --dp client"),
    ],
    ids=str,
)
def test_what_noise_in_the_stores_does_not_cover_is_refused(given: dict[str, Any], said: str) -> None:
    assert said in problems(**{**SAMPLE, **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"algorithm": "fedbuff"}, "--algorithm fedbuff with --dp client"),
        ({"aggregator": "median"}, "--aggregator median with --dp client"),
        ({"sampling": "size"}, "--sampling size with --dp client"),
        ({"over_selection": 0.5, "fraction": 0.5}, "--over-selection with --dp client"),
        ({"straggler_factor": 2.0}, "--straggler-factor with --dp client"),
        ({"norm_bound": 2.0}, "--norm-bound with --dp client"),
        ({"patience": 3}, "--patience with --dp client: it needs --test-dir"),
        ({"best_metric": "accuracy"}, "--best-metric accuracy with --dp client"),
    ],
    ids=str,
)
def test_what_noise_at_the_server_does_not_cover_is_refused(given: dict[str, Any], said: str) -> None:
    assert said in problems(**{**CLIENT, **given})


def test_all_problems_are_named_at_once() -> None:
    said = problems(**{**SAMPLE, "loss": "fedrs", "dynamic_batch": True, "clip_norm": "adaptive"})
    assert all(flag in said for flag in ("--loss fedrs", "--dynamic-batch", "--clip-norm adaptive"))


def test_pretrained_weights_imply_no_exact_head_with_noise() -> None:
    config = config_of(pretrained=True, model="tf_efficientnet_lite0", dp="sample", noise_multiplier=1.0)
    assert (config.warm_start, config.refit_head) == ("none", False)
    assert config.freeze_norm
    assert config.gradient_clip == 0.0


def test_a_store_calibrates_its_noise_to_its_photos() -> None:
    config = config_of(dp="sample", target_epsilon=4.0, rounds=5, local_epochs=2, batch_size=16)
    protection = SampleDP(target_epsilon=4.0)
    noises = {}
    for photos in (40, 400):
        noises[photos] = noise_for(config, protection, photos)
        one = released(config, photos, noises[photos])
        assert one.steps == 2 * -(-photos // 16)
        assert one.sampling_rate == 16 / photos
        whole = SampledGaussian(
            noise_multiplier=noises[photos], sampling_rate=one.sampling_rate, steps=one.steps * config.rounds
        )
        assert 3.9 < compose([whole], protection.delta).epsilon <= 4.0
    assert noises[40] > noises[400]


def test_the_noise_at_the_server_follows_from_the_target() -> None:
    mean = noisy_mean_of(config_of(dp="client", target_epsilon=2.0, fraction=0.1, rounds=20))
    assert mean is not None
    assert mean.is_adaptive
    assert mean.clip_norm == FIRST_NORM
    whole = SampledGaussian(noise_multiplier=mean.noise_multiplier, sampling_rate=0.1, steps=20)
    assert 1.95 < compose([whole], 1e-5).epsilon <= 2.0
    assert noisy_mean_of(RunConfig()) is None


def test_a_run_keeps_the_text_that_it_had_before_there_was_noise() -> None:
    text = files.effective(config_of(clip_norm=1.0))
    assert not any(key in text for key in ("dp =", "delta", "clipping", "clip-quantile", "clip-rate"))
