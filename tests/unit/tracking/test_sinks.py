"""Several sinks, the lines that programs read, and those that people read."""

import errno
import io
import json
import logging
import os

import pytest
from rich.console import Console

from fedshelf.core.errors import RunError
from fedshelf.core.events import (
    ClientJoined,
    ClientLeft,
    ClientRefused,
    ClientStatus,
    Event,
    Participation,
    RoundFinished,
    RoundStarted,
    RoundVoid,
    RunEnded,
    RunStarted,
    RunStatus,
    UploadReceived,
    Waiting,
    WeightsLoaded,
)
from fedshelf.tracking.console import ConsoleSink
from fedshelf.tracking.sinks import JsonLinesSink, Sinks

EVENTS: list[Event] = [
    RunStarted(run_id="r1", num_rounds=4, first_round=1, num_parameters=318000, num_classes=81, min_clients=2),
    ClientJoined(client="[red]lyon", num_train=1, num_validation=10, num_left_out=3),
    ClientRefused(client="oslo", reason="another store has that name"),
    RoundStarted(round=1, attempt=1, cohort=("[red]lyon", "paris", "rome")),
    UploadReceived(
        round=1, client="paris", status=ClientStatus.REFUSED, reason="delta is NaN", num_done=1, num_cohort=3
    ),
    UploadReceived(round=1, client="[red]lyon", status=ClientStatus.COUNTED, reason="", num_done=2, num_cohort=3),
    ClientLeft(client="rome", reason="silent for\x1b[2J 30 s"),
    RoundVoid(round=1, attempt=1, reason="1 of 3, 2 needed", clients=()),
    RoundFinished(
        round=1,
        attempt=2,
        clients=(
            Participation(client="[red]lyon", status=ClientStatus.COUNTED),
            Participation(client="paris", status=ClientStatus.REFUSED, reason="delta is NaN"),
            Participation(client="rome", status=ClientStatus.LATE, reason="after the deadline"),
        ),
        train_loss=2.5,
        accuracy=0.613,
        central_accuracy=0.5,
        central_loss=None,
        seconds=30.0,
        bytes_up=1,
        bytes_down=1,
        best_round=1,
    ),
    RunEnded(status=RunStatus.STOPPED, reason="Ctrl-C"),
]


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0

    def emit(self, event: Event) -> None:
        self.calls += 1
        raise self.error


def printed(*, terminal: bool, width: int = 60) -> str:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, force_terminal=terminal, width=width))
    for event in EVENTS:
        sink.emit(event)
    sink.close()
    return stream.getvalue()


def test_the_console_says_what_became_of_a_files_head() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=40))
    many = tuple(f"p{i}" for i in range(7))
    sink.emit(WeightsLoaded(file="w[red].pt", kept=("apple",), moved=many, added=("kiwi\x1b[2J",)))
    sink.emit(WeightsLoaded(file="w.pt", added=("apple",), reason="the file has no head"))
    assert stream.getvalue().splitlines() == [
        "weights from w[red].pt; rows of the head: 1 kept (apple), 7 moved (p0, p1, p2, p3, p4 and 2 more), "
        "1 added (kiwi\\x1b[2J)",
        "weights from w.pt; the head starts fresh: the file has no head",
    ]


def test_a_console_that_fails_is_named_once_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    database, failing, last = Recorder(), Failing(OSError("no terminal")), Recorder()
    sinks = Sinks(required=[database], optional=[failing, last])
    with caplog.at_level(logging.WARNING):
        for event in EVENTS:
            sinks.emit(event)
    assert database.events == last.events == EVENTS
    assert failing.calls == 1
    assert caplog.text.count("Failing fails") == 1


def test_a_console_on_a_full_disk_is_named_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    sinks = Sinks(optional=[Failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))])
    sinks.emit(EVENTS[0])
    (record,) = caplog.records
    assert record.getMessage() == "Failing fails and is left out; the run continues: no space left on device"
    assert not record.exc_info


def test_a_database_that_fails_stops_the_run() -> None:
    console = Recorder()
    sinks = Sinks(required=[Failing(RunError("the disk is full"))], optional=[console])
    with pytest.raises(RunError, match="disk is full"):
        sinks.emit(EVENTS[0])
    assert console.events == []


def test_json_lines_are_one_event_each_and_written_at_once() -> None:
    stream = io.StringIO()
    sink = JsonLinesSink(stream)
    for count, event in enumerate(EVENTS, start=1):
        sink.emit(event)
        assert len(stream.getvalue().splitlines()) == count
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines][:2] == ["run_started", "client_joined"]
    assert lines[8]["clients"][2] == {
        "client": "rome",
        "status": "late",
        "reason": "after the deadline",
        "num_examples": None,
        "train_loss": None,
        "accuracy": None,
        "seconds": None,
        "num_steps": None,
        "batch_size": None,
        "client_lr": None,
        "staleness": None,
        "number": 0,
    }


def test_a_log_file_gets_plain_whole_lines_without_control_characters() -> None:
    text = printed(terminal=False)
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.splitlines() == [
        "run r1: 4 rounds, 318,000 parameters, 81 classes",
        "[red]lyon joined: 1 training photo, 10 validation photos, 3 photos left out (1 of 2 stores needed to start)",
        "warning: refused oslo: another store has that name",
        "warning: round 1: paris not counted, refused: delta is NaN",
        r"warning: rome left before it had joined: silent for\x1b[2J 30 s",
        "warning: round 1, attempt 2 was void, trying again: 1 of 3, 2 needed",
        "warning: round 1: rome not counted, late: after the deadline",
        "round 1/4  1 of 3 stores  loss 2.500  accuracy 61.3 %  central 50.0 %  30.0 s  best so far  1 min 30 s left  "
        "missing: paris (refused), rome (late)",
        "run stopped: Ctrl-C, best round 1",
    ]


