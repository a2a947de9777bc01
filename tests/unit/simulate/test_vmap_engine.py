"""Many clients in one computation: what they would have answered one by one, to rounding."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.config.schema import RunConfig
from fedshelf.core.messages import (
    Broadcast,
    ClientMessage,
    Evaluation,
    Failure,
    Purpose,
    TaskKey,
    Upload,
    auxiliary_vectors,
)
from fedshelf.core.state import ClientState, ModelState
from fedshelf.models.resnet import SmallResNet
from fedshelf.simulate.client_runner import ClientRunner, InProcess
from fedshelf.simulate.vmap import VmapBackend
from fedshelf.simulate.vmap_choice import choose_engine
from fedshelf.simulate.workers import WorkerPool
from fedshelf.training.trainer import Trainer
from tests.unit.simulate.federations import Federation, mean

SIZES = {"a": 11, "b": 8, "c": 4, "d": 9, "e": 13}  # last batches of 3, none, none, 1 and 1


def chain_cnn(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, 1, 1),
        nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, num_classes),
    )  # fmt: skip


def partly_frozen(num_classes: int) -> nn.Module:
    module = chain_cnn(num_classes)
    for parameter in list(module.parameters())[:2]:
        parameter.requires_grad_(False)
    return module


def two_layers(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, num_classes))


def group_norm_resnet(num_classes: int) -> nn.Module:
    return SmallResNet(num_classes, stem=8, blocks=[(8, 1), (16, 2)], norm="group")


def both(federation: Federation, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """One round played one by one, and together."""
    answers = []
    for backend in (InProcess(federation.runner.run), VmapBackend(federation.runner, chunk=5)):
        federation.set_up(backend)
        answers.append(federation.round(backend, **arguments))
    return answers[0], answers[1]


def assert_equal_to_rounding(alone: dict[str, Any], together: dict[str, Any], atol: float = 1e-6) -> None:
    for name, expected in alone.items():
        found = together[name]
        assert isinstance(found, Upload), found
        assert isinstance(expected, Upload), expected
        assert expected.delta.abs().max() > 100 * atol, "a round without effect would not be tested"
        torch.testing.assert_close(found.delta, expected.delta, rtol=0, atol=atol)
        assert (found.key, found.num_examples, found.num_steps) == (
            expected.key, expected.num_examples, expected.num_steps
        )  # fmt: skip
        assert found.train_loss == pytest.approx(expected.train_loss, abs=1e-5)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0, "weight_decay": 0.0, "gradient_clip": 0.0, "label_smoothing": 0.0},
        {"momentum": 0.9, "weight_decay": 5e-2, "gradient_clip": 0.5, "label_smoothing": 0.1, "local_epochs": 2},
    ],
    ids=["plain SGD", "everything"],
)
@pytest.mark.parametrize(
    "model", [None, chain_cnn, group_norm_resnet, partly_frozen], ids=["batch norm", "chain", "group norm", "frozen"]
)
def test_a_round_together_is_a_round_one_by_one(
    tmp_path: Path, model: Any, settings: dict[str, Any], augment: bool
) -> None:
    federation = Federation.of(tmp_path, SIZES, model=model, augment=augment, **settings)
    assert_equal_to_rounding(*both(federation, lr=1e-3))


def test_adapters_are_trained_together_as_one_by_one(tmp_path: Path) -> None:
    values: dict[str, Any] = {"model": two_layers, "train": "adapter", "local_epochs": 2}
    assert_equal_to_rounding(*both(Federation.of(tmp_path, SIZES, **values), lr=1e-2))


@pytest.mark.parametrize("norm", [None, chain_cnn], ids=["batch norm", "chain"])
def test_clients_with_different_numbers_of_steps_are_trained_together(tmp_path: Path, norm: Any) -> None:
    """Lanes end one after the other; those left go on, together and at last alone."""
    steps = {"a": 1, "b": 9, "c": 4, "e": 6}  # d: its own 3; a stops within an epoch, c goes through four of its own
    federation = Federation.of(tmp_path, SIZES, model=norm, momentum=0.9)
    alone, together = both(federation, lr=1e-3, num_steps=steps)
    assert {name: upload.num_steps for name, upload in together.items()} == {**steps, "d": 2 if norm is None else 3}
    assert_equal_to_rounding(alone, together)


def test_adamw_takes_the_same_steps_together(tmp_path: Path) -> None:
    """At a rate at which a gradient that is zero but for rounding, whose sign AdamW makes a step of, does no harm."""
    federation = Federation.of(tmp_path, SIZES, model=chain_cnn, optimizer="adamw", weight_decay=0.1, local_epochs=2)
    assert_equal_to_rounding(*both(federation, lr=1e-4))


def test_fedprox_pulls_every_client_to_the_global_model(tmp_path: Path) -> None:
    values: dict[str, Any] = {"model": chain_cnn, "local_epochs": 3, "algorithm": "fedprox", "mu": 5.0}
    prox = both(Federation.of(tmp_path, SIZES, **values), lr=1e-3)
    assert_equal_to_rounding(*prox)
    free, _ = both(Federation.of(tmp_path, SIZES, **{**values, "mu": 0.0}), lr=1e-3)
    assert (prox[1]["a"].delta - free["a"].delta).abs().max() > 1e-4, "a pull without effect would not be tested"


@dataclass(frozen=True)
class TwoPhases(Algorithm):
    """An algorithm that trains twice, remembers, and sends a vector beside the delta."""

    auxiliary: tuple[str, ...] = ("memory",)

    def broadcast(self, state: ModelState, num_trainable: int) -> Mapping[str, Tensor]:
        return {}

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        memory = state.algorithm.get("memory", torch.zeros_like(broadcast.params))
        if trainer.client in "ac":  # clients need not train equally often
            trainer.bound_model.load(broadcast.params)
            trainer.fit(round=broadcast.key.round + 1000, client_lr=broadcast.client_lr / 2)
            memory = memory + trainer.bound_model.params.shared

        def lean(gradient: Tensor, values: Tensor) -> None:
            gradient.add_(memory[: len(gradient)], alpha=0.1)

        upload = trainer.upload(broadcast, gradient_hook=lean)
        return replace(upload, vectors={**upload.vectors, **auxiliary_vectors({"memory": memory})}), ClientState(
            algorithm={"memory": memory}
        )

    def weight(self, upload: Upload, staleness: int) -> float:
        return 1.0

    def server_update(self, state: ModelState, aggregate: Any, population: int) -> ModelState:
        return state


@pytest.fixture
def two_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "fedavg", f"{__name__}:TwoPhases")


@pytest.mark.usefixtures("two_phases")
def test_an_algorithm_with_phases_and_memory_needs_to_know_nothing(tmp_path: Path) -> None:
    answers: list[dict[str, Any]] = []
    for number, make in enumerate(BACKENDS):
        federation = Federation.of(tmp_path / str(number), SIZES, model=chain_cnn)
        backend = make(federation.runner)
        federation.set_up(backend)
        federation.round(backend, lr=1e-3)
        counted = TaskKey(run_id="run", round=1, attempt=0)
        for name in federation.names:
            key = TaskKey(run_id="run", round=2, attempt=0)
            backend.submit(
                name,
                Broadcast(
                    key=key,
                    purpose=Purpose.TRAIN,
                    vectors={"params": federation.start},
                    client_lr=1e-3,
                    counted=counted,
                ),
            )
        answers.append(dict(backend.next() or ("", None) for _ in federation.names))
    assert_equal_to_rounding(answers[0], answers[1])
    for name in SIZES:
        torch.testing.assert_close(answers[1][name].auxiliary, answers[0][name].auxiliary, rtol=0, atol=2e-6)
    assert answers[1]["a"].auxiliary["memory"].norm() > 0
    assert answers[1]["b"].auxiliary["memory"].norm() == 0


BACKENDS: list[Callable[[ClientRunner], Any]] = [
    lambda runner: InProcess(runner.run),
    lambda runner: VmapBackend(runner, chunk=5),
]


def test_chunks_of_any_size_give_the_same(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES, model=chain_cnn)
    alone, _ = both(federation, lr=1e-3)
    for chunk in (1, 2, 3, 50):
        backend = VmapBackend(federation.runner, chunk=chunk)
        federation.set_up(backend)
        assert_equal_to_rounding(alone, federation.round(backend, lr=1e-3))


def test_a_client_left_alone_takes_the_very_steps_it_takes_elsewhere(tmp_path: Path) -> None:
    alone, together = both(Federation.of(tmp_path, {"a": 9}, model=chain_cnn), lr=0.1)
    assert torch.equal(alone["a"].delta, together["a"].delta)


def test_the_same_round_twice_gives_the_same_bits(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES)
    backend = VmapBackend(federation.runner)
    federation.set_up(backend)
    first, second = (federation.round(backend, lr=0.05) for _ in range(2))
    for name in SIZES:
        assert torch.equal(first[name].delta, second[name].delta)


def test_several_rounds_together_reach_the_accuracy_that_rounds_one_by_one_reach(tmp_path: Path) -> None:
    accuracies = []
    for make in BACKENDS:
        federation = Federation.of(tmp_path, dict.fromkeys("abcdef", 30), model=chain_cnn, local_epochs=2)
        backend = make(federation.runner)
        federation.set_up(backend)
        params = federation.start
        for number in range(1, 7):
            params = params + mean(federation.round(backend, params=params, number=number, lr=0.02))
        opened = federation.runner.open(federation.setup)
        opened.bound_model.load(params)
        seen = federation.runner.stores.photos("a", opened).train
        trainer = Trainer(bound_model=opened.bound_model, client="a", rng=None, train=seen, validation=seen)  # type: ignore[arg-type]
        accuracies.append(trainer.evaluate().accuracy or 0)
    assert accuracies[0] > 0.8
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.1)


def test_a_client_that_diverges_fails_by_itself(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES, model=chain_cnn, gradient_clip=0.0)
    backend = VmapBackend(federation.runner)
    federation.set_up(backend)
    key = TaskKey(run_id="run", round=1, attempt=0)
    for name in federation.names:
        params = federation.start if name != "b" else federation.start * float("inf")
        backend.submit(name, Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=1e-3))
    answers = dict(backend.next() or ("", None) for _ in federation.names)
    assert isinstance(answers["b"], Failure)
    assert "diverged in round 1" in answers["b"].reason
    alone, _ = both(federation, lr=1e-3)
    for name in "acde":
        torch.testing.assert_close(answers[name].delta, alone[name].delta, rtol=0, atol=1e-6)  # type: ignore[union-attr]


def test_evaluation_and_setups_are_answered_between_trainings(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES, model=chain_cnn)
    backend = VmapBackend(federation.runner)
    federation.set_up(backend)
    key = TaskKey(run_id="run", round=1, attempt=0)
    for name, purpose in zip("abcd", [Purpose.TRAIN, Purpose.EVALUATE, Purpose.TRAIN, Purpose.TRAIN], strict=True):
        backend.submit(name, Broadcast(key=key, purpose=purpose, vectors={"params": federation.start}, client_lr=1e-3))
    kinds = {name: type(answer) for name, answer in (backend.next() or ("", None) for _ in "abcd")}
    assert kinds == {"a": Upload, "b": Evaluation, "c": Upload, "d": Upload}


class Branching(nn.Module):
    """Decides by what it sees."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits if images.sum() > 0 else -logits


