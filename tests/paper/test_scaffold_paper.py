"""What Karimireddy et al. 2020 say of SCAFFOLD, asserted of this implementation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.scaffold import CONTROL_VARIATE, Scaffold
from fedshelf.core.messages import Broadcast, Purpose, ServerMessage, TaskKey, Upload
from fedshelf.core.state import ModelState, ServerState
from fedshelf.training.trainer import Trainer
from tests.fakes import Answer
from tests.paper.quadratics import NUM_VALUES, Federation, drifting, optimum, trains_on
from tests.worlds import PLAIN, World

STEPS = replace(PLAIN, local_epochs=4)
OPTIONS = pytest.mark.parametrize("option", [1, 2])


def scaffold(option: int, server_lr: float = 1.0) -> Scaffold:
    return Scaffold(server_lr=server_lr, option="1" if option == 1 else "2")


def trainers(count: int = 2, **settings: Any) -> dict[str, Trainer]:
    chosen = replace(STEPS, **settings)
    return {f"c{i}": trains_on(quadratic, name=f"c{i}", settings=chosen) for i, quadratic in enumerate(drifting(count))}


def control(state: ModelState) -> Tensor:
    return state.optimizer[CONTROL_VARIATE]


@OPTIONS
def test_scaffold_reaches_the_optimum_where_fedavg_drifts(option: int) -> None:
    best = optimum(drifting())
    averaged, controlled = (
        Federation(algorithm, trainers(), lr=0.1) for algorithm in (FedAvg(), scaffold(option))
    )  # fmt: skip
    for _ in range(200):
        averaged.round()
        controlled.round()
    # FedAvg weighs by photos; the drift shows against the optimum of its own weights, too.
    weights = [upload.weight for upload in averaged.uploads]
    clients = drifting()
    curvature = sum((w * c.curvature for w, c in zip(weights, clients, strict=True)), torch.zeros(NUM_VALUES))
    pulls = (w * c.curvature * c.minimum for w, c in zip(weights, clients, strict=True))
    own_best = sum(pulls, torch.zeros(NUM_VALUES)) / curvature
    assert (averaged.state.params - own_best).norm() > 0.5
    assert (controlled.state.params - best).norm() < 1e-3


@OPTIONS
def test_scaffold_c_is_mean_of_client_c_under_partial_participation(option: int) -> None:
    federation = Federation(scaffold(option), trainers(4), lr=0.05)
    for cohort in (["c0", "c2"], ["c1"], ["c0", "c1", "c3"], ["c2"], ["c0", "c3"]):
        federation.round(cohort)
        own = [state.algorithm[CONTROL_VARIATE] for state in federation.clients.values()]
        mean = torch.stack(own).sum(0) / 4  # zero for who was never asked
        torch.testing.assert_close(control(federation.state), mean, rtol=1e-5, atol=1e-6)


def test_option_two_is_the_papers_line_with_plain_steps() -> None:
    """c_i+ = c_i - c + 1/(K·eta_l) · (x - y_i)."""
    federation = Federation(scaffold(2), trainers(), lr=0.05)
    for _ in range(3):
        x, c = federation.state.params, federation.state.optimizer.get(CONTROL_VARIATE, torch.zeros(NUM_VALUES))
        before = {name: state.algorithm[CONTROL_VARIATE] for name, state in federation.clients.items()}
        federation.round()
        for name, upload in zip(sorted(federation.trainers), federation.uploads, strict=True):
            y = x + upload.delta
            expected = before.get(name, torch.zeros(NUM_VALUES)) - c + (x - y) / ((upload.num_steps or 0) * 0.05)
            torch.testing.assert_close(
                federation.clients[name].algorithm[CONTROL_VARIATE], expected, rtol=1e-3, atol=1e-4
            )


def test_option_one_is_the_gradient_at_the_broadcast_model() -> None:
    federation = Federation(scaffold(1), trainers(), lr=0.05)
    federation.round()
    x = federation.state.params.clone()
    federation.round()
    for name, quadratic in zip(sorted(federation.trainers), drifting(), strict=True):
        torch.testing.assert_close(
            federation.clients[name].algorithm[CONTROL_VARIATE], quadratic.gradient(x), rtol=1e-5, atol=1e-6
        )


def test_the_pass_of_option_one_changes_nothing_of_the_training_after_it() -> None:
    one, two = (Federation(scaffold(option), trainers(), lr=0.05) for option in (1, 2))
    one.round()
    two.round()
    for first, second in zip(one.uploads, two.uploads, strict=True):
        assert torch.equal(first.delta, second.delta), "in the first round both options have no correction yet"


@OPTIONS
def test_one_client_alone_is_plain_local_training(option: int) -> None:
    """c_i = c: the corrections cancel."""
    alone = {"c0": trainers()["c0"]}
    controlled, averaged = Federation(scaffold(option), alone, lr=0.05), Federation(FedAvg(), alone, lr=0.05)
    for _ in range(3):
        controlled.round()
        averaged.round()
    torch.testing.assert_close(controlled.state.params, averaged.state.params, rtol=1e-5, atol=1e-6)


def test_the_server_rate_scales_the_step_and_not_the_control_variate() -> None:
    whole, half = (Federation(scaffold(2, rate), trainers(), lr=0.05) for rate in (1.0, 0.5))
    whole.round()
    half.round()
    torch.testing.assert_close(half.state.params, whole.state.params / 2)
    assert torch.equal(control(half.state), control(whole.state))


def test_clients_count_alike_however_many_photos_they_have() -> None:
    federation = Federation(scaffold(2), trainers(), lr=0.05)
    federation.round()
    assert len({upload.num_examples for upload in federation.uploads}) == 2
    mean = torch.stack([upload.delta for upload in federation.uploads]).mean(0)
    torch.testing.assert_close(federation.state.params, mean)


def test_with_momentum_the_control_variate_is_still_a_mean_of_gradients() -> None:
    """The paper's line would make it 1/(1 - momentum) times too large."""
    federation = Federation(scaffold(2), trainers(momentum=0.9), lr=1e-5)
    federation.round()
    for name, quadratic in zip(sorted(federation.trainers), drifting(), strict=True):
        found = federation.clients[name].algorithm[CONTROL_VARIATE]
        torch.testing.assert_close(found, quadratic.gradient(torch.zeros(NUM_VALUES)), rtol=1e-2, atol=1e-3)


