"""Who is late again and again is named, once while the run goes on and always in `runs show`."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedshelf.cli.run_tables import remarks_on
from fedshelf.core.events import ClientStatus, Participation, RoundFinished
from fedshelf.reporting.stragglers import HABIT, MOST_NAMES, StragglerTracker, advice
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.console import ConsoleSink
from fedshelf.tracking.database import RunDatabase
from fedshelf.tracking.queries import run_summary

COUNTED, LATE, OFFLINE = ClientStatus.COUNTED, ClientStatus.LATE, ClientStatus.OFFLINE


def members(**statuses: ClientStatus) -> tuple[Participation, ...]:
    return tuple(Participation(client=name, status=status) for name, status in statuses.items())


def finished(number: int, **statuses: ClientStatus) -> RoundFinished:
    return RoundFinished(
        round=number, attempt=0, clients=members(**statuses), train_loss=None, accuracy=None, central_accuracy=None,
        central_loss=None, seconds=1.0, bytes_up=0, bytes_down=0, best_round=None,
    )  # fmt: skip


SLOW = [finished(number, lyon=COUNTED, oslo=LATE) for number in range(1, HABIT + 4)]


def printed(events: list[RoundFinished]) -> list[str]:
    """What the console says of habits."""
    stream = io.StringIO()
    sink = ConsoleSink(Console(file=stream, width=60))
    for event in events:
        sink.emit(event)
    return [line for line in stream.getvalue().splitlines() if "late again and again" in line]


def remarks(path: Path, events: list[RoundFinished]) -> list[str]:
    """What `runs show` says of habits."""
    run = RunDirectory.create(path, run_id="r", config_toml="", config_digest="")
    database = RunDatabase(run.database)
    for event in events:
        database.emit(event)
    database.close()
    return [line for line in remarks_on(run_summary(run.path)) if "late again and again" in line]


def test_a_store_that_is_always_late_is_named_once_with_what_helps() -> None:
    (line,) = printed(SLOW)
    assert line.startswith(f"warning: late again and again: oslo ({HABIT} times in a row). ")
    for flag in ("--straggler-factor", "--round-timeout", "--max-staleness", "--local-work dynamic"):
        assert flag in line
    assert printed(SLOW[: HABIT - 1]) == []


def test_runs_show_says_for_how_long_it_was_late(tmp_path: Path) -> None:
    (line,) = remarks(tmp_path / "r", SLOW)
    assert line.startswith(f"late again and again: oslo ({HABIT + 3} times in a row). ")
    assert remarks(tmp_path / "counted-in-the-end", [*SLOW, finished(99, lyon=COUNTED, oslo=COUNTED)]) == []


def test_only_an_upload_that_counts_ends_a_row() -> None:
    late = StragglerTracker()
    for between in ({}, {"oslo": OFFLINE}, {"lyon": COUNTED}, {"rome": LATE}):
        assert late.add(members(oslo=LATE)) == {}
        late.add(members(**between))
    assert late.add(members(oslo=LATE)) == {"oslo": HABIT}
    assert late.habits() == {"oslo": HABIT}
    assert late.add(()) == {}, "a round that it was not drawn for"
    late.add(members(oslo=COUNTED))
    assert late.habits() == {}
    found = [late.add(members(oslo=LATE)) for _ in range(HABIT)]
    assert found[-1] == {"oslo": HABIT}, "a new row is told anew"


def test_an_upload_too_old_beside_one_that_counts_is_no_habit() -> None:
    """In asynchronous rounds one store has several in a round."""
    late = StragglerTracker()
    both = (*members(oslo=COUNTED), *members(oslo=LATE))
    assert [late.add(both) for _ in range(HABIT)] == [{}] * HABIT


@pytest.mark.parametrize("count", [1, MOST_NAMES, MOST_NAMES + 3])
def test_of_many_stores_some_are_named(count: int) -> None:
    text = advice({f"store-\x1b{number}": 7 for number in range(count)})
    assert "\x1b" not in text
    assert text.count("7 times in a row") == min(count, MOST_NAMES)
    assert ("and 3 more." in text) is (count > MOST_NAMES)
    assert advice({}) == ""