class Dropping(Branching):
    """Draws random numbers."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.dropout(images.flatten(1), 0.5))
        return logits


def counting(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


@pytest.mark.parametrize(
    ("model", "why"),
    [(Branching, "control flow"), (Dropping, "random operation"), (counting, "counts its batches")],
)
def test_a_model_that_cannot_be_computed_together_is_trained_one_by_one_with_one_warning(
    tmp_path: Path, model: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    federation = Federation.of(tmp_path, SIZES, model=model)
    with caplog.at_level(logging.WARNING):
        backend = VmapBackend(federation.runner)
        federation.set_up(backend)
        for number in (1, 2):
            answers = federation.round(backend, number=number, lr=1e-3)
    assert {type(answer) for answer in answers.values()} == {Upload}
    (warning,) = [record.getMessage() for record in caplog.records if "vmap" in record.name]
    assert why in warning
    assert "one after the other" in warning


class Lying(nn.Module):
    """Computes another function under vmap: nothing raises, and every gradient is wrong."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits * (2 if torch._C._functorch.is_functorch_wrapped_tensor(logits) else 1)


def test_a_model_whose_gradients_come_out_wrong_together_is_found_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation = Federation.of(tmp_path, SIZES, model=Lying)
    alone, together = both(federation, lr=1e-3)
    assert "gradients come out wrong" in caplog.text
    for name in SIZES:
        assert torch.equal(alone[name].delta, together[name].delta)


