"""A store's budget composes all that its ledger says, and stops before it is exceeded."""

import itertools
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedshelf.core.errors import PolicyError, RunError
from fedshelf.core.messages import Mechanism
from fedshelf.privacy.accounting import SampledGaussian, as_json, as_release, compose
from fedshelf.privacy.budget import Budget
from fedshelf.privacy.ledger_content import Release
from fedshelf.rounds.client import NOTHING

NOISE = Mechanism(noise_multiplier=1.0, sampling_rate=0.1, steps=20)
OTHER = Mechanism(noise_multiplier=2.0, sampling_rate=0.5, steps=5)
DIGESTS = itertools.count()
NOW = datetime(2026, 12, 1, tzinfo=UTC)


def release(mechanism: Mechanism | None = NOISE, **values: Any) -> Release:
    given: dict[str, Any] = {
        "number": 7, "time": "2026-11-30T10:00:00.000Z", "kind": "upload", "purpose": "train", "num_bytes": 1,
        "digest": f"{next(DIGESTS)}", "run_id": "a", "mechanism": None if mechanism is None else as_json(mechanism),
    }  # fmt: skip
    return Release(**{**given, **values})


def budget(
    *releases: Release, epsilon: float | None = None, others: Callable[[], dict[Path, tuple[Release, ...]]] = dict
) -> Budget:
    return Budget(lambda: releases, epsilon=epsilon, others=others, now=lambda: NOW)


def epsilon_of(*mechanisms: Mechanism) -> float:
    return compose([as_release(each) for each in mechanisms], 1e-5).epsilon


def test_releases_of_all_runs_count_whether_they_arrived_or_not() -> None:
    found = budget(release(), release(OTHER, run_id="b", is_sent=True), release(attempt=3)).spent_with(NOISE)
    assert found == pytest.approx(epsilon_of(NOISE, OTHER, NOISE, NOISE))


def test_it_equals_one_composed_list() -> None:
    mechanisms = [NOISE, OTHER] * 4
    one = [SampledGaussian(noise_multiplier=1.0, sampling_rate=0.1, steps=80),
           SampledGaussian(noise_multiplier=2.0, sampling_rate=0.5, steps=20)]  # fmt: skip
    found = budget(*(release(each) for each in mechanisms[:-1])).spent_with(mechanisms[-1])
    assert found == pytest.approx(compose(one, 1e-5).epsilon)


def test_names_and_counts_cost_nothing() -> None:
    assert budget(release(None, kind="ready", purpose="setup"), release(None, kind="failure")).spent_with(
        NOISE
    ) == pytest.approx(epsilon_of(NOISE))


def test_it_stops_before_it_is_exceeded(caplog: pytest.LogCaptureFixture) -> None:
    limit = epsilon_of(NOISE, NOISE)
    assert budget(release(), epsilon=limit + 1e-6).spent_with(NOISE) <= limit + 1e-6
    with pytest.raises(
        PolicyError, match=r"its privacy budget does not allow this release\. The store's own log says more$"
    ):
        budget(release(), release(), epsilon=limit + 1e-6).spent_with(NOISE)
    assert "2 releases of the last 365 days gave an ε of" in caplog.text


def test_a_run_whose_first_round_needs_more_than_the_budget_is_refused_with_both_figures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(PolicyError, match="does not allow this release"):
        budget(epsilon=0.5).spent_with(NOISE)
    assert (
        f"one round of this run needs an ε of {epsilon_of(NOISE):.4g}, and the budget is epsilon = 0.5" in caplog.text
    )
    assert "used up" not in caplog.text
    assert "releases" not in caplog.text


def test_a_release_without_noise_ends_every_guarantee_for_a_year(caplog: pytest.LogCaptureFixture) -> None:
    bare = release(None, kind="evaluation", purpose="evaluate", time="2026-01-02T10:00:00.000Z")
    assert budget(bare).spent_with(NOISE) == math.inf
    with pytest.raises(PolicyError, match="its privacy budget does not allow this release"):
        budget(bare, epsilon=100.0).spent_with(NOISE)
    assert (
        "entry 7 of this store's ledger, of 2026-01-02, left without noise (evaluate), so that no ε bounds"
        in caplog.text
    )


def test_what_left_more_than_a_year_ago_no_longer_counts() -> None:
    old = release(None, time="2025-11-30T10:00:00.000Z")
    assert budget(old, epsilon=100.0).spent_with(NOISE) == pytest.approx(epsilon_of(NOISE))


def test_a_mechanism_with_next_to_no_noise_exceeds_every_budget() -> None:
    with pytest.raises(PolicyError, match="does not allow"):
        budget(epsilon=8.0).spent_with(Mechanism(noise_multiplier=1e-155, sampling_rate=0.5, steps=1))


def test_a_comparison_that_tells_nothing_costs_nothing_and_sets_no_noise() -> None:
    told = release(NOTHING, kind="comparison", purpose="compare")
    assert budget(told, epsilon=8.0).spent_with(NOISE) == pytest.approx(epsilon_of(NOISE))
    found = budget(release(), told).noise_multiplier(
        "a", target_epsilon=8.0, delta=1e-5, sampling_rate=0.1, steps=20
    )  # fmt: skip
    assert found == NOISE.noise_multiplier


def test_releases_of_other_state_directories_count_and_the_same_bytes_only_once() -> None:
    same = release()
    others = {Path("a"): (release(OTHER), same), Path("b"): (release(NOISE, time="2025-01-01T10:00:00.000Z"),)}
    found = budget(release(), same, others=lambda: others).spent_with(NOISE)
    assert found == pytest.approx(epsilon_of(NOISE, NOISE, OTHER, NOISE))


def test_the_noise_of_a_run_leaves_room_for_what_other_state_directories_have_spent() -> None:
    def noise(*spent: Release) -> float:
        return budget(epsilon=epsilon_of(NOISE, NOISE), others=lambda: {Path("a"): spent}).noise_multiplier(
            "b", target_epsilon=100.0, delta=1e-5, sampling_rate=0.1, steps=20
        )

    assert noise(release()) > noise()
    with pytest.raises(PolicyError, match="does not allow this release"):
        noise(release(), release())


def test_a_release_without_noise_is_named_with_its_ledger(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PolicyError, match="does not allow this release"):
        budget(epsilon=8.0, others=lambda: {Path("clients/b"): (release(None),)}).spent_with(NOISE)
    assert "entry 7 of the ledger in 'clients/b', of 2026-11-30, left without noise" in caplog.text


def test_a_ledger_that_cannot_be_read_leaves_nothing_of_a_budget(caplog: pytest.LogCaptureFixture) -> None:
    def others() -> dict[Path, tuple[Release, ...]]:
        raise RunError("'b/ledger.jsonl' is missing")

    assert budget(others=others).spent_with(NOISE) == math.inf
    with pytest.raises(PolicyError, match="does not allow this release"):
        budget(epsilon=8.0, others=others).spent_with(NOISE)
    assert "what has left of these photos is not known: 'b/ledger.jsonl' is missing" in caplog.text
