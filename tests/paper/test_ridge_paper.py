"""The exact head: sums over stores give what ridge regression gives on all photos in one place (Fanì et al. 2024).

The regression in one place is solved here in another way, by least squares on the stacked system, in float64. All
heads are compared before they are rounded to float32.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedshelf.algorithms.ridge import CHOSEN, LAMBDAS, TEMPERATURES, Ridge
from fedshelf.core.events import RunStatus
from fedshelf.data.photo_set import PhotoSet
from fedshelf.scheduling.early_stopping import EarlyStopping
from tests.property.rounds.test_crashes import fragile, run_with_kills
from tests.worlds import World, bound_model, linear, photos, trainer

Array = NDArray[np.float64]
NUM_CLASSES = 8
STORES = tuple("abcdefgh")
LAMBDA = 0.02
FIXED = Ridge(ridge_lambda=LAMBDA)
SPLITS = ("iid", "dirichlet 0.1", "one product a store")
NOTHING = photos(0, 0)


def module() -> torch.nn.Module:
    return linear(NUM_CLASSES)


def all_photos(count: int = 240, seed: int = 1) -> PhotoSet:
    return photos(seed, count, classes=NUM_CLASSES)


def taken(pool: PhotoSet, rows: Sequence[int]) -> PhotoSet:
    return PhotoSet(pool.images[list(rows)], pool.labels[list(rows)])


def joined(sets: Sequence[PhotoSet]) -> PhotoSet:
    return PhotoSet(np.concatenate([s.images for s in sets]), np.concatenate([s.labels for s in sets]))


def split(pool: PhotoSet, how: str) -> dict[str, PhotoSet]:
    """Deal the photos to eight stores, so that each has one at least."""
    draw = np.random.default_rng(3)
    if how == "iid":
        store = draw.integers(0, 8, len(pool))
    elif how == "one product a store":
        store = pool.labels
    else:
        shares = draw.dirichlet([0.1] * 8, NUM_CLASSES)
        store = np.array([draw.choice(8, p=shares[label]) for label in pool.labels])
    store[:8] = pool.labels[:8] if how == "one product a store" else np.arange(8)
    dealt = {name: np.flatnonzero(store == index).tolist() for index, name in enumerate(STORES)}
    assert all(len(rows) for rows in dealt.values())
    return {name: taken(pool, rows) for name, rows in dealt.items()}


def features(photo_set: PhotoSet) -> Array:
    bound = bound_model(module())
    return np.asarray(trainer(bench=bound).features(photo_set), np.float64)


def in_one_place(photo_set: PhotoSet, scale: float = LAMBDA) -> Array:
    """W [E, K] by least squares: rows of photos, and below them the square root of the regularization."""
    rows = features(photo_set)
    penalty = np.sqrt(scale * (rows**2).sum() / rows.shape[1])
    stacked = np.block([[rows, np.ones((len(rows), 1))], [penalty * np.eye(rows.shape[1]), np.zeros((48, 1))]])
    targets = np.concatenate([np.eye(NUM_CLASSES)[photo_set.labels], np.zeros((rows.shape[1], NUM_CLASSES))])
    solution: Array = np.linalg.lstsq(stacked, targets, rcond=None)[0]
    return solution


def world_of(dealt: dict[str, PhotoSet], *, held_out: int = 0, algorithm: Ridge = FIXED, **settings: Any) -> World:
    """A federation of these stores; the first `held_out` photos of each are for validation."""
    data = {name: (taken(own, range(held_out, len(own))), taken(own, range(held_out))) for name, own in dealt.items()}
    settings = {"num_rounds": 1, "plan": {"early_stopping": EarlyStopping(newest=True)}, **settings}
    names = tuple(dealt)
    return World(names=names, withholding=names, module=module, algorithm=algorithm, data=data, **settings)


def head(world: World) -> Array:
    """W [E, K] of the newest state, before it is divided by the temperature."""
    bound = bound_model(module())
    state = world.checkpoints.states[-1].model
    solved = FIXED.for_model(bound.params.layout, bound.output_layer).solution(state)
    rounded = torch.cat([solved[:-1].T.reshape(-1), solved[-1]]).float()
    assert torch.equal(rounded, state.params)
    return (solved * state.optimizer[CHOSEN][1]).numpy()


def difference(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("how", SPLITS)
def test_the_head_of_eight_stores_is_the_head_of_all_photos_in_one_place(how: str) -> None:
    pool = all_photos()
    world = world_of(split(pool, how))
    assert world.run() is RunStatus.FINISHED
    assert difference(head(world), in_one_place(pool)) < 1e-6


def test_validation_photos_join_the_final_sums() -> None:
    pool = all_photos()
    world = world_of(split(pool, "iid"), held_out=5)
    world.run()
    assert difference(head(world), in_one_place(pool)) < 1e-6


@pytest.mark.parametrize("how", SPLITS)
def test_the_head_does_not_depend_on_the_order_of_arrival(how: str) -> None:
    dealt = split(all_photos(), how)
    heads = []
    for seed in range(4):
        order = random.Random(seed)
        world = world_of(dealt, order=order, delays={name: order.random() for name in dealt})
        world.run()
        heads.append(world.final)
    assert all(torch.equal(heads[0], other) for other in heads)


@pytest.mark.parametrize("restart_clients", [False, True])
def test_a_server_killed_at_any_step_ends_with_the_same_head(restart_clients: bool) -> None:
    dealt = dict(list(split(all_photos(60), "iid").items())[:3])

    def fresh() -> World:
        return world_of(dealt, held_out=1, algorithm=Ridge(), num_rounds=2)

    world = fresh()
    switch = fragile(world)
    world.run()
    whole, steps = world.checkpoints.states[-1], switch.step
    assert (
        difference(head(world), in_one_place(joined(list(dealt.values())), float(whole.model.optimizer[CHOSEN][0])))
        < 1e-6
    )
    assert steps > 40
    for kill_after in range(1, steps + 1):
        world = fresh()
        assert (
            run_with_kills(world, fragile(world), [kill_after], restart_clients=restart_clients) is RunStatus.FINISHED
        )
        state = world.checkpoints.states[-1]
        assert torch.equal(state.model.params, whole.model.params)
        assert all(torch.equal(state.model.optimizer[name], sums) for name, sums in whole.model.optimizer.items())
        assert state.photos == whole.photos


def test_without_validation_photos_lambda_is_a_hundredth_of_the_mean_diagonal_and_the_temperature_is_one() -> None:
    pool = all_photos()
    world = world_of(split(pool, "dirichlet 0.1"), algorithm=Ridge())
    world.run()
    assert world.checkpoints.states[-1].model.optimizer[CHOSEN].tolist() == [0.01, 1.0]
    assert difference(head(world), in_one_place(pool, 0.01)) < 1e-6


def by_brute_force(train: PhotoSet, validation: PhotoSet, lambdas: Sequence[float]) -> list[float]:
    """The largest lambda within one standard error of the best on all validation photos in one place, and its best
    temperature."""
    rows = np.concatenate([features(validation), np.ones((len(validation), 1))], 1)
    found = []
    for scale in lambdas:
        logits = rows @ in_one_place(train, scale)
        correct = int((logits.argmax(1) == validation.labels).sum())
        losses = []
        for temperature in TEMPERATURES:
            shifted = logits / temperature
            shifted -= shifted.max(1, keepdims=True)
            log_sums = np.log(np.exp(shifted).sum(1))
            losses.append(float((log_sums - shifted[np.arange(len(rows)), validation.labels]).sum()))
        found.append((correct / len(rows), scale, TEMPERATURES[int(np.argmin(losses))]))
    best = max(found)[0]
    least = best - np.sqrt(best * (1 - best) / len(rows))
    return list(max((scale, temperature) for accuracy, scale, temperature in found if accuracy >= least - 1e-12))


@pytest.mark.parametrize("algorithm", [Ridge(), FIXED])
@pytest.mark.parametrize("how", ["iid", "dirichlet 0.1"])
def test_lambda_and_temperature_are_those_chosen_on_all_validation_photos_in_one_place(
    algorithm: Ridge, how: str
) -> None:
    dealt = {name: own for name, own in split(all_photos(400), how).items() if len(own) > 8}
    world = world_of(dealt, held_out=6, algorithm=algorithm)
    world.run()
    train, validation = (joined([world.data[name][part] for name in dealt]) for part in (0, 1))
    lambdas = LAMBDAS if algorithm.ridge_lambda is None else (algorithm.ridge_lambda,)
    chosen = world.checkpoints.states[-1].model.optimizer[CHOSEN].tolist()
    assert chosen == by_brute_force(train, validation, lambdas)
    assert difference(head(world), in_one_place(joined([train, validation]), chosen[0])) < 1e-6


class TestLater:
    """A finished run is extended: stores send what has changed."""

    @staticmethod
    def extended(world: World, num_rounds: int = 2, **settings: Any) -> World:
        """The same run, for more rounds, its client processes started again."""
        world.clients = {name: world.client(name) for name in world.names}
        world.num_rounds = num_rounds
        world.restart()
        assert world.run_connected(**settings) is RunStatus.FINISHED
        return world

    def test_photos_that_are_added_count_as_if_they_had_been_there(self) -> None:
        pool, more = all_photos(), all_photos(40, seed=9)
        world = world_of(split(pool, "dirichlet 0.1"))
        world.run()
        world.data["c"] = (joined([world.data["c"][0], more]), NOTHING)
        self.extended(world)
        assert difference(head(world), in_one_place(joined([pool, more]))) < 1e-6

    def test_photos_that_are_moved_to_another_product_count_there(self) -> None:
        pool = all_photos()
        world = world_of(split(pool, "iid"), held_out=2)
        world.run()
        for part in (0, 1):
            world.data["b"][part].labels[:2] = (world.data["b"][part].labels[:2] + 1) % NUM_CLASSES
        self.extended(world)
        corrected = joined([part for own in world.data.values() for part in own])
        assert difference(head(world), in_one_place(corrected)) < 1e-6

    def test_a_product_of_the_catalogue_without_a_photo_gets_some_later(self) -> None:
        pool = all_photos()
        without = taken(pool, np.flatnonzero(pool.labels != 7).tolist())
        world = world_of(split(without, "iid"))
        world.run()
        assert difference(head(world), in_one_place(without)) < 1e-6
        new = taken(pool, np.flatnonzero(pool.labels == 7).tolist())
        world.data["h"] = (joined([world.data["h"][0], new]), NOTHING)
        self.extended(world)
        assert difference(head(world), in_one_place(pool)) < 1e-6

    def test_a_store_that_joins_later_counts_as_if_it_had_been_there(self) -> None:
        pool = all_photos()
        dealt = split(pool, "iid")
        world = world_of(dealt)
        world.names = STORES[:-1]
        assert world.run() is RunStatus.FINISHED
        world.names, world.rounds = STORES, {"quorum": 8}
        self.extended(world)
        assert difference(head(world), in_one_place(pool)) < 1e-6

    @staticmethod
    def withdraw(world: World, name: str) -> None:
        world.withdrawing.add(name)
        world.data[name] = (NOTHING, NOTHING)

    @pytest.mark.parametrize("how", SPLITS)
    @pytest.mark.parametrize("others", ["there", "away"])
    def test_a_store_that_withdraws_has_never_been_there(self, how: str, others: str) -> None:
        dealt = split(all_photos(), how)
        world = world_of(dealt, held_out=1)
        world.run()
        before = world.checkpoints.states[-1]
        self.withdraw(world, "d")
        world.names = world.names if others == "there" else ("d",)
        self.extended(world)
        rest = joined([own for name, own in dealt.items() if name != "d"])
        assert difference(head(world), in_one_place(rest)) < 1e-6
        assert (
            world.transport.refused["line-to-d"] == "the photos of this store are no longer in the model, as of round 2"
        )
        assert world.transport.final_refusals == {"line-to-d"}
        after = world.checkpoints.states[-1]
        assert [state.round for state in world.checkpoints.states] == [2]
        assert world.checkpoints.best is not None
        assert world.checkpoints.best.round == 2
        if others == "away":  # nobody could choose: the choice of before stays
            assert torch.equal(after.model.optimizer[CHOSEN], before.model.optimizer[CHOSEN])

        never = world_of({name: own for name, own in dealt.items() if name != "d"}, held_out=1)
        never.run()
        assert difference(head(world), head(never)) < 1e-6

    def test_a_store_that_has_withdrawn_may_come_back(self) -> None:
        pool = all_photos()
        world = world_of(split(pool, "iid"))
        world.run()
        own = world.data["d"]
        self.withdraw(world, "d")
        self.extended(world)
        world.data["d"] = own
        world.withdrawing.clear()
        self.extended(world, 3)
        assert difference(head(world), in_one_place(pool)) < 1e-6

    def test_when_the_last_store_withdraws_the_head_is_zero(self) -> None:
        world = world_of(dict(list(split(all_photos(), "iid").items())[:2]))
        world.run()
        for name in world.names:
            self.withdraw(world, name)
        self.extended(world)
        assert not world.final.any()

    def test_a_withdrawal_that_a_kill_interrupts_is_counted_once(self) -> None:
        dealt = dict(list(split(all_photos(60), "iid").items())[:3])
        rest = joined([own for name, own in dealt.items() if name != "b"])
        kill_after = 0
        while True:
            kill_after += 1
            world = world_of(dealt, held_out=1)
            world.run()
            self.withdraw(world, "b")
            world.clients = {name: world.client(name) for name in world.names}
            world.num_rounds, switch = 2, fragile(world)
            world.restart()
            assert run_with_kills(world, switch, [kill_after], restart_clients=True) is RunStatus.FINISHED
            assert difference(head(world), in_one_place(rest)) < 1e-6
            assert world.checkpoints.states[-1].photos["b"] == 0
            if switch.step < kill_after:  # the server was not killed any more
                break
        assert kill_after > 20


def test_a_feature_that_is_always_zero_does_not_end_the_run() -> None:
    black = PhotoSet(np.zeros((8, 4, 4, 3), np.uint8), np.arange(8))
    world = world_of({"a": black, "b": black})
    assert world.run() is RunStatus.FINISHED
    assert bool(torch.isfinite(world.final).all())


def test_the_loss_of_a_round_without_training_is_not_shown() -> None:
    world = world_of(split(all_photos(), "iid"))
    world.run()
    assert [record.train_loss for record in world.finished] == [None]


def test_sums_stay_in_float64_on_their_way() -> None:
    """In float32, the constant alone would be wrong from 16,777,217 photos on, and the head far sooner."""
    from fedshelf.algorithms.reduce import weighted_mean

    rows = [torch.tensor([1e8 + 1], dtype=torch.float64), torch.tensor([1e8], dtype=torch.float64)]
    assert 2 * float(weighted_mean(rows, [0.5, 0.5])) == 2e8 + 1
