"""The audit log: what was written cannot be changed unnoticed."""

import datetime
import json
import threading
from pathlib import Path

import pytest

from fedshelf.core.errors import RunError
from fedshelf.identity import audit_log
from fedshelf.identity.audit_log import AuditLog
from fedshelf.storage.hash_chain import START, HashChain, Head


def events(folder: Path) -> list[str]:
    return [str(event["event"]) for event in AuditLog(folder).events()]


def test_events_are_read_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    for event in ("a", "b", "c"):
        AuditLog(tmp_path).write(event, store="lyon", count=1)
    assert events(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("line", [0, 1, 2])
def test_an_altered_line_is_found(tmp_path: Path, line: int) -> None:
    log = AuditLog(tmp_path)
    for store in ("lyon", "paris", "nice", "lille"):
        log.write("enrolled", store=store)
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines(keepends=True)
    lines[line] = lines[line].replace("store", "sture")
    path.write_text("".join(lines))
    with pytest.raises(RunError, match=f"line {line + 1} does not continue the log"):
        events(tmp_path)


@pytest.mark.parametrize("kept", [[1, 2], [0, 2], [0, 2, 1], [0, 1, 2, 0, 1, 2]])
def test_removed_moved_and_repeated_lines_are_found(tmp_path: Path, kept: list[int]) -> None:
    for event in ("a", "b", "c"):
        AuditLog(tmp_path).write(event)
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[index] for index in kept))
    with pytest.raises(RunError, match="does not continue the log"):
        events(tmp_path)


def test_a_cut_tail_shows_against_a_copy_of_the_end(tmp_path: Path) -> None:
    chain = HashChain(tmp_path / "log")
    assert chain.head() == Head(number=0, hash=START)
    heads = [chain.append({"event": str(number)}) for number in range(3)]
    path = tmp_path / "log"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert [fields["event"] for fields in chain.lines()] == ["0", "1"]  # still a chain
    assert chain.head() == heads[1] != heads[2]


def test_a_half_written_line_stops_the_log_and_is_named(tmp_path: Path) -> None:
    chain = HashChain(tmp_path / "log")
    chain.append({"event": "a"})
    with (tmp_path / "log").open("ab") as file:
        file.write(b'{"number": 2, "ti')
    with pytest.raises(RunError, match="its last line does not continue the log"):
        chain.append({"event": "b"})


def test_a_damaged_log_is_named_and_the_next_events_are_written_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AuditLog(tmp_path)
    log.write("a")
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-5])
    log.write("b")
    log.write("c")
    assert "does not continue the log" in caplog.text
    written = (tmp_path / "audit-0002.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in written] == ["the log before this file is damaged", "b", "c"]
    with pytest.raises(RunError, match="does not continue"):
        events(tmp_path)


def test_two_writers_make_one_chain(tmp_path: Path) -> None:
    def write(name: str) -> None:
        log = AuditLog(tmp_path)
        for _ in range(20):
            log.write(name)

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(events(tmp_path)) == ["a"] * 20 + ["b"] * 20


def test_a_full_file_is_continued_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_BYTES", 500)
    for number in range(10):
        AuditLog(tmp_path).write("event", count=number)
    assert len(list(tmp_path.iterdir())) > 2
    found = list(AuditLog(tmp_path).events())
    assert [event["count"] for event in found if event["event"] == "event"] == list(range(10))
    first, second, *_ = sorted(tmp_path.iterdir())
    lines = first.read_text().splitlines(keepends=True)
    first.write_text("".join(lines[:-1]))
    with pytest.raises(RunError, match="does not continue the file before it"):
        events(tmp_path)
    second.unlink()
    with pytest.raises(RunError, match="is missing"):
        events(tmp_path)


def test_old_files_can_be_deleted_and_the_rest_is_still_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "MAX_BYTES", 500)
    log = AuditLog(tmp_path)
    for number in range(10):
        log.write("event", count=number)
    tomorrow = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=1)
    files = sorted(tmp_path.iterdir())
    assert log.prune(tomorrow - datetime.timedelta(days=2)) == 0
    assert log.prune(tomorrow) == len(files) - 1
    assert files[-1] in tmp_path.iterdir()
    log.write("after")
    found = list(AuditLog(tmp_path).events())
    assert [event["event"] for event in found if event["event"] not in ("event", "continued")] == [
        "log files deleted", "after",
    ]  # fmt: skip
    assert "operator" in next(event for event in found if event["event"] == "log files deleted")
    for number in range(10):  # again, over the line that names what was deleted first
        log.write("event", count=number)
    assert log.prune(tomorrow) > 0
    assert "log files deleted" in events(tmp_path)