class Breaking(nn.Module):
    """Fails in training once it has been found fit."""

    calls = 0

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        Breaking.calls += 1
        if Breaking.calls > 4:
            raise ValueError("the model is broken")
        logits: Tensor = self.head(images.flatten(1))
        return logits


def test_a_model_that_fails_in_training_is_each_clients_failure_and_no_thread_is_left(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES, model=Breaking)
    backend = VmapBackend(federation.runner)
    federation.set_up(backend)
    Breaking.calls = 0
    before = threading.active_count()
    assert_all_say_that_the_model_is_broken(federation.round(backend, lr=1e-3))
    assert threading.active_count() == before


def test_a_client_that_cannot_take_part_says_why_as_elsewhere(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES, model=chain_cnn)
    wrong = replace(federation, setup=replace(federation.setup, layout_digest="another"))
    answers = []
    for make in BACKENDS:
        backend = make(wrong.runner)
        for name in wrong.names:
            backend.submit(name, wrong.setup)
        for _ in wrong.names:
            backend.next()
        answers.append({name: answer.reason for name, answer in wrong.round(backend, lr=1e-3).items()})
    assert answers[0] == answers[1]
    assert "differs from the server's" in answers[0]["a"]


def tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


@pytest.mark.parametrize(("clients", "expected"), [({"a": 8}, {"local"}), (SIZES, {"local", "vmap"})])
def test_the_engine_is_chosen_by_trying_and_the_reason_is_given(
    clients: dict[str, int], expected: set[str], tmp_path: Path
) -> None:
    stores = Federation.of(tmp_path, clients, model=tiny).runner.stores
    config = RunConfig(device="cpu", image_size=16, batch_size=4, min_clients=1, workers=0)
    choice = choose_engine(config, stores, make_module=tiny)
    assert choice.engine in expected
    assert ("there is one client" in choice.reason) == (len(clients) == 1)
    assert len(clients) == 1 or "by itself" in choice.reason


