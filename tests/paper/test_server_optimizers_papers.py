"""What Hsu et al. 2019 and Reddi et al. 2021 say of FedAvgM, FedAdagrad, FedAdam and FedYogi: two steps by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.algorithms.base import Aggregate, Algorithm
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.fedavgm import FedAvgM
from fedshelf.algorithms.fedopt import FedOpt, adagrad, adam, yogi
from fedshelf.core.state import ModelState
from tests.paper.quadratics import Federation, drifting, optimum, trains_on
from tests.worlds import World, with_batch_norm

START = ModelState(params=torch.tensor([1.0, -2.0, 10.0]))  # two trainable values, one statistic
DELTAS = (torch.tensor([0.5, -0.05, 3.0]), torch.tensor([-0.2, 0.3, -1.0]))


def after(algorithm: Algorithm, deltas: tuple[Tensor, ...] = DELTAS) -> list[ModelState]:
    """The states after rounds that amount to `deltas`."""
    states = [START]
    for delta in deltas:
        aggregate = Aggregate(delta=delta, num_clients=1, num_trainable=2)
        states.append(algorithm.server_update(states[-1], aggregate, 1))
    return states[1:]


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_fedavgm_by_hand() -> None:
    """v: 0.5, then 0.9 · 0.5 - 0.2 = 0.25; -0.05, then 0.9 · -0.05 + 0.3 = 0.255. Steps are half of v."""
    first, second = after(FedAvgM(server_lr=0.5, beta=0.9))
    close(first.params, [1.25, -2.025, 13.0])
    close(second.params, [1.375, -1.8975, 12.0])


SecondMoment = Callable[[Tensor, Tensor, float], Tensor]


def by_hand(second_moment: SecondMoment) -> tuple[list[float], list[float]]:
    """Algorithm 2 in plain numbers, for beta_1 = 0.9, beta_2 = 0.99, tau = 0.1, eta = 0.3; v starts at tau²."""
    squares: dict[SecondMoment, tuple[list[float], list[float]]] = {
        # delta²: 0.25, 0.0025 and then 0.04, 0.09
        adagrad: ([0.01 + 0.25, 0.01 + 0.0025], [0.26 + 0.04, 0.0125 + 0.09]),
        adam: ([0.99 * 0.01 + 0.01 * 0.25, 0.99 * 0.01 + 0.01 * 0.0025],
               [0.99 * 0.0124 + 0.01 * 0.04, 0.99 * 0.009925 + 0.01 * 0.09]),
        # v below delta² grows, above it shrinks
        yogi: ([0.01 + 0.01 * 0.25, 0.01 - 0.01 * 0.0025], [0.0125 + 0.01 * 0.04, 0.009975 + 0.01 * 0.09]),
    }  # fmt: skip
    v = squares[second_moment]
    m = ([0.05, -0.005], [0.9 * 0.05 - 0.1 * 0.2, -0.9 * 0.005 + 0.1 * 0.3])
    x1 = [w + 0.3 * a / (math.sqrt(b) + 0.1) for w, a, b in zip([1.0, -2.0], m[0], v[0], strict=True)]
    x2 = [w + 0.3 * a / (math.sqrt(b) + 0.1) for w, a, b in zip(x1, m[1], v[1], strict=True)]
    return [*x1, 13.0], [*x2, 12.0]


@pytest.mark.parametrize("second_moment", [adagrad, adam, yogi])
def test_adaptive_optimizers_by_hand(second_moment: SecondMoment) -> None:
    first, second = after(FedOpt(second_moment=second_moment, server_lr=0.3, beta1=0.9, beta2=0.99, tau=0.1))
    for state, expected in zip((first, second), by_hand(second_moment), strict=True):
        torch.testing.assert_close(state.params, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_yogi_shrinks_where_adam_would_forget_at_once() -> None:
    """v far above delta²: FedYogi takes (1 - beta_2) · delta² away, FedAdam a share of v."""
    large, small = torch.tensor([4.0]), torch.tensor([0.01])
    close(yogi(large, small, 0.9), [4.0 - 0.1 * 0.01])
    close(adam(large, small, 0.9), [0.9 * 4.0 + 0.1 * 0.01])


values = st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3).map(torch.tensor)


@given(first=values, second=values)
def test_without_momentum_and_at_rate_one_fedavgm_is_fedavg(first: Tensor, second: Tensor) -> None:
    found, expected = (after(algorithm, (first, second)) for algorithm in (FedAvgM(server_lr=1, beta=0), FedAvg()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.params, other.params)


@given(first=values, second=values, second_moment=st.sampled_from([adam, yogi]))
def test_where_nothing_is_adaptive_fedopt_is_fedavg(first: Tensor, second: Tensor, second_moment: SecondMoment) -> None:
    """beta_2 = 1 keeps v at tau², so that eta = 2 · tau is a step of delta."""
    plain = FedOpt(second_moment=second_moment, server_lr=0.5, beta1=0.0, beta2=1.0, tau=0.25)
    for one, other in zip(after(plain, (first, second)), after(FedAvg(), (first, second)), strict=True):
        torch.testing.assert_close(one.params, other.params, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvgM(server_lr=0.5, beta=0.5),
        *(FedOpt(second_moment=s, server_lr=0.1, beta1=0.9, beta2=0.99, tau=0.01) for s in (adagrad, adam, yogi)),
    ],
)
class TestEveryOptimizer:
    def test_its_update_is_pure(self, algorithm: Algorithm) -> None:
        before, given_delta = START.params.clone(), DELTAS[0].clone()
        (first,) = after(algorithm, DELTAS[:1])
        kept = {name: vector.clone() for name, vector in first.optimizer.items()}
        after(algorithm)
        algorithm.server_update(first, Aggregate(delta=DELTAS[1], num_clients=1, num_trainable=2), 1)
        assert torch.equal(START.params, before)
        assert torch.equal(DELTAS[0], given_delta)
        for name, vector in first.optimizer.items():
            assert torch.equal(vector, kept[name])

    def test_statistics_are_averaged_whatever_the_optimizer(self, algorithm: Algorithm) -> None:
        world, plain = (World(algorithm=a, num_rounds=1, module=with_batch_norm) for a in (algorithm, FedAvg()))
        world.run()
        plain.run()
        num_trainable = world.trainer("a").bound_model.params.layout.num_trainable
        assert torch.equal(world.final[num_trainable:], plain.final[num_trainable:])
        assert not torch.equal(world.final[:num_trainable], plain.final[:num_trainable])

    def test_a_resumed_run_is_the_uninterrupted_one(self, algorithm: Algorithm) -> None:
        whole, broken = (World(algorithm=algorithm, num_rounds=4) for _ in range(2))
        whole.run()
        broken.num_rounds = 2
        broken.run()
        broken.num_rounds = 4
        broken.restart()
        broken.server().run()
        assert torch.equal(whole.final, broken.final)

    def test_it_brings_drifting_clients_nearer_to_their_optimum(self, algorithm: Algorithm) -> None:
        quadratics = {f"c{i}": trains_on(quadratic, name=f"c{i}") for i, quadratic in enumerate(drifting())}
        federation = Federation(algorithm, quadratics, lr=0.02)
        best = optimum(drifting())
        distances = []
        for _ in range(60):
            distances.append((federation.state.params - best).norm())
            federation.round()
        assert distances[-1] < distances[0] / 2
