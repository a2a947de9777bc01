"""What Li et al. 2020 say of FedProx, asserted of this implementation."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.fedprox import FedProx
from fedshelf.core.messages import Broadcast, Purpose, TaskKey, Upload
from fedshelf.core.state import ClientState
from fedshelf.training.bound_model import GradientHook
from fedshelf.training.trainer import Trainer
from tests.worlds import PLAIN, bound_model, linear, trainer, with_batch_norm

KEY = TaskKey(run_id="r", round=1, attempt=0)


class Capturing(Trainer):
    """Takes the hook that the algorithm hands to the training loop, and does not train."""

    def upload(self, broadcast: Broadcast, *, gradient_hook: GradientHook | None = None) -> Upload:
        assert gradient_hook is not None
        hooks.append(gradient_hook)
        return Upload(
            key=broadcast.key,
            vectors={"delta": torch.zeros(0)},
            num_examples=1,
            num_steps=0,
            train_loss=0.0,
            seconds=0.0,
        )


hooks: list[GradientHook] = []
BENCH = bound_model(with_batch_norm())


@given(
    mu=st.floats(0, 100), seed=st.integers(0, 2**20), scale=st.sampled_from([1e-3, 1.0, 30.0])
)  # fmt: skip
def test_the_extra_gradient_is_autograds_of_half_mu_times_the_squared_distance(
    mu: float, seed: int, scale: float
) -> None:
    """Eq. 2: h(w; w_t) = F(w) + mu/2 · ||w - w_t||²."""
    layout = BENCH.params.layout
    draw = torch.Generator().manual_seed(seed)
    params = torch.randn(layout.num_shared, generator=draw) * scale
    w = torch.randn(layout.num_trainable, generator=draw) * scale
    gradient = torch.randn(layout.num_trainable, generator=draw)
    broadcast = Broadcast(key=KEY, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=0.1)
    example = trainer(bench=BENCH)
    capturing = Capturing(
        bound_model=BENCH, client="a", rng=example.rng, train=example.train, validation=example.validation
    )  # fmt: skip
    FedProx(mu=mu).client_round(broadcast, ClientState(), capturing)

    variable = w.double().requires_grad_()
    distance = variable - params[: layout.num_trainable].double()
    (mu / 2 * distance.square().sum()).backward()
    assert variable.grad is not None
    expected = gradient.double() + variable.grad

    hooks.pop()(gradient, w)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5 * max(1.0, mu) * scale)


def client_delta(algorithm: FedAvg | FedProx, module: nn.Module | None = None) -> torch.Tensor:
    settings = replace(PLAIN, momentum=0.5, local_epochs=5, gradient_clip=5.0)
    work = trainer(bench=bound_model(module or with_batch_norm(), settings))
    start = work.bound_model.params.shared.clone()
    broadcast = Broadcast(key=KEY, purpose=Purpose.TRAIN, vectors={"params": start}, client_lr=0.1)
    upload, _ = algorithm.client_round(broadcast, ClientState(), work)
    return upload.delta


def test_without_its_term_fedprox_is_fedavg_bit_for_bit() -> None:
    assert torch.equal(client_delta(FedProx(mu=0.0)), client_delta(FedAvg()))


def test_the_term_holds_the_client_near_the_global_model() -> None:
    algorithms = (FedAvg(), FedProx(mu=0.5), FedProx(mu=2.0))
    free, near, nearer = (client_delta(algorithm, linear()).norm() for algorithm in algorithms)
    assert nearer < near < free
    assert nearer > 0


def test_clients_count_by_their_photos() -> None:
    uploads = [
        Upload(key=KEY, vectors={"delta": torch.zeros(1)}, num_examples=n, num_steps=1, train_loss=0.0, seconds=0.0)
        for n in (3, 9)
    ]
    few, many = (FedProx(mu=0.1).weight(upload, 0) for upload in uploads)
    assert many == 3 * few > 0


def test_the_first_step_is_that_of_fedavg_since_it_starts_at_the_anchor() -> None:
    def one_step(algorithm: FedAvg | FedProx) -> torch.Tensor:
        work = trainer(bench=bound_model(with_batch_norm(), replace(PLAIN, batch_size=1000)))
        start = work.bound_model.params.shared.clone()
        return algorithm.client_round(
            Broadcast(key=KEY, purpose=Purpose.TRAIN, vectors={"params": start}, client_lr=0.1), ClientState(), work
        )[0].delta

    assert torch.equal(one_step(FedProx(mu=10.0)), one_step(FedAvg()))
