"""What a client keeps, in two phases. The rules themselves are tested against a model in tests/property."""

from pathlib import Path

import pytest
import torch

from fedshelf.core.errors import RunError
from fedshelf.core.messages import Broadcast, Purpose, TaskKey, Upload
from fedshelf.core.ports import ClientStates
from fedshelf.core.state import ClientState
from fedshelf.serialization import messages as payload
from fedshelf.storage.client_states import FileClientStates
from fedshelf.storage.tensor_files import write_tensors
from tests.fakes import MemoryClientStates


def key(round: int, attempt: int = 1, run_id: str = "run") -> TaskKey:
    return TaskKey(run_id=run_id, round=round, attempt=attempt)


def broadcast(of: TaskKey, counted: TaskKey | None = None) -> Broadcast:
    return Broadcast(key=of, purpose=Purpose.TRAIN, vectors={"params": torch.zeros(3)}, client_lr=0.1, counted=counted)


def upload(of: TaskKey) -> Upload:
    return Upload(
        key=of,
        vectors={"delta": torch.rand(100)},
        num_examples=1,
        num_steps=2,
        train_loss=0.25,
        seconds=0.1 + 0.2,
    )


def state(value: float) -> ClientState:
    return ClientState(algorithm={"control": torch.full((4,), value)})


def value(of: ClientState) -> float | None:
    return float(of.algorithm["control"][0]) if of.algorithm else None


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*.safetensors"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_same_question_is_answered_with_the_same_bytes_after_a_restart(tmp_path: Path) -> None:
    first = upload(key(1))
    FileClientStates(tmp_path).stage(key(1), first, state(1))
    again = FileClientStates(tmp_path).cached_reply(key(1))
    assert isinstance(again, Upload)
    assert payload.blob_of(again).join() == payload.blob_of(first).join()
    assert payload.encode_header(again, "x") == payload.encode_header(first, "x")
    assert FileClientStates(tmp_path).cached_reply(key(1, attempt=2)) is None


def test_what_never_began_to_leave_is_forgotten_at_the_next_start(tmp_path: Path) -> None:
    for run_id in ("one", "other"):
        FileClientStates(tmp_path).stage(key(1, run_id=run_id), upload(key(1, run_id=run_id)), state(1))
    again = FileClientStates(tmp_path, has_left=lambda task: task.run_id == "one")
    counted = [
        again.commit_or_rollback(broadcast(key(2, run_id=each), key(1, run_id=each))) for each in ("one", "other")
    ]
    assert [value(each) for each in counted] == [1.0, None]
    assert again.cached_reply(key(1, run_id="other")) is None


def test_a_stateless_algorithm_leaves_nothing_behind_once_it_was_counted(tmp_path: Path) -> None:
    states = FileClientStates(tmp_path)
    states.stage(key(1), upload(key(1)), ClientState())
    assert states.commit_or_rollback(broadcast(key(2), counted=key(1))).is_empty
    assert files(tmp_path) == []


def test_runs_are_kept_apart(tmp_path: Path) -> None:
    states = FileClientStates(tmp_path)
    states.stage(key(1), upload(key(1)), state(1))
    states.commit_or_rollback(broadcast(key(2), counted=key(1)))
    assert value(states.commit_or_rollback(broadcast(key(2, run_id="../run")))) is None
    assert value(states.commit_or_rollback(broadcast(key(2), counted=key(1)))) == 1


def test_another_runs_answer_is_dropped_but_its_state_may_still_be_counted(tmp_path: Path) -> None:
    states = FileClientStates(tmp_path)
    states.stage(key(1), upload(key(1)), state(1))
    states.stage(key(1, run_id="other"), upload(key(1, run_id="other")), state(2))
    assert states.cached_reply(key(1)) is None
    assert value(states.commit_or_rollback(broadcast(key(2), counted=key(1)))) == 1


def test_another_runs_stateless_answer_is_gone(tmp_path: Path) -> None:
    states = FileClientStates(tmp_path)
    states.stage(key(1), upload(key(1)), ClientState())
    states.stage(key(1, run_id="other"), upload(key(1, run_id="other")), ClientState())
    assert files(tmp_path) == ["pending.safetensors"]
    assert states.cached_reply(key(1, run_id="other")) is not None


def test_a_damaged_answer_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = FileClientStates(tmp_path)
    states.stage(key(1), upload(key(1)), ClientState())
    (path,) = tmp_path.rglob("pending.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    assert states.cached_reply(key(1)) is None
    assert "made again" in caplog.text
    assert states.commit_or_rollback(broadcast(key(1))).is_empty


def test_a_damaged_or_newer_committed_state_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    states = FileClientStates(tmp_path)
    states.stage(key(1), upload(key(1)), state(1))
    states.commit_or_rollback(broadcast(key(2), counted=key(1)))
    (path,) = tmp_path.rglob("committed.safetensors")
    write_tensors(path, {}, {"schema": 3})
    with pytest.raises(RunError, match="newer FedShelf"):
        states.commit_or_rollback(broadcast(key(2), counted=key(1)))
    path.write_bytes(b"")
    with pytest.raises(RunError, match="delete it"):
        states.commit_or_rollback(broadcast(key(2), counted=key(1)))


def test_unfinished_files_of_a_killed_client_are_removed(tmp_path: Path) -> None:
    FileClientStates(tmp_path).stage(key(1), upload(key(1)), state(1))
    (folder,) = tmp_path.iterdir()
    (folder / ".pending.safetensors.ab.tmp").write_bytes(b"half")
    FileClientStates(tmp_path)
    assert names(folder) == ["pending.safetensors"]


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_was_rolled_back_is_never_in_force_again(kind: str, tmp_path: Path) -> None:
    states: ClientStates = FileClientStates(tmp_path) if kind == "file" else MemoryClientStates()
    states.stage(key(1), upload(key(1)), state(1))
    assert value(states.peek(key(1))) == 1
    assert value(states.peek(key(2))) is None, "what another task led to is not in force before it is counted"
    assert value(states.commit_or_rollback(broadcast(key(2)))) is None
    assert value(states.peek(key(1))) is None
    assert value(states.commit_or_rollback(broadcast(key(3), counted=key(1)))) is None


def test_an_answer_that_was_not_counted_is_rolled_back_and_gone(tmp_path: Path) -> None:
    states = FileClientStates(tmp_path)
    states.stage(key(1), upload(key(1)), state(1))
    assert value(states.commit_or_rollback(broadcast(key(1)))) is None  # asked again: still pending
    assert files(tmp_path) == ["pending.safetensors"]
    assert value(states.commit_or_rollback(broadcast(key(2)))) is None
    assert files(tmp_path) == []
