"""What a command prints when its run has ended."""

import sys
from pathlib import Path

import pytest

from fedshelf.cli.app import main
from fedshelf.cli.display import program
from fedshelf.cli.run_summary import PRETRAINED, conclude, describe_demo
from fedshelf.core.events import ClientStatus, Event, Participation, RoundFinished, RunEnded, RunStarted, RunStatus
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.database import RunDatabase


def a_run(
    path: Path, status: RunStatus, *, reason: str = "", num_classes: int = 2, left_out: int = 0,
    more: tuple[RoundFinished, ...] = (),
) -> RunDirectory:  # fmt: skip
    """A run of one round, and `more`."""
    run = RunDirectory.create(path, run_id="r", config_toml="", config_digest="")
    database = RunDatabase(run.database)
    lyon = Participation(client="lyon", status=ClientStatus.COUNTED)
    events: tuple[Event, ...] = (
        RunStarted(
            run_id="r", num_rounds=1, first_round=1, num_parameters=1, num_classes=num_classes, min_clients=1,
            num_test=3, num_test_left_out=left_out,
        ),
        RoundFinished(
            round=1, attempt=0, clients=(lyon,), train_loss=1.0, accuracy=0.5, central_accuracy=1.0, central_loss=0.5,
            seconds=1.0, bytes_up=1, bytes_down=1, best_round=1,
        ),
        *more,
        RunEnded(status=status, reason=reason),
    )  # fmt: skip
    for event in events:
        database.emit(event)
    database.close()
    return run


def test_the_last_word_on_accuracies_says_what_they_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "r", RunStatus.FINISHED, num_classes=1, left_out=6)
    conclude(RunStatus.FINISHED, run, as_json=False)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[:4] == [
        "accuracy on the stores' validation photos: 50.0 % after round 1, best 50.0 % after round 1",
        "accuracy on the test photos: 100.0 % after round 1, best 100.0 % after round 1",
        "there is one product in all stores: any model names each photo right, and no accuracy says anything",
        "the central accuracy is of 3 of 9 test photos: no store has the products of the others",
    ]
    assert f"fedshelf runs show {run.path}" in " ".join(text.replace("\\\n", " ").split())


@pytest.mark.parametrize(("best_round", "highest"), [(1, ", best 50.0 % after round 1"), (2, "")])
def test_where_the_newest_round_is_the_best_its_line_names_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], best_round: int, highest: str
) -> None:
    second = RoundFinished(
        round=2, attempt=0, clients=(), train_loss=None, accuracy=0.25, central_accuracy=None, central_loss=None,
        seconds=1.0, bytes_up=1, bytes_down=1, best_round=best_round,
    )  # fmt: skip
    conclude(RunStatus.FINISHED, a_run(tmp_path / "r", RunStatus.FINISHED, more=(second,)), as_json=False)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"accuracy on the stores' validation photos: 25.0 % after round 2{highest}"


def test_a_run_that_was_stopped_is_resumed_by_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "r", RunStatus.STOPPED, reason="stopped on request")
    conclude(RunStatus.STOPPED, run, as_json=False)
    assert capsys.readouterr().out.endswith("\nStart the same command again to resume the run.\n")
    describe_demo(tmp_path, run.path)
    said = "The run was stopped (stopped on request). Start the same command again to resume it.\n"
    assert capsys.readouterr().out == said


def test_the_road_from_pretrained_weights_that_the_demo_suggests_lacks_photos_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--data-dir", str(tmp_path / "stores"), *PRETRAINED.split()])
    (problem,) = capsys.readouterr().err.splitlines()
    assert "stores" in problem
    assert "--data-dir" in problem


def test_a_demo_of_one_accuracy_names_it_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "r", RunStatus.FINISHED)
    describe_demo(tmp_path, run.path)
    text = capsys.readouterr().out
    assert "One model for five stores names 100.0 % of photos that no store has seen." in text
    assert f"  {program()} simulate --data-dir STORES {PRETRAINED}\n" in text
    assert f"  {program()} runs show {run.path}" in text


@pytest.mark.parametrize("on_path", [True, False])
def test_the_next_command_starts_as_the_users_shell_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_path: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    here = Path(sys.executable).with_name("fedshelf")
    assert here.exists()
    monkeypatch.setenv("PATH", str(here.parent) if on_path else "/nowhere")
    assert program() == ("fedshelf" if on_path else str(here))
    monkeypatch.chdir(here.parent.parent)
    assert program() == ("fedshelf" if on_path else f"{here.parent.name}/fedshelf")