def test_only_a_store_that_has_joined_is_lost_and_one_that_withdraws_is_no_failure() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=200))
    sink.emit(ClientJoined(client="lyon", num_train=1, num_validation=1, num_left_out=0))
    for name in ("lyon", "nice", "lyon"):
        sink.emit(ClientLeft(client=name, reason="signed off"))
    withdrawn = Participation(client="lyon", status=ClientStatus.WITHDRAWN, reason="its photos are gone")
    sink.emit(
        RoundFinished(
            round=1, attempt=0, clients=(withdrawn,), train_loss=None, accuracy=None, central_accuracy=None,
            central_loss=None, seconds=1.0, bytes_up=0, bytes_down=0, best_round=None,
        )
    )  # fmt: skip
    assert stream.getvalue().splitlines()[1:] == [
        "warning: lost lyon: signed off",
        "warning: nice left before it had joined: signed off",
        "warning: lost lyon: signed off",
        "round 1 (refit)  0 of 1 store  1.0 s  missing: lyon (withdrawn)",
    ]


def test_a_refusal_that_a_round_has_told_is_not_told_again() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=200))
    sink.emit(
        UploadReceived(
            round=1, client="lyon", status=ClientStatus.REFUSED, reason="train = false", num_done=1, num_cohort=2,
            num_bytes=0, digest="",
        )
    )  # fmt: skip
    for reason in ("train = false", "evaluate = false"):
        sink.emit(ClientRefused(client="lyon", reason=reason))
    assert stream.getvalue().splitlines() == [
        "warning: round 1: lyon not counted, refused: train = false",
        "warning: refused lyon: evaluate = false",
    ]


def test_a_terminal_additionally_shows_who_is_in() -> None:
    text = printed(terminal=True, width=100)
    assert "round 1/4, attempt 2: waiting for [red]lyon, paris, rome" in text
    assert "round 1/4: 1 of 3 counted, waiting for rome" in text
    assert "round 1: paris not counted, refused: delta is NaN" in text
    assert text.endswith("\n")


def test_accuracies_that_tell_little_are_shown_with_what_they_tell() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=200))
    sink.emit(
        RunStarted(
            run_id="r", num_rounds=2, first_round=1, num_parameters=1, num_classes=1, min_clients=1, num_test=3,
            num_test_left_out=6,
        )
    )  # fmt: skip
    sink.emit(
        RoundFinished(
            round=1, attempt=1, clients=(), train_loss=0.0, accuracy=1.0, central_accuracy=1.0, central_loss=0.0,
            seconds=1.0, bytes_up=0, bytes_down=0, best_round=None,
        )
    )  # fmt: skip
    text = stream.getvalue()
    assert "warning: there is one product in all stores" in text
    assert "warning: the central accuracy is of 3 of 9 test photos" in text
    assert "accuracy 100.0 % (one product)  central 100.0 % of 3 of 9 photos" in text


def test_a_resumed_run_does_not_claim_to_need_what_only_its_start_needs() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=200))
    sink.emit(RunStarted(run_id="r", num_rounds=9, first_round=3, num_parameters=1, num_classes=2, min_clients=0))
    sink.emit(ClientJoined(client="lyon", num_train=1, num_validation=1, num_left_out=0))
    assert stream.getvalue().splitlines()[1] == "lyon joined: 1 training photo, 1 validation photo"


def test_a_wait_tells_how_long_it_has_been() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=200))
    sink.emit(Waiting(what="2 clients to start", live=("lyon",), missing=("oslo",), seconds=10.04))
    assert stream.getvalue() == "warning: waiting for 2 clients to start (10 s so far); live: lyon; missing: oslo\n"


def test_nobody_is_both_live_and_missing_while_being_set_up() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=200))
    sink.emit(Waiting(what="stores to return", live=("lyon", "oslo"), missing=("nice", "oslo"), seconds=10.0))
    assert stream.getvalue().endswith("live: lyon, oslo; missing: nice\n")


def test_a_wait_after_a_restart_tells_for_whom_how_long_and_what_then() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=400))
    for names in (("lyon",), ("lyon", "oslo")):
        sink.emit(
            Waiting(
                what="stores to return", live=("nice",), missing=names, seconds=10.0, returning=names,
                seconds_to_return=110.0,
            )
        )  # fmt: skip
    start = "warning: waiting for stores to return (10 s so far); live: nice; missing: "
    then = "1 min 50 s to return: then the run continues without"
    assert stream.getvalue().splitlines() == [
        f"{start}lyon; lyon took part before the server's restart, and has {then} it",
        f"{start}lyon, oslo; lyon, oslo took part before the server's restart, and have {then} them",
    ]


def test_time_left_is_the_median_round_times_the_rounds_to_come() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=200))
    sink.emit(RunStarted(run_id="r", num_rounds=10, first_round=3, num_parameters=1, num_classes=2, min_clients=1))
    for round_, seconds in ((3, 10.0), (4, 500.0), (5, 12.0)):
        sink.emit(
            RoundFinished(
                round=round_, attempt=1, clients=(), train_loss=None, accuracy=None, central_accuracy=None,
                central_loss=None, seconds=seconds, bytes_up=0, bytes_down=0, best_round=None,
            )
        )  # fmt: skip
    lines = stream.getvalue().splitlines()
    assert lines[0] == "run r: 10 rounds, 1 parameter, 2 classes, resuming with round 3"
    assert "1 min 0 s left" in lines[-1]
    assert "loss" not in lines[-1], "what was not measured is not named"
