"""The server's state survives, whole."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedshelf.core.errors import RunError
from fedshelf.core.messages import TaskKey
from fedshelf.core.state import Best, InFlight, ModelState, OpenRound, ServerState, Suspension
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.tensor_files import write_tensors


def state(round: int, *, best: int | None = None) -> ServerState:
    return ServerState(
        round=round,
        model=ModelState(
            params=torch.full((1000,), float(round)),
            sent=torch.full((1000,), round + 0.5) if round % 2 else None,
            optimizer={"momentum": torch.arange(10.0) + round},
            mean=torch.arange(3.0) + round,
        ),
        counted={"Zürich [1]": TaskKey(run_id="r", round=round, attempt=2)},
        times_live={"Zürich [1]": round},
        best=None if best is None else Best(round=best, value=0.5, metric="accuracy"),
        void_rounds=round + 1,
        pace={"Zürich [1]": 0.25 * round},
        classes="digest",
        suspended={"Zürich [1]": Suspension(last_round=round + 10, reason="no disk (3 times in a row)")},
    )


def assert_equal(loaded: ServerState | None, expected: ServerState) -> None:
    assert loaded is not None
    assert torch.equal(loaded.model.params, expected.model.params)
    assert (loaded.model.sent is None) == (expected.model.sent is None)
    assert torch.equal(loaded.model.published, expected.model.published)
    assert loaded.model.mean is not None
    assert expected.model.mean is not None
    assert torch.equal(loaded.model.mean, expected.model.mean)
    assert loaded.model.optimizer.keys() == expected.model.optimizer.keys()
    assert all(
        torch.equal(loaded.model.optimizer[name], expected.model.optimizer[name]) for name in expected.model.optimizer
    )
    assert (loaded.pace, loaded.classes, loaded.suspended) == (expected.pace, expected.classes, expected.suspended)
    assert (loaded.round, loaded.counted, loaded.times_live, loaded.best, loaded.void_rounds) == (
        expected.round,
        expected.counted,
        expected.times_live,
        expected.best,
        expected.void_rounds,
    )


def damage(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_fresh_run_has_nothing_to_load(tmp_path: Path) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    assert checkpoints.load() is None
    assert checkpoints.load_open_round() is None


def test_the_newest_state_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    for round_ in (8, 9, 10):
        checkpoints.save(state(round_, best=8), is_best=round_ == 8)
    assert_equal(FileCheckpoints(tmp_path).load(), state(10, best=8))
    assert_equal(FileCheckpoints(tmp_path).load_round(8), state(8, best=8))


def test_a_checkpoint_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    FileCheckpoints(tmp_path).save(state(1), is_best=False)
    assert torch.equal(load_file(tmp_path / "round-000001.safetensors")["params"], state(1).model.params)


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = FileCheckpoints(tmp_path, keep=2)
    for round_ in range(7):
        best = 0 if round_ < 2 else 2
        checkpoints.save(state(round_, best=best), is_best=round_ == best)
    assert names(tmp_path) == [f"round-00000{r}.safetensors" for r in (2, 5, 6)]


@pytest.mark.parametrize("at", [0, 12, 100, -1])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    checkpoints.save(state(1), is_best=True)
    checkpoints.save(state(2), is_best=False)
    damage(tmp_path / "round-000002.safetensors", at)
    with caplog.at_level(logging.WARNING):
        assert_equal(checkpoints.load(), state(1))
    assert "round-000002.safetensors" in caplog.text


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path, length: int) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    checkpoints.save(state(1), is_best=True)
    checkpoints.save(state(2), is_best=False)
    path = tmp_path / "round-000002.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert_equal(checkpoints.load(), state(1))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_in_silence(tmp_path: Path) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    checkpoints.save(state(1), is_best=True)
    damage(tmp_path / "round-000001.safetensors")
    with pytest.raises(RunError, match=r"no checkpoint .* can be read"):
        checkpoints.load()


def test_a_lost_best_round_is_not_replaced_by_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    checkpoints.save(state(1, best=1), is_best=True)
    checkpoints.save(state(2, best=1), is_best=False)
    damage(tmp_path / "round-000001.safetensors")
    assert checkpoints.load_round(1) is None
    assert "the state after round 1 is lost" in caplog.text


def test_a_checkpoint_of_a_newer_program_is_not_passed_over(tmp_path: Path) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    checkpoints.save(state(1), is_best=False)
    write_tensors(tmp_path / "round-000002.safetensors", {"params": torch.zeros(1)}, {"schema": 3})
    with pytest.raises(RunError, match="newer FedShelf"):
        checkpoints.load()


def test_loaded_vectors_are_the_callers_own(tmp_path: Path) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    checkpoints.save(state(1), is_best=False)
    loaded = checkpoints.load()
    assert loaded is not None
    (tmp_path / "round-000001.safetensors").write_bytes(b"")  # in place: a mapped file would be gone now
    assert torch.equal(loaded.model.params + 0, state(1).model.params)


def test_the_open_round_is_the_last_one_saved(tmp_path: Path) -> None:
    for attempt in (1, 2):
        saved = OpenRound(key=TaskKey(run_id="r", round=3, attempt=attempt), cohort=("Ä", "b\n", "c/d"))
        FileCheckpoints(tmp_path).save_open_round(saved)
    assert FileCheckpoints(tmp_path).load_open_round() == saved


def test_how_many_are_wanted_and_the_steps_and_paces_of_each_are_kept_with_the_open_round(tmp_path: Path) -> None:
    saved = OpenRound(
        key=TaskKey(run_id="r", round=3, attempt=0), cohort=("a", "b"), live=("a", "b", "c"), wanted=1,
        num_steps={"a": 3, "b": 40}, pace={"a": 0.1, "b": 1 / 3}, classes="d1",
    )  # fmt: skip
    FileCheckpoints(tmp_path).save_open_round(saved)
    assert FileCheckpoints(tmp_path).load_open_round() == saved


def test_an_open_round_of_an_older_version_wants_everybody(tmp_path: Path) -> None:
    FileCheckpoints(tmp_path).save_open_round(OpenRound(key=TaskKey(run_id="r", round=3, attempt=0), cohort=("a",)))
    path = tmp_path / "open_round.json"
    fields = json.loads(path.read_text())
    for key in ("wanted", "num_steps", "pace"):
        del fields[key]
    path.write_text(json.dumps(fields))
    loaded = FileCheckpoints(tmp_path).load_open_round()
    assert loaded is not None
    assert (loaded.wanted, loaded.num_steps, loaded.pace) == (None, {}, {})


def test_an_unreadable_open_round_starts_over_but_a_newer_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open_round.json").write_text("{")
    assert FileCheckpoints(tmp_path).load_open_round() is None
    (tmp_path / "open_round.json").write_text(json.dumps({"schema": 3}))
    with pytest.raises(RunError, match="newer FedShelf"):
        FileCheckpoints(tmp_path).load_open_round()


def test_keeping_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        FileCheckpoints(tmp_path, keep=0)


def test_what_was_out_and_when_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    """To the last bit: a resumed simulation comes to the same moments."""
    key = TaskKey(run_id="r", round=3, attempt=1)
    flights = (
        InFlight(client="b", key=key, due=0.1 + 0.2, leaves=1 / 3), InFlight(client="a", key=key, due=7.0),
        InFlight(client="c", key=key),
    )  # fmt: skip
    saved = replace(state(3), virtual_seconds=0.1 + 0.7, in_flight=flights)
    FileCheckpoints(tmp_path).save(saved, is_best=False)
    loaded = FileCheckpoints(tmp_path).load()
    assert loaded is not None
    assert (loaded.virtual_seconds, loaded.in_flight) == (saved.virtual_seconds, flights)
