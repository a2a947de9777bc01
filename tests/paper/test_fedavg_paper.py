"""What McMahan et al. 2017 say of FedAvg, asserted of this implementation."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedshelf.core.events import RunStatus
from fedshelf.core.params import bind
from fedshelf.models.resnet import resnet10
from tests.paper.reference_fedavg import federated_averaging, normalized
from tests.worlds import CLASSES, PLAIN, World, linear, with_batch_norm


def small_group_resnet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return resnet10(len(CLASSES), width=16, norm="group")  # plain torch trains it, too: it must be safe there


def vector_of(module: nn.Module) -> Tensor:
    return bind(module).vector.clone()


@pytest.mark.parametrize(("module", "size"), [(linear, 4), (small_group_resnet, 32)])
def test_one_full_batch_step_of_all_clients_is_centralized_sgd(module: Callable[[], nn.Module], size: int) -> None:
    world = World(num_rounds=1, module=module, training=replace(PLAIN, batch_size=1000), photo_size=size)
    assert world.run() is RunStatus.FINISHED
    trainers = [world.trainer(name) for name in world.names]
    assert len({len(t.train) for t in trainers}) == 3, "stores of different sizes, or the weights are not tested"

    central = module()
    optimizer = torch.optim.SGD(central.parameters(), lr=0.1)
    images = torch.cat([normalized(t.train, torch.arange(len(t.train))) for t in trainers])
    labels = torch.cat([torch.from_numpy(t.train.labels) for t in trainers])
    F.cross_entropy(central(images), labels).backward()
    optimizer.step()

    start = vector_of(module())
    assert (world.final - start).norm() > 1e-2, "a step that moves nothing would pass"
    torch.testing.assert_close(world.final, vector_of(central), rtol=0, atol=1e-6)


def test_two_rounds_of_three_clients_with_batch_norm_and_momentum_equal_the_readable_reference() -> None:
    training = replace(PLAIN, momentum=0.9, local_epochs=2, batch_size=5)  # leaves no store a last batch of one photo
    world = World(module=with_batch_norm, training=training)
    world.run()
    stores = {name: world.trainer(name).train for name in world.names}
    reference = federated_averaging(
        with_batch_norm(), stores, rounds=2, epochs=2, batch=5, lr=0.1, momentum=0.9, seed=0
    )  # fmt: skip
    torch.testing.assert_close(world.final, vector_of(reference), rtol=1e-6, atol=1e-6)
    assert (world.final - vector_of(with_batch_norm())).norm() > 0.1


def test_fedavg_of_one_client_is_that_client() -> None:
    world = World(names=("only",), num_rounds=1, training=replace(PLAIN, momentum=0.9, local_epochs=3))
    world.run()
    alone = federated_averaging(
        linear(), {"only": world.trainer("only").train},
        rounds=1, epochs=3, batch=4, lr=0.1, momentum=0.9, seed=0,
    )  # fmt: skip
    torch.testing.assert_close(world.final, vector_of(alone), rtol=0, atol=1e-6)


def test_a_client_with_more_photos_weighs_more() -> None:
    world = World(names=("big", "small"), num_rounds=1)
    shift = {"big": 1.0, "small": -1.0}
    examples = {"big": 30, "small": 10}
    for name in world.names:
        world.tampers[name] = lambda message, honest, name=name: (
            replace(
                honest,
                vectors={**honest.vectors, "delta": torch.full_like(honest.delta, shift[name])},
                num_examples=examples[name],
            )  # type: ignore[misc]
            if hasattr(honest, "delta")
            else honest
        )
    world.run()
    moved = world.final - vector_of(linear())
    torch.testing.assert_close(moved, torch.full_like(moved, 0.75 - 0.25), rtol=0, atol=1e-6)
