"""How often a server may compute something from a store's photos."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.core.errors import PolicyError
from fedshelf.core.messages import Broadcast, Purpose, TaskKey, auxiliary_vectors
from fedshelf.privacy.policy import Policy
from fedshelf.privacy.policy_tables import Limits
from fedshelf.privacy.task_limits import DAY, TaskLimits
from fedshelf.storage.task_log import MOST_KEPT, AcceptedTask, TaskLog


class Store:
    """A store's limits, over restarts, with a clock that the test sets."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.path = folder / "accepted-tasks.jsonl"
        self.policy = Policy(limits=Limits(**limits))
        self.now = 1e9
        self.restart()

    def restart(self) -> None:
        self.limits = TaskLimits(self.policy, TaskLog(self.path), lambda: self.now)

    def accepts(self, broadcast: Broadcast, *, num_photos: int = 100) -> str:
        """Why the task is refused; empty if it is accepted."""
        try:
            self.limits.accept(broadcast, num_photos=num_photos, batch_size=8)
        except PolicyError as error:
            return str(error)
        return ""


def task(
    round: int = 1, attempt: int = 0, model: float = 0.0, purpose: Purpose = Purpose.TRAIN, **more: Any
) -> Broadcast:
    key = TaskKey(run_id=more.pop("run_id", "r"), round=round, attempt=attempt)
    made = Broadcast(key=key, purpose=purpose, client_lr=0.1, vectors={"params": torch.full((5,), model)})
    return replace(made, **more)


def test_a_round_is_trained_from_one_model_over_restarts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.accepts(task()) == ""
    for _ in range(2):
        assert store.accepts(task(attempt=1)) == "", "a void round is repeated"
        assert "models-per-round = 1" in store.accepts(task(attempt=2, model=0.5))
        assert "models-per-round = 1" in store.accepts(task(attempt=2, client_lr=0.2)), "the rate steers a step, too"
        odd = auxiliary_vectors({"control_variate": torch.ones(5)})
        assert "models-per-round = 1" in store.accepts(replace(task(), vectors={**task().vectors, **odd}))
        assert store.accepts(task(round=2, model=0.5)) == ""
        assert store.accepts(task(run_id="another", model=0.7)) == ""
        store.restart()


def test_evaluations_and_comparisons_are_counted_and_repetitions_are_free(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        for attempt in (0, 1):
            assert store.accepts(task(attempt=attempt, purpose=Purpose.EVALUATE)) == ""
        assert "evaluations-per-round" in store.accepts(task(attempt=2, purpose=Purpose.EVALUATE))
        assert store.accepts(task(round=2, purpose=Purpose.EVALUATE)) == ""
        assert store.accepts(task(round=9, purpose=Purpose.COMPARE)) == ""
        assert "comparisons-per-run" in store.accepts(task(round=10, purpose=Purpose.COMPARE))
        store.restart()
    long = task(round=9, purpose=Purpose.COMPARE, run_id="long", num_rounds=1001)
    assert "max-comparison-rounds = 1,000" in store.accepts(long)


def test_training_tasks_are_counted_by_the_day_over_all_runs(tmp_path: Path) -> None:
    store = Store(tmp_path, rounds_per_day=3)
    assert [store.accepts(task(number)) for number in (1, 2)] == ["", ""]
    assert store.accepts(task(run_id="another")) == ""
    store.restart()
    assert "rounds-per-day" in store.accepts(task(round=3))
    assert store.accepts(task(round=2)) == "", "a restarted server asks again"
    compare = task(round=9, purpose=Purpose.COMPARE)
    assert "rounds-per-day" in store.accepts(compare), "a comparison trains, too"
    evaluations = [task(round=number, purpose=Purpose.EVALUATE) for number in range(7)]
    assert [store.accepts(evaluation) for evaluation in evaluations[:6]] == [""] * 6
    assert "6 evaluations were done in 24 hours" in store.accepts(evaluations[6])
    store.now += DAY + 1
    assert store.accepts(task(round=3)) == ""


@pytest.mark.parametrize(
    ("num_steps", "refused"), [(None, ""), (3, "min-epochs-per-task"), (4, ""), (1300, ""), (1301, "max-local-epochs")]
)
def test_a_task_takes_a_quarter_of_an_epoch_at_least(tmp_path: Path, num_steps: int | None, refused: str) -> None:
    told = Store(tmp_path).accepts(task(num_steps=num_steps))  # 100 photos are 13 steps of 8
    assert (refused in told) == (told != "" or refused == "")


def test_a_line_that_a_power_cut_has_torn_is_ignored(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.accepts(task(round=1)) == ""
    with store.path.open("ab") as file:
        file.write(b'{"at": 1, "task": {"run_')
    store.restart()
    assert store.accepts(task(round=2)) == ""
    store.restart()
    assert "models-per-round" in store.accepts(task(round=1, model=1.0))
    assert "models-per-round" in store.accepts(task(round=2, model=1.0))
    assert len(store.path.read_bytes().splitlines()) == 2


def test_the_log_is_private_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = TaskLog(path)
    first = AcceptedTask(run_id="r", purpose="train", round=0, attempt=0, digest="")
    log.add(first, 1.0)
    assert path.stat().st_mode & 0o777 == 0o600
    line = path.read_bytes()
    path.write_bytes(line + b"".join(line.replace(b'"round":0', b'"round":%d' % n) for n in range(1, MOST_KEPT + 1)))
    again = TaskLog(path)
    assert len(again.accepted) == MOST_KEPT
    assert first not in again.accepted
    assert len(path.read_bytes().splitlines()) == MOST_KEPT
