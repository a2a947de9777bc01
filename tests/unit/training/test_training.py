"""The one training loop, against steps written by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedshelf.core.errors import FedShelfError, UsageError
from fedshelf.core.messages import Broadcast, Purpose, TaskKey
from fedshelf.core.rng import Rng
from fedshelf.data.augmentation import Augmentation
from fedshelf.data.photo_set import PhotoSet
from fedshelf.models.resnet import resnet10
from fedshelf.training import trainer as training
from fedshelf.training.bound_model import BoundModel, TrainingSettings
from fedshelf.training.device import choose
from fedshelf.training.optimizer import client_lr
from fedshelf.training.trainer import Trainer, evaluate, evaluate_batches, num_batches, total
from tests.paper.reference_fedavg import normalized
from tests.worlds import PLAIN, bound_model, linear, photos, trainer, with_batch_norm

WHOLE = replace(PLAIN, batch_size=1000)


def lrs(**settings: Any) -> list[float]:
    defaults: dict[str, Any] = {"schedule": "constant", "warmup_rounds": 0, "num_rounds": 4}
    return [client_lr(r, base=1.0, **{**defaults, **settings}) for r in range(1, 7)]


def test_a_constant_rate_is_constant() -> None:
    assert lrs() == [1.0] * 6


def test_the_warm_up_is_linear_and_full_in_its_last_round() -> None:
    assert lrs(warmup_rounds=4, num_rounds=6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_the_cosine_starts_full_is_half_in_the_middle_and_stays_after_the_last_round() -> None:
    rates = lrs(schedule="cosine")
    assert rates[:3] == pytest.approx([1.0, 0.5 * (1 + math.sqrt(0.5)), 0.5])
    assert rates[3] == rates[4] == rates[5] == pytest.approx(0.5 * (1 - math.sqrt(0.5)))
    assert rates[3] > 0, "the last round still learns"


def test_warm_up_and_cosine_multiply_and_scale_the_base() -> None:
    both, cosine = lrs(schedule="cosine", warmup_rounds=2), lrs(schedule="cosine")
    assert both == pytest.approx([cosine[0] / 2, *cosine[1:]])
    assert client_lr(1, base=0.05, schedule="cosine", warmup_rounds=2, num_rounds=30) == pytest.approx(0.025)


def step_by_hand(settings: TrainingSettings, steps: int = 1, lr: float = 0.1) -> Tensor:
    """Full-batch steps of the linear model with torch's own optimizer, parameter by parameter."""
    module, store = linear(), trainer().train
    kind: Any = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    extra = {"momentum": settings.momentum, "nesterov": settings.momentum > 0} if settings.optimizer == "sgd" else {}
    optimizer = kind(module.parameters(), lr=lr, weight_decay=settings.weight_decay, **extra)
    labels = torch.from_numpy(store.labels)
    for _ in range(steps):
        optimizer.zero_grad()
        log_p = F.log_softmax(module(normalized(store, torch.arange(len(store)))), 1)
        one_hot = F.one_hot(labels, 3).float()
        target = one_hot * (1 - settings.label_smoothing) + settings.label_smoothing / 3
        (-(target * log_p).sum(1).mean()).backward()
        if settings.gradient_clip:
            nn.utils.clip_grad_norm_(module.parameters(), settings.gradient_clip)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


