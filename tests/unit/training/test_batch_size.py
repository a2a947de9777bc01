"""Which batch size a client takes, and that trying them changes nothing."""

import time
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedshelf.core.choices import OptimizerName
from fedshelf.core.errors import TrainingError
from fedshelf.core.messages import Broadcast, Purpose, TaskKey
from fedshelf.training import batch_size
from fedshelf.training.batch_size import BatchSizes, candidates, fastest, lr_scale, measure
from tests.worlds import PLAIN, SIZE, bound_model, linear, photos, trainer, with_batch_norm

SIZES = (4, 8, 16)
PHOTO = 3 * SIZE * SIZE


@pytest.mark.parametrize(
    ("num_photos", "expected"),
    [(0, (16,)), (255, (16,)), (256, (16, 32)), (511, (16, 32)), (512, (16, 32, 64)), (100_000, (16, 32, 64))],
)
def test_an_epoch_has_eight_steps_or_the_batch_size_is_the_configured_one(
    num_photos: int, expected: tuple[int, ...]
) -> None:
    assert candidates(16, num_photos) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({16: 1.0, 32: 0.7, 64: 0.5}, 64),
        ({16: 1.0, 32: 0.54, 64: 0.5}, 32),  # 8 % slower than the fastest
        ({16: 0.549, 32: 0.6, 64: 0.5}, 16),
        ({16: 0.5, 32: 0.7, 64: 0.9}, 16),
        ({16: 1.0, 32: 0.56, 64: 0.5}, 64),
        ({16: 1.0}, 16),
    ],
)
def test_the_smallest_is_taken_that_is_nearly_as_fast_as_the_fastest(
    seconds: Mapping[int, float], expected: int
) -> None:
    assert fastest(seconds) == expected


def test_the_rate_grows_with_the_batch_and_with_its_root_for_adamw() -> None:
    growths = [lr_scale(replace(PLAIN, batch_size=8), size) for size in (8, 16, 32)]
    assert growths == [1.0, 2.0, 4.0]
    adamw = replace(PLAIN, batch_size=8, optimizer="adamw")
    assert [lr_scale(adamw, size) for size in (8, 16, 32)] == pytest.approx([1.0, 2**0.5, 2.0])


class PerStep(nn.Module):
    """Keeps the processor busy for three milliseconds, however many photos there are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear()

    def forward(self, images: Tensor) -> Tensor:
        until = time.thread_time() + 0.003
        while time.thread_time() < until:
            pass
        logits: Tensor = self.head(images)
        return logits


def test_where_steps_cost_more_than_photos_the_largest_batch_is_found_fastest() -> None:
    found = measure(bound_model(PerStep()), photos(1, 70), SIZES)
    assert tuple(found) == SIZES
    assert found[4] > found[8] > found[16] > 0
    assert BatchSizes(bound_model(PerStep())).best_for(photos(1, 130)) == 16


class Dropping(nn.Module):
    """Has statistics, a counter of batches, and draws from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.body = with_batch_norm()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(nn.functional.dropout(images, 0.5, training=self.training))
        return logits


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("training", [True, False])
def test_trying_batch_sizes_leaves_the_workbench_as_it_was(optimizer: OptimizerName, training: bool) -> None:
    settings = replace(PLAIN, optimizer=optimizer, momentum=0.9, weight_decay=0.1)
    bench = bound_model(Dropping(), settings)
    trainer(bench=bench).fit(round=1, client_lr=0.1)
    bench.module.train(training)
    state = {name: tensor.clone() for name, tensor in bench.module.state_dict().items()}
    vectors = [bench.params.vector.clone(), bench.gradients.clone()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert set(measure(bench, photos(1, 9), SIZES)) == set(SIZES)
    assert torch.equal(torch.rand(3), expected), "the caller's draws are others now"
    assert bench.module.training is training
    assert all(map(torch.equal, vectors, [bench.params.vector, bench.gradients]))
    assert state["body.1.num_batches_tracked"] > 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in bench.module.state_dict().items())
    assert bench.settings == settings


class Full(nn.Module):
    """Has no memory for batches above a size."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.head, self._most, self._error = linear(), most, error

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self._most:
            raise self._error
        logits: Tensor = self.head(images)
        return logits


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_batch_that_does_not_fit_is_stepped_back_from(error: Exception) -> None:
    assert set(measure(bound_model(Full(8, error)), photos(1, 9), SIZES)) == {4, 8}
    nothing_fits = BatchSizes(bound_model(Full(0, error)))
    assert nothing_fits.best_for(photos(1, 70)) == 4, "training itself will say so"


def test_what_is_no_lack_of_memory_is_not_taken_for_one() -> None:
    with pytest.raises(TrainingError, match="size mismatch"):
        measure(bound_model(Full(8, RuntimeError("size mismatch"))), photos(1, 9), SIZES)


@pytest.mark.parametrize(("batches", "expected"), [(4.1, SIZES), (3.9, (4, 8)), (1.9, (4,)), (0.9, (4,))])
def test_a_batch_takes_no_more_than_its_share_of_free_memory(
    batches: float, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each linear layer keeps its input, of which a batch of four has 768 bytes; the model is there anyway."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(PHOTO, PHOTO), nn.Linear(PHOTO, 3))
    batch = 4 * 2 * PHOTO * 4
    free = int(batches * batch / batch_size.MEMORY_SHARE)
    monkeypatch.setattr(batch_size, "free_memory", lambda: free)
    assert tuple(measure(bound_model(module), photos(1, 9), SIZES)) == expected


def test_it_is_measured_once_and_a_small_store_takes_a_smaller_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(bench: object, store: object, sizes: tuple[int, ...]) -> Mapping[int, float]:
        asked.append(sizes)
        return {4: 1.0, 8: 0.6, 16: 0.4}

    monkeypatch.setattr(batch_size, "measure", measured)
    sizes = BatchSizes(bound_model())
    assert [sizes.best_for(photos(1, count)) for count in (0, 63)] == [4, 4]
    assert asked == [], "there is nothing to choose among"
    assert [sizes.best_for(photos(1, count)) for count in (64, 128, 127, 63, 500)] == [8, 16, 8, 4, 16]
    assert asked == [SIZES]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_scaled_client_trains_as_one_that_is_told_the_scaled_rate_and_says_so(optimizer: OptimizerName) -> None:
    uploads = []
    for scale, told in ((4.0, 0.025), (1.0, 0.1)):
        bench = bound_model(linear(), replace(PLAIN, optimizer=optimizer, momentum=0.9, local_epochs=2))
        work = replace(trainer(bench=bench), growth=int(scale), lr_scale=scale)
        key = TaskKey(run_id="r", round=1, attempt=0)
        params = bench.params.shared.clone()
        uploads.append(
            work.upload(Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=told))
        )
    assert torch.equal(uploads[0].delta, uploads[1].delta)
    assert [upload.client_lr for upload in uploads] == [0.1, 0.1]
    assert [upload.batch_size for upload in uploads] == [4, 4]


@pytest.mark.parametrize(("told", "taken"), [(None, 5), (1, 1), (8, 2), (9, 2), (11, 3), (40, 10)])
def test_a_client_with_larger_batches_takes_fewer_of_the_steps_that_it_is_told(told: int | None, taken: int) -> None:
    """Told steps are of the configured size: the work stays what the server meant."""
    bench = bound_model(linear(), replace(PLAIN, batch_size=4))
    work = replace(trainer(bench=bench, train=photos(1, 20)), growth=4, lr_scale=4.0)
    assert work.fit(round=1, client_lr=0.01, num_steps=told).num_steps == taken
