"""What Wang et al. 2020 say of normalized averaging (`--work-norm l1`), asserted of unequal local work."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.algorithms.aggregation import combine, normalized, rescaled
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.reduce import MEAN
from fedshelf.core.messages import Broadcast, Purpose, TaskKey, Upload, auxiliary_vectors
from fedshelf.core.state import ClientState, ModelState
from fedshelf.scheduling.workload import Workload
from tests.paper.quadratics import NUM_VALUES, Quadratic, trains_on
from tests.worlds import PLAIN

STEPS = {"c0": 1, "c1": 5}
CONFIGURED = 3
KEY = TaskKey(run_id="r", round=1, attempt=0)


def clients() -> dict[str, Quadratic]:
    draw = torch.Generator().manual_seed(5)
    return {
        name: Quadratic(torch.rand(NUM_VALUES, generator=draw) * 2 + 1, torch.randn(NUM_VALUES, generator=draw))
        for name in STEPS
    }


def weighted_optimum(weights: dict[str, float]) -> Tensor:
    curvature = sum((weights[n] * c.curvature for n, c in clients().items()), torch.zeros(NUM_VALUES))
    pull = sum((weights[n] * c.curvature * c.minimum for n, c in clients().items()), torch.zeros(NUM_VALUES))
    return pull / curvature


class Rounds:
    """Rounds of unequal steps by hand, with the system's own parts."""

    def __init__(self, *, normalize: bool, momentum: float) -> None:
        settings = replace(PLAIN, momentum=momentum)
        self.trainers = {name: trains_on(q, name=name, settings=settings) for name, q in clients().items()}
        self.weights = {name: float(len(trainer.train)) for name, trainer in self.trainers.items()}
        self.workload, self.normalize = Workload(training=settings, norm="l1"), normalize

    def change(self, params: Tensor, lr: float) -> Tensor:
        """What a round adds to `params`."""
        algorithm, state = FedAvg(), ModelState(params=params)
        shares = {n: self.workload.share(steps, CONFIGURED) if self.normalize else 1.0 for n, steps in STEPS.items()}
        uploads: list[Upload] = []
        for name, steps in STEPS.items():
            broadcast = Broadcast(
                key=KEY, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=lr, num_steps=steps
            )
            upload, _ = algorithm.client_round(broadcast, ClientState(), self.trainers[name])
            assert upload.num_steps == steps
            uploads.append(normalized(upload, shares[name], num_trainable=NUM_VALUES))
        weights = [algorithm.weight(upload, 0) for upload in uploads]
        aggregate, _ = combine(uploads, weights, MEAN, num_trainable=NUM_VALUES)
        length = sum(w * shares[n] for n, w in zip(STEPS, weights, strict=True)) / sum(weights)
        return algorithm.server_update(state, rescaled(aggregate, length), 2).params - params


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_at_the_optimum_of_the_weighted_objective_normalized_averaging_stays_and_plain_averaging_leaves(
    momentum: float,
) -> None:
    """To first order in the rate: what is left is the clients' drift."""
    plain, normal = (Rounds(normalize=normalize, momentum=momentum) for normalize in (False, True))
    best = weighted_optimum(plain.weights)
    assert normal.change(best, 1e-4).norm() < 0.01 * plain.change(best, 1e-4).norm()


def test_normalized_averaging_reaches_the_optimum_of_the_weighted_objective_where_plain_averaging_does_not() -> None:
    ends = []
    for normalize in (False, True):
        rounds = Rounds(normalize=normalize, momentum=0.0)
        params, best = torch.zeros(NUM_VALUES), weighted_optimum(rounds.weights)
        for _ in range(250):
            params = params + rounds.change(params, 0.01)
        ends.append((params - best).norm().item())
    plain, normal = ends
    assert plain > 1.0
    assert normal < 0.1 * plain


def test_steps_taken_for_plain_ones_would_not_do_with_momentum() -> None:
    """The coefficients of the gradients count (the paper's a_i), not their number."""
    rounds = Rounds(normalize=True, momentum=0.9)
    best = weighted_optimum(rounds.weights)
    right = rounds.change(best, 1e-4).norm()
    rounds.workload = Workload(training=PLAIN, norm="l1")
    assert right < 0.05 * rounds.change(best, 1e-4).norm()


def test_a_round_moves_by_the_mean_length_of_its_work() -> None:
    """tau_eff: with equal gradients everywhere, unequal steps lead as far as their weighted mean of steps would."""
    rounds = Rounds(normalize=True, momentum=0.0)
    flat = Quadratic(torch.full((NUM_VALUES,), 1e-6), torch.full((NUM_VALUES,), 1e6))  # gradient -1
    rounds.trainers = {name: trains_on(flat, name=name, settings=PLAIN) for name in STEPS}
    steps = sum(rounds.weights[n] * s for n, s in STEPS.items()) / sum(rounds.weights.values())
    change = rounds.change(torch.zeros(NUM_VALUES), 0.01)
    torch.testing.assert_close(change, torch.full((NUM_VALUES,), 0.01 * steps), rtol=1e-4, atol=0)


@given(seed=st.integers(0, 2**20), steps=st.integers(1, 50))
def test_with_equal_shares_of_work_not_one_bit_is_different(seed: int, steps: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    upload = Upload(
        key=KEY,
        vectors={"delta": torch.randn(20, generator=draw)},
        num_examples=3,
        num_steps=steps,
        train_loss=0.0,
        seconds=0.0,
    )
    share = Workload().share(steps, steps)
    assert normalized(upload, share, num_trainable=15) is upload
    aggregate, _ = combine([upload, upload], [1.0, 3.0], MEAN, num_trainable=15)
    assert rescaled(aggregate, share) is aggregate


def test_statistics_and_auxiliary_vectors_are_no_sums_of_steps_and_stay() -> None:
    upload = Upload(
        key=KEY,
        vectors={"delta": torch.tensor([1.0, 2.0, 3.0]), **auxiliary_vectors({"control": torch.tensor([4.0, 5.0])})},
        num_examples=3,
        num_steps=1,
        train_loss=0.0,
        seconds=0.0,
    )
    found = normalized(upload, 0.5, num_trainable=2)
    assert found.delta.tolist() == [2.0, 4.0, 3.0]
    assert found.auxiliary["control"].tolist() == [4.0, 5.0]
    assert upload.delta.tolist() == [1.0, 2.0, 3.0], "it may be a view of a file"
    aggregate, _ = combine([found], [1.0], MEAN, num_trainable=2)
    assert rescaled(aggregate, 0.5).delta.tolist() == [1.0, 2.0, 3.0]
    assert aggregate.delta.tolist() == [2.0, 4.0, 3.0]


def test_what_came_in_finite_stays_finite() -> None:
    """Or an upload that passed every check would bring infinities behind them."""
    upload = Upload(
        key=KEY,
        vectors={"delta": torch.tensor([3e38, -3e38, 1.0])},
        num_examples=3,
        num_steps=1,
        train_loss=0.0,
        seconds=0.0,
    )
    assert normalized(upload, 0.1, num_trainable=3).delta.isfinite().all()