SETTINGS = {
    "plain": WHOLE,
    "label smoothing": replace(WHOLE, label_smoothing=0.3),
    "weight decay": replace(WHOLE, weight_decay=0.5),
    "clipped": replace(WHOLE, gradient_clip=0.05),
    "a clip that does not bind": replace(WHOLE, gradient_clip=1e6),
    "momentum": replace(WHOLE, momentum=0.9, local_epochs=3),
    "adamw": replace(WHOLE, optimizer="adamw", weight_decay=0.1, local_epochs=3),
    "all": replace(WHOLE, momentum=0.9, weight_decay=0.1, label_smoothing=0.1, gradient_clip=0.5, local_epochs=3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_local_training_takes_the_steps_that_torch_takes(name: str) -> None:
    settings = SETTINGS[name]
    work = trainer(bench=bound_model(linear(), settings))
    work.fit(round=1, client_lr=0.1)
    expected = step_by_hand(settings, steps=settings.local_epochs)
    torch.testing.assert_close(work.bound_model.params.trainable, expected, rtol=1e-5, atol=2e-6)
    if name not in ("plain", "a clip that does not bind"):
        other = step_by_hand(WHOLE, steps=1)
        assert (expected - other).norm() > 1e-3, "a setting without effect would not be tested"


def test_the_clip_bounds_the_gradient_of_the_whole_model() -> None:
    work = trainer(bench=bound_model(linear(), replace(WHOLE, gradient_clip=0.01)))
    before = work.bound_model.params.vector.clone()
    work.fit(round=1, client_lr=1.0)
    assert (work.bound_model.params.vector - before).norm() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimizer_starts_fresh_each_round(optimizer: Any) -> None:
    work = trainer(bench=bound_model(linear(), replace(WHOLE, momentum=0.9, optimizer=optimizer, local_epochs=2)))
    start = work.bound_model.params.vector.clone()
    results = []
    for _ in range(2):
        work.bound_model.load(start)
        work.fit(round=1, client_lr=0.1)
        results.append(work.bound_model.params.vector.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], start)


def test_training_that_diverges_is_an_error_that_says_what_to_do() -> None:
    work = trainer(bench=bound_model(linear(), replace(PLAIN, local_epochs=50)))
    with pytest.raises(FedShelfError, match=r"diverged in round 3.*lower --client-lr"):
        work.fit(round=3, client_lr=1e38)


def test_the_upload_is_local_minus_global() -> None:
    work = trainer(bench=bound_model(with_batch_norm(), replace(PLAIN, local_epochs=3)))
    params = work.bound_model.params.shared.clone() + 0.01
    key = TaskKey(run_id="r", round=4, attempt=1)
    upload = work.upload(Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=0.1))
    assert torch.equal(upload.delta, work.bound_model.params.shared - params)
    assert upload.delta.norm() > 0
    assert upload.key == key
    assert upload.num_examples == len(work.train) == 8
    assert upload.num_steps == 3 * 2
    assert upload.delta[-8:].abs().sum() > 0, "batch statistics are payload"


def test_the_loss_is_the_mean_over_all_photos_seen() -> None:
    work = trainer(bench=bound_model(linear(), replace(PLAIN, batch_size=3, local_epochs=2)))
    fit = work.fit(round=1, client_lr=1e-12)
    bench = bound_model(linear())
    assert fit.loss == pytest.approx(evaluate(bench, work.train).loss, rel=1e-5)
    assert fit.num_steps == 6


def test_every_photo_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    store = PhotoSet(np.zeros((10, 4, 4, 3), np.uint8), np.arange(10))
    work = trainer(bench=bound_model(linear(), replace(PLAIN, batch_size=4, local_epochs=2)), train=store)
    batches = [batch.labels for batch in work._batches(1)]
    assert [len(b) for b in batches] == [4, 4, 2] * 2
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist() != list(range(10))
    again = torch.cat([batch.labels for batch in work._batches(1)])
    other_round = torch.cat([batch.labels for batch in work._batches(2)])
    other_client = torch.cat([batch.labels for batch in replace(work, client="z")._batches(1)])
    other_seed = torch.cat([batch.labels for batch in replace(work, rng=Rng(1))._batches(1)])
    assert torch.equal(torch.cat([first, second]), again)
    for other in (other_round, other_client, other_seed):
        assert not torch.equal(again, other)


@pytest.mark.parametrize(
    ("batch_norm", "count", "batch", "steps"),
    [(True, 9, 4, 2), (False, 9, 4, 3), (True, 8, 4, 2), (True, 1, 4, 1), (True, 3, 1, 3), (False, 3, 1, 3)],
)
def test_a_last_batch_of_one_is_left_out_where_batch_norm_cannot_use_it(
    batch_norm: bool, count: int, batch: int, steps: int
) -> None:
    bench = bound_model(with_batch_norm() if batch_norm else linear(), replace(PLAIN, batch_size=batch))
    fit = trainer(bench=bench, train=photos(1, count)).fit(round=1, client_lr=0.1)
    assert fit.num_steps == steps
    assert fit.num_examples == count


def bench_at_rest() -> BoundModel:
    return bound_model(with_batch_norm())


def test_evaluation_in_batches_equals_evaluation_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    store, bench = photos(3, 23), bench_at_rest()
    whole = evaluate(bench, store)
    monkeypatch.setattr(training, "EVALUATION_BATCH", 5)
    assert num_batches(store) == 5
    parts = evaluate_batches(bench, store, [4, 0, 2, 1, 3])
    assert sorted(p.num_examples for p in parts) == [3, 5, 5, 5, 5]
    score = total(parts)
    assert (score.num_examples, score.num_correct) == (23, whole.num_correct)
    assert score.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    bench.module.eval()
    logits = bench.module(normalized(store, torch.arange(23)))
    assert whole.num_correct == int((logits.argmax(1) == torch.from_numpy(store.labels)).sum())
    assert whole.accuracy == whole.num_correct / 23
    assert whole.loss == pytest.approx(F.cross_entropy(logits, torch.from_numpy(store.labels)).item(), rel=1e-5)


