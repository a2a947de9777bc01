"""What Nguyen et al. 2022 and Xie et al. 2019 say of FedBuff and FedAsync."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.algorithms.aggregation import combine
from fedshelf.algorithms.base import Aggregate, polynomial
from fedshelf.algorithms.fedasync import FedAsync
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.algorithms.reduce import MEAN
from fedshelf.core.messages import Broadcast, Purpose, TaskKey, Upload
from fedshelf.core.state import ClientState, ModelState
from tests.paper.quadratics import NUM_VALUES, drifting, trains_on

KEY = TaskKey(run_id="run", round=1, attempt=0)
START = ModelState(params=torch.tensor([1.0, -2.0, 10.0]))  # two trainable values, one statistic


def upload(delta: list[float], *, num_examples: int = 1) -> Upload:
    return Upload(
        key=KEY,
        vectors={"delta": torch.tensor(delta)},
        num_examples=num_examples,
        num_steps=1,
        train_loss=0.0,
        seconds=0.0,
    )


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_fedbuff_by_hand() -> None:
    """K = 2, eta_g = 0.5: staleness 0 and 3 weigh 1 and 1/2; w + 0.5 · (1 · d_1 + 1/2 · d_2) / 2."""
    algorithm = FedBuff(server_lr=0.5, buffer_size=2)
    uploads = [upload([0.4, 0.0, 3.0]), upload([0.8, -1.6, 0.0], num_examples=99)]
    weights = [algorithm.weight(uploads[0], 0), algorithm.weight(uploads[1], 3)]
    assert weights == [1.0, 0.5]
    aggregate, _ = combine(uploads, weights, MEAN, num_trainable=2)
    after = algorithm.server_update(START, aggregate, 7)
    close(after.params, [1.0 + 0.5 * (0.4 + 0.4) / 2, -2.0 + 0.5 * (0.0 - 0.8) / 2, 10.0 + (3.0 + 0.0) / 1.5])


def test_fedasync_by_hand() -> None:
    """alpha = 0.6, a = 1, staleness 2: alpha_t = 0.2; x + 0.2 · (x_new - x), which is what the delta means here."""
    algorithm = FedAsync(alpha=0.6, rho=0.0, exponent=1.0)
    weight = algorithm.weight(upload([0.0] * 3), 2)
    assert weight == pytest.approx(0.2)
    aggregate, _ = combine([upload([0.5, -1.0, 2.0])], [weight], MEAN, num_trainable=2)
    close(algorithm.server_update(START, aggregate, 3).params, [1.1, -2.2, 10.4])


@given(st.integers(0, 1000), st.floats(0, 3))
def test_an_upload_weighs_the_less_the_older_it_is(staleness: int, exponent: float) -> None:
    assert polynomial(0, exponent) == 1
    assert polynomial(staleness + 1, exponent) <= polynomial(staleness, exponent)
    assert polynomial(staleness, 0.5) == pytest.approx(1 / math.sqrt(1 + staleness))


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_fedbuff_whose_buffer_holds_all_fresh_clients_is_fedavg_of_equal_stores(deltas: list[list[float]]) -> None:
    uploads = [upload(delta) for delta in deltas]
    algorithm = FedBuff(server_lr=1.0, buffer_size=len(uploads))
    buffered, _ = combine(uploads, [algorithm.weight(u, 0) for u in uploads], MEAN, num_trainable=2)
    averaged, _ = combine(uploads, [FedAvg().weight(u, 0) for u in uploads], MEAN, num_trainable=2)
    torch.testing.assert_close(
        algorithm.server_update(START, buffered, 9).params, FedAvg().server_update(START, averaged, 9).params
    )


def test_fedasync_with_alpha_one_takes_a_fresh_model_as_it_is() -> None:
    algorithm = FedAsync(alpha=1.0, rho=0.0)
    new = torch.tensor([3.0, 4.0, 5.0])
    delta = new - START.params
    aggregate = Aggregate(delta=delta, num_clients=1, num_trainable=2, mean_weight=algorithm.weight(upload([0.0]), 0))
    close(algorithm.server_update(START, aggregate, 1).params, [3.0, 4.0, 5.0])


def test_the_gradient_that_fedasync_adds_is_that_of_half_rho_times_the_squared_distance() -> None:
    """On a flat loss local training descends on the proximal term alone: each step leaves (1 - gamma · rho) of it."""
    (client,) = drifting(1)
    flat = replace(client, curvature=torch.zeros(NUM_VALUES))
    trainer = trains_on(flat)
    broadcast = Broadcast(key=KEY, purpose=Purpose.TRAIN, vectors={"params": torch.zeros(NUM_VALUES)}, client_lr=0.1)
    sent, _ = FedAsync(alpha=1.0, rho=0.5).client_round(broadcast, ClientState(), trainer)
    assert not sent.delta.any(), "there is nothing to pull at where it begins"
    steep = replace(client, curvature=torch.ones(NUM_VALUES), minimum=torch.ones(NUM_VALUES))
    free, _ = FedAsync(alpha=1.0, rho=0.0).client_round(broadcast, ClientState(), trains_on(steep))
    held, _ = FedAsync(alpha=1.0, rho=0.5).client_round(broadcast, ClientState(), trains_on(steep))
    # w <- w - gamma · (w - 1 + rho · w): the way to 1 / (1 + rho), by factors of 1 - gamma · (1 + rho) a step.
    for rho, found in ((0.0, free), (0.5, held)):
        expected = (1 - (1 - 0.1 * (1 + rho)) ** (found.num_steps or 0)) / (1 + rho)
        torch.testing.assert_close(found.delta, torch.full((NUM_VALUES,), expected))


def test_more_stale_versions_settle_fedbuff_near_the_optimum_still() -> None:
    """Two quadratic clients of equal curvature, one always two versions late: no drift, the mean of their minima."""
    clients = [replace(c, curvature=torch.ones(NUM_VALUES)) for c in drifting()]
    optimum = sum((c.minimum for c in clients), torch.zeros(NUM_VALUES)) / 2
    algorithm = FedBuff(server_lr=0.3, buffer_size=2, exponent=0.0)
    versions = [ModelState(params=torch.zeros(NUM_VALUES))]
    for number in range(1, 120):
        old = versions[max(0, len(versions) - 3)]
        uploads = []
        for client, base in zip(clients, (versions[-1], old), strict=True):
            broadcast = Broadcast(
                key=TaskKey(run_id="run", round=number, attempt=0),
                purpose=Purpose.TRAIN,
                vectors={"params": base.params},
                client_lr=0.2,
            )
            uploads.append(algorithm.client_round(broadcast, ClientState(), trains_on(client))[0])
        aggregate, _ = combine(uploads, [1.0, 1.0], MEAN, num_trainable=NUM_VALUES)
        versions.append(algorithm.server_update(versions[-1], aggregate, 2))
    torch.testing.assert_close(versions[-1].params, optimum, atol=1e-3, rtol=0)
