"""What makes training faster and may change nothing: batches made ahead, compiled passes, memory that is kept."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedshelf.core.errors import UsageError
from fedshelf.training.batches import prefetch
from fedshelf.training.compiled import compile_forward
from fedshelf.training.trainer import evaluate
from tests.worlds import PLAIN, bound_model, photos, trainer, with_batch_norm


def test_items_made_ahead_are_the_same_in_the_same_order_and_made_elsewhere() -> None:
    makers = []

    def items() -> Iterator[int]:
        for number in range(5):
            makers.append(threading.current_thread())
            yield number

    assert list(prefetch(items())) == list(range(5))
    assert len(set(makers)) == 1
    assert threading.current_thread() not in makers
    assert list(prefetch(iter(()))) == []


def test_the_next_item_is_made_while_one_is_used() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    coming = prefetch(items())
    assert next(coming) == 0
    assert made[1].wait(10)
    assert not made[2].is_set(), "no more than one"
    coming.close()  # type: ignore[attr-defined]


def test_what_making_an_item_raises_is_raised_where_it_is_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the photo is gone")

    coming = prefetch(items())
    assert next(coming) == 1
    with pytest.raises(OSError, match="the photo is gone"):
        next(coming)


def test_leaving_early_leaves_no_thread() -> None:
    before = threading.active_count()
    for number in prefetch(iter(range(100))):
        if number == 3:
            break
    assert threading.active_count() == before


def test_batches_made_ahead_are_those_that_are_made_in_time() -> None:
    work = trainer(bench=bound_model(with_batch_norm(), replace(PLAIN, local_epochs=2)), train=photos(1, 11))
    for found, expected in zip(prefetch(work._batches(1)), work._batches(1), strict=True):
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)


class Wrapped(nn.Module):
    """Unlike `nn.Sequential`, without a length, which torch's compiled modules are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = with_batch_norm()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(images)
        return logits


def test_a_compiled_pass_takes_the_same_steps_and_compiling_changes_nothing() -> None:
    """By torch.compile's tracing alone, without its code generation, which takes minutes."""
    settings = replace(PLAIN, momentum=0.9, local_epochs=2)
    plain, bench = (bound_model(Wrapped(), settings) for _ in range(2))
    compiled = compile_forward(bench, 4, backend="eager")
    assert compiled.forward is not None
    assert torch.equal(bench.params.vector, plain.params.vector)
    for each in (plain, compiled):
        trainer(bench=each).fit(round=1, client_lr=0.1)
    torch.testing.assert_close(compiled.params.vector, plain.params.vector, rtol=0, atol=1e-6)
    assert not torch.equal(plain.params.vector, bound_model(Wrapped()).params.vector)
    assert evaluate(compiled, photos(5, 9)).num_correct == evaluate(plain, photos(5, 9)).num_correct


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise ValueError("the model is broken")


def test_a_model_that_cannot_be_compiled_is_a_wrong_flag_where_it_was_asked_for() -> None:
    with pytest.raises(UsageError, match=r"--compile on: .*the model is broken"):
        compile_forward(bound_model(Broken()), 4, backend="eager")


KEPT = """
import resource
from fedshelf.training.malloc import keep_freed_memory
kept = keep_freed_memory()
import torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    for _ in range(20):
        torch.ones(48 << 18)  # 48 MiB, above what the C library keeps by itself
use()
before = faults()
use()
print(kept, faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's options are Linux's")
def test_memory_that_is_freed_is_there_for_the_next_step_without_a_page_fault() -> None:
    """In a process of its own: it cannot be undone."""
    found = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True).stdout.split()
    if found[0] != "True":
        pytest.skip("the C library or the kernel has no such options here")
    assert int(found[1]) < 1000, "48 MiB twenty times over are 245,760 pages"