def test_a_worker_that_has_one_client_to_train_trains_it_by_itself(tmp_path: Path) -> None:
    stores = Federation.of(tmp_path, SIZES, model=tiny).runner.stores
    config = RunConfig(device="cpu", image_size=16, batch_size=4, workers=5)
    choice = choose_engine(config, stores, make_module=tiny)
    assert choice.engine == "local"
    assert "there is one client" in choice.reason


@pytest.mark.slow
def test_workers_that_train_their_shares_together_come_to_the_same_and_always_to_the_same_bits(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES, model=chain_cnn, local_epochs=2)
    alone, _ = both(federation, lr=1e-3)
    found = []
    for workers in (2, 2, 4):
        with WorkerPool(federation.runner, workers, threads=1, together=True) as pool:
            federation.set_up(pool)
            found += [federation.round(pool, lr=1e-3) for _ in range(2)]
    for together in found:
        assert_equal_to_rounding(alone, together)
    for name in SIZES:
        assert all(torch.equal(found[0][name].delta, other[name].delta) for other in found[1:4])
    assert any(not torch.equal(found[0][name].delta, alone[name].delta) for name in SIZES), "nothing ran together"


@pytest.mark.slow
def test_workers_that_train_together_evaluate_and_fail_as_others(tmp_path: Path) -> None:
    federation = Federation.of(tmp_path, SIZES, model=chain_cnn, gradient_clip=0.0)
    with WorkerPool(federation.runner, 2, threads=1, together=True) as pool:
        federation.set_up(pool)
        key = TaskKey(run_id="run", round=1, attempt=0)
        pool.submit(
            "a", Broadcast(key=key, purpose=Purpose.EVALUATE, vectors={"params": federation.start}, client_lr=0.1)
        )
        assert isinstance((pool.next() or ("", None))[1], Evaluation)
        diverged = federation.round(pool, params=federation.start * float("inf"), lr=1e-3)
        assert {type(answer) for answer in diverged.values()} == {Failure}
    broken = Federation.of(tmp_path, SIZES, model=Raising)
    with WorkerPool(broken.runner, 2, threads=1, together=True) as pool:
        broken.set_up(pool)
        assert_all_say_that_the_model_is_broken(broken.round(pool, lr=0.1))


def assert_all_say_that_the_model_is_broken(answers: Mapping[str, ClientMessage]) -> None:
    assert answers
    for answer in answers.values():
        assert isinstance(answer, Failure)
        assert "the model is broken" in answer.reason


class Raising(Branching):
    def forward(self, images: Tensor) -> Tensor:
        raise ValueError("the model is broken")