def test_an_upload_that_is_late_or_refused_leaves_no_trace_in_the_control_variates() -> None:
    def damage(message: ServerMessage, answer: Answer) -> Answer:
        if isinstance(answer, Upload) and answer.key.round == 2:
            return replace(answer, vectors={**answer.vectors, "delta": answer.delta * float("nan")})
        return answer

    world = World(algorithm=scaffold(2), num_rounds=4, tampers={"b": damage})
    world.run()
    statuses = [{member.client: str(member.status) for member in record.clients} for record in world.finished]
    assert [status["b"] for status in statuses] == ["counted", "refused", "counted", "counted"]
    final = world.checkpoints.states[-1]
    total = sum((committed(world, final, name) for name in world.names), torch.zeros_like(control(final.model)))
    torch.testing.assert_close(control(final.model), total / len(world.names), rtol=1e-5, atol=1e-6)


def committed(world: World, final: ServerState, name: str) -> Tensor:
    """The control variate that the client would begin its next round with."""
    ask = Broadcast(
        key=TaskKey(run_id="run-1", round=99, attempt=0),
        purpose=Purpose.TRAIN,
        vectors={"params": final.model.params},
        client_lr=0.1,
        counted=final.counted.get(name),
    )
    return world.states[name].commit_or_rollback(ask).algorithm[CONTROL_VARIATE]