def test_evaluation_changes_nothing_and_uses_running_statistics() -> None:
    work = trainer(bench=bench_at_rest())
    work.bound_model.module.train()
    before = work.bound_model.params.vector.clone()
    score = work.evaluate()
    assert torch.equal(work.bound_model.params.vector, before)
    assert score.num_examples == len(work.validation)


def test_the_score_of_no_photos_has_no_accuracy() -> None:
    store = photos(1, 4)
    score = evaluate(bench_at_rest(), PhotoSet(store.images[:0], store.labels[:0]))
    assert (score.num_examples, score.accuracy, score.loss) == (0, None, None)


def test_without_augmentation_training_sees_the_photos_as_they_are() -> None:
    work = trainer(bench=bound_model(linear(), WHOLE))
    ((images, labels, _),) = work._batches(1)
    order = torch.randperm(8, generator=Rng(0).fork(round=1, client="a", purpose="shuffle").torch())
    torch.testing.assert_close(images, normalized(work.train, order), rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, torch.from_numpy(work.train.labels)[order])


def test_augmentation_changes_the_views_but_not_the_order() -> None:
    def batch(settings: TrainingSettings, round: int = 1) -> tuple[Tensor, Tensor]:
        images, labels, _ = next(iter(trainer(bench=bound_model(linear(), settings))._batches(round)))
        return images, labels

    plain, augmented = batch(WHOLE), batch(replace(WHOLE, augmentation=Augmentation()))
    assert torch.equal(plain[1], augmented[1])
    assert not torch.allclose(plain[0], augmented[0], atol=0.1)
    assert torch.equal(augmented[0], batch(replace(WHOLE, augmentation=Augmentation()))[0])


def test_the_same_round_trained_twice_gives_the_same_bits() -> None:
    def delta() -> Tensor:
        settings = TrainingSettings(batch_size=4)
        module = nn.Sequential(resnet10(3, width=8))
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.05)
        work: Trainer = trainer(bench=bound_model(module, settings), size=32)
        start = work.bound_model.params.shared.clone()
        key = TaskKey(run_id="r", round=1, attempt=0)
        return work.upload(Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": start}, client_lr=0.05)).delta

    assert torch.equal(delta(), delta())


def test_a_workbench_has_no_layer_that_corrupts_memory() -> None:
    narrow = [layer for layer in bound_model(resnet10(3, width=4)).module.modules() if isinstance(layer, nn.Conv2d)]
    pointwise = [layer for layer in narrow if layer.kernel_size == (1, 1)]
    assert [(layer.in_channels, layer.stride) for layer in pointwise] == [(4, (1, 1)), (8, (1, 1)), (16, (2, 2))]


def test_a_device_that_is_not_there_is_a_wrong_flag() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device that the test wants missing")
    with pytest.raises(UsageError, match="--device cuda"):
        choose("cuda", threads=1)
    assert choose("auto", threads=1).device.type in ("cpu", "mps")
    assert not choose("cpu", threads=1).autocast


def test_the_device_s_thread_count_is_the_configured_one() -> None:
    try:
        choose("cpu", threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_personal_tensors_are_trained_but_not_shared() -> None:
    from fedshelf.core.params import bind, bind_gradients

    module = linear()
    params = bind(module, is_personal=lambda name: name.endswith("bias"))
    bench = replace(
        bound_model(), module=module, params=params, gradients=bind_gradients(module, params), settings=WHOLE
    )
    trainer(bench=bench).fit(round=1, client_lr=0.1)
    whole = step_by_hand(WHOLE)
    torch.testing.assert_close(params.vector, whole, rtol=1e-5, atol=2e-6)
    assert len(params.shared) == 144


def test_views_are_drawn_anew_each_round_and_for_each_client() -> None:
    work = trainer(bench=bound_model(linear(), replace(WHOLE, augmentation=Augmentation())), train=photos(1, 1))
    views = [next(iter(w._batches(r)))[0] for w, r in ((work, 1), (work, 2), (replace(work, client="z"), 1))]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