def test_files_that_were_deleted_otherwise_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_BYTES", 500)
    for number in range(20):
        AuditLog(tmp_path).write("event", count=number)
    first, *_ = sorted(tmp_path.iterdir())
    first.unlink()
    with pytest.raises(RunError, match=r"audit-0001.jsonl' is missing"):
        events(tmp_path)
    with pytest.raises(RunError, match="is missing"):
        AuditLog(tmp_path).prune(datetime.date.max)
    AuditLog(tmp_path).write(audit_log.PRUNED, through=1, head="0" * 64)
    with pytest.raises(RunError, match="is missing"):
        events(tmp_path)


def test_a_deletion_that_was_interrupted_leaves_a_log_that_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "MAX_BYTES", 500)
    for number in range(20):
        AuditLog(tmp_path).write("event", count=number)
    kept = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())[1:-1]}
    AuditLog(tmp_path).prune(datetime.date.max)
    for path, content in kept.items():
        path.write_bytes(content)
    assert "log files deleted" in events(tmp_path)


def test_the_head_is_the_newest_line_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_BYTES", 500)
    log = AuditLog(tmp_path)
    assert log.head() == Head(number=0, hash=START)
    for number in range(10):
        log.write("event", count=number)
    head = log.head()
    log.write("next")
    *_, before, newest = log.events()
    assert head.hash in (newest["before"], before.get("continues"))


def test_text_from_peers_is_printable_and_short(tmp_path: Path) -> None:
    AuditLog(tmp_path).write("refused", reason="\x1b[31mred\n{}\u202e" + "x" * 10_000)
    (path,) = tmp_path.iterdir()
    (line,) = path.read_text().splitlines()
    reason = json.loads(line)["reason"]
    assert reason.isprintable()
    assert len(reason) == audit_log.MAX_CHARACTERS


def test_what_strangers_can_cause_is_summed_up(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    for _ in range(1000):
        log.count("handshake failed", "198.51.100.7")
    assert events(tmp_path) == []
    log.flush()
    (event,) = log.events()
    assert (event["address"], event["count"]) == ("198.51.100.7", 1000)


def test_many_addresses_do_not_fill_the_log(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    for number in range(3 * audit_log.MAX_COUNTED):
        log.count("handshake failed", f"2001:db8::{number:x}")
    log.flush()
    found = list(log.events())
    assert len(found) == audit_log.MAX_COUNTED + 1
    assert sum(event["count"] for event in found) == 3 * audit_log.MAX_COUNTED


def test_many_reasons_do_not_fill_the_log_either(tmp_path: Path) -> None:
    """A reason may contain a name that the peer has chosen."""
    log = AuditLog(tmp_path)
    for number in range(5 * audit_log.MAX_COUNTED):
        log.count(f"enrollment refused: '{number}' is taken", "198.51.100.7")
    log.flush(if_due=True)
    assert events(tmp_path) == []
    log.flush()
    found = list(log.events())
    assert len(found) == 2 * audit_log.MAX_COUNTED + 1
    assert sum(event["count"] for event in found) == 5 * audit_log.MAX_COUNTED
