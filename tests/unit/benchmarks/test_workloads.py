"""The benchmarks measure what they say: the exact models, and the same work in every program."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import photos, training_limit, wire_limit
from benchmarks.workloads import MEAN, NUM_CLASSES, PILOT, STD, WORKLOADS, Workload
from tests.unit.benchmarks.conftest import TINY


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda w: w.name)
def test_the_networks_have_exactly_the_parameters_of_the_workload(workload: Workload) -> None:
    network = workload.build()
    assert sum(p.numel() for p in network.parameters()) == workload.num_parameters
    logits = network(torch.zeros(2, 3, workload.image_size, workload.image_size))
    assert logits.shape == (2, NUM_CLASSES)


def test_every_program_starts_from_the_same_weights() -> None:
    first, second = PILOT.build(), PILOT.build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_plain_loop_is_federated_averaging(folder: Path) -> None:
    """Against the textbook: train each store's copy by hand, average, count."""
    found = training_limit.run(TINY, folder, processes=1, threads=1)
    data = photos.load(folder)
    images = torch.from_numpy(data.train_images).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    labels = torch.from_numpy(data.train_labels)
    weights = TINY.build().state_dict()
    for number in (1, 2):
        losses, results_of_stores = [], []
        for store in TINY.cohort(number):
            network = TINY.build()
            network.load_state_dict(weights)
            rows = TINY.stores.index(store) * TINY.photos_per_store + TINY.order(number, store)
            for chosen in (rows[:4], rows[4:]):
                each = torch.nn.functional.cross_entropy(network(images[chosen]), labels[chosen], reduction="none")
                losses += each.tolist()
                gradients = torch.autograd.grad(each.mean(), list(network.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                        parameter.sub_(TINY.client_lr * gradient)
            results_of_stores.append(network.state_dict())
        weights = {name: torch.stack([r[name] for r in results_of_stores]).mean(0) for name in weights}
        assert found["train_loss"][number - 1] == pytest.approx(np.mean(losses), abs=1e-5)


def test_two_processes_train_what_one_process_trains(folder: Path) -> None:
    one = training_limit.run(TINY, folder, processes=1, threads=1)
    two = training_limit.run(TINY, folder, processes=2, threads=1)
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-9)
    assert two["test_accuracy"] == one["test_accuracy"]


def test_plain_sockets_carry_the_model_and_the_result_is_checked() -> None:
    command = [sys.executable, "-m", "benchmarks.wire_limit", "server", "1", "4"]
    figures = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert '"round_seconds"' in figures.stdout
    with pytest.raises(ValueError, match="not the mean"):
        wire_limit.check(wire_limit.first_model(1000), 4)
