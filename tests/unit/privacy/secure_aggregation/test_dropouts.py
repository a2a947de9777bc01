"""The masked sum of the survivors equals their plain sum bit for bit, whoever leaves; or nothing is revealed."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest

from fedshelf.core.errors import RefusedError
from fedshelf.privacy.secure_aggregation import graph
from fedshelf.privacy.secure_aggregation.context import threshold_of
from fedshelf.privacy.secure_aggregation.survivors import Survivors
from tests.unit.privacy.secure_aggregation.cohort import CONTEXT, Cohort, equal


def every_way_on(cohort: Cohort, stage: int, there: Sequence[str], threshold: int) -> int:
    """Let every subset of `there` take part in a stage and in those after it; return how many rounds that were."""
    steps = (Cohort.shares, Cohort.uploads, Cohort.signatures, Cohort.opened)
    rounds = 0
    for staying in (subset for count in range(len(there) + 1) for subset in combinations(there, count)):
        fork = cohort.fork()
        if len(staying) < threshold:
            with pytest.raises(RefusedError, match=TOO_FEW[stage == 3].format(threshold)):
                steps[stage](fork, staying)
            assert stage == 3 or not any(store.known() for store in fork.opened_sums.values())
            assert not (stage == 3 and fork.server.can_open())
            rounds += 1
        elif stage == 3:
            assert equal(fork.opened(staying), fork.plain_sum())
            rounds += 1
        else:
            steps[stage](fork, staying)
            rounds += every_way_on(fork, stage + 1, staying, threshold)
    return rounds


TOO_FEW = (
    "the threshold is {}: nothing is revealed",
    "too few stores have revealed .* of the {} that restore",
)


def check_every_way(count: int, threshold: int) -> int:
    cohort = Cohort(count, context=replace(CONTEXT, threshold=threshold)).keys()
    return every_way_on(cohort, 0, cohort.names, threshold)


@pytest.mark.parametrize(
    ("count", "threshold"),
    [(3, 3), (4, 3), (4, 4), (5, 3), (5, 4), (6, 5), (6, 4)],
)  # fmt: skip
def test_every_set_of_dropouts_in_every_stage(count: int, threshold: int) -> None:
    assert check_every_way(count, threshold) > 2**count


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))])
def test_random_dropouts_among_64(seed: int) -> None:
    random, cohort = Random(seed), Cohort(64, signed=seed % 2 == 1).keys()
    there, most = list(cohort.names), 64 - threshold_of(64, None)
    for step in (cohort.shares, cohort.uploads, cohort.signatures):
        there = sorted(random.sample(there, len(there) - random.randint(0, most // 4)))
        step(there)
    assert equal(cohort.opened(there), cohort.plain_sum())


def test_random_dropouts_with_a_harary_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_COMPLETE", 16)
    monkeypatch.setattr(graph, "DEGREE", 10)
    for seed in range(3):
        random, cohort = Random(seed), Cohort(40)
        staying = [name for name in cohort.names if name not in random.sample(cohort.names, 4)]
        cohort.keys().shares().uploads(staying).signatures(staying)
        assert len(cohort.server.record.sealed[cohort.names[0]].sealed) == 10
        assert equal(cohort.opened(staying), cohort.plain_sum())


@pytest.mark.long
def test_dropouts_with_a_harary_graph_of_its_real_degree() -> None:
    cohort = Cohort(150, signed=True)
    staying = cohort.names[10:]
    cohort.keys().shares().uploads(staying).signatures(staying)
    assert equal(cohort.opened(staying), cohort.plain_sum())


def test_survivors_that_fall_into_parts_are_refused_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_COMPLETE", 3)
    monkeypatch.setattr(graph, "DEGREE", 2)  # a ring: two who leave cut it, unless they are neighbors
    cohort = Cohort(9).keys().shares()
    ring = graph.Graph.of(cohort.names, cohort.roster.digest).ring
    staying = sorted(set(ring) - {ring[0], ring[4]})
    with pytest.raises(RefusedError, match="not connected by masks"):
        cohort.uploads(staying)
    with pytest.raises(RefusedError, match="fall into parts"):
        cohort.clients[staying[0]].confirm(Survivors(roster=cohort.roster.digest, members=tuple(staying)))


def test_the_default_threshold_is_more_than_two_thirds() -> None:
    assert [threshold_of(count, None) for count in (3, 4, 5, 6, 8, 64, 1000)] == [3, 3, 4, 5, 6, 43, 667]


@pytest.mark.parametrize(
    ("count", "asked", "told"),
    [
        (2, None, "needs at least 3 stores: the round has 2"),
        (4, 5, "the round has 4 stores, and its threshold is 5"),
        (3, 2, "with a threshold of 2, a sum of two stores could be opened"),
        (8, 4, "raise --secagg-threshold to at least 5"),
    ],
)
def test_a_round_that_could_not_be_safe_is_refused(count: int, asked: int | None, told: str) -> None:
    with pytest.raises(RefusedError, match=told):
        threshold_of(count, asked)
