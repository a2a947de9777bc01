"""One nasty text, as a name, a reason, an answer or an exception, through everything that people and scripts read."""

import io
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fedshelf.core import events
from fedshelf.core.choices import Candidate
from fedshelf.core.errors import DataError
from fedshelf.core.text import printable
from fedshelf.serialization import records
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.console import ConsoleSink
from fedshelf.tracking.database import RunDatabase
from fedshelf.tracking.sinks import JsonLinesSink
from fedshelf.tracking.terminal import LogHandler, make_console
from tests import fork_server
from tests.ports import free_port
from tests.unit.cli.screen import run, run_on_terminal
from tests.unit.data.samples import write_pack

NASTY = "=evil\x1b[2J\x1b]0;owned\x07\r\nerror: forged\n\u202egnp\u2066\x9b31m\x7f[bold red]<script>\u2028error: forged"
TINY = ["--image-size", "16", "--width", "8", "--batch-size", "4", "--device", "cpu", "--rounds", "1"]


def assert_harmless(text: str) -> None:
    """Nothing in it controls a terminal or reorders text, and no line of it is the forged one."""
    assert "evil" in text
    assert [line for line in text.split("\n") if printable(line) != line] == []
    assert [line for line in text.split("\n") if line.startswith("error: forged")] == []


@pytest.fixture
def stores(home: Path) -> Path:
    """Two stores; the name of one, and of one of its products and photos, is nasty."""
    for store in ("lyon", NASTY):
        write_pack(Path("stores") / store, {"apple": 4, NASTY: 4})
    (Path("stores") / NASTY / NASTY / f"{NASTY}.jpg").write_bytes(b"no photo")
    return Path("stores").absolute()


def test_a_run_with_nasty_names_is_shown_escaped_by_every_command(stores: Path) -> None:
    simulate = ["simulate", "--data-dir", str(stores), *TINY, "--compare"]
    code, text = run(*simulate, "--run-dir", "r")
    assert code == 0, text
    assert_harmless(text)
    (photo,) = (stores / "lyon" / "apple").glob("000.png")
    code, output = run(*simulate, "--run-dir", "r2", "--seed", "1", "--json")
    assert code == 0
    assert_harmless(output)
    outputs = {}
    nasty_store = str(stores / NASTY)
    for command in (
        ["runs", "show", "r"], ["runs", "show", "r", "--json"],
        ["predict", str(photo), "--run", "r"], ["predict", str(photo), "--run", "r", "--json"],
        ["evaluate", nasty_store, "--run", "r"], ["evaluate", nasty_store, "--run", "r", "--json"],
        ["data", "check", nasty_store], ["data", "check", nasty_store, "--json"],
    ):  # fmt: skip
        code, outputs[" ".join(command)] = run(*command)
        assert code == 0
        assert_harmless(outputs[" ".join(command)])
    told = json.loads(outputs[f"predict {photo} --run r --json"])
    assert NASTY in [guess["class"] for guess in told["predictions"]], "JSON escapes, and loses nothing"
    labels = (Path("r") / "model" / "labels.json").read_text("utf-8")
    assert_harmless(labels)
    assert NASTY in json.loads(labels)
    for command in (["data", "check", NASTY], ["predict", NASTY, "--run", "r"], ["runs", "show", NASTY]):
        code, text = run(*command)
        assert code != 0
        assert_harmless(text)


def test_what_worker_processes_log_is_escaped(stores: Path) -> None:
    command = [sys.executable, "-m", "fedshelf", "simulate", "--data-dir", str(stores), *TINY, "--workers", "2"]
    done = subprocess.run([*command, "--threads", "2"], capture_output=True, check=True)
    assert_harmless(done.stderr.decode())
    assert_harmless(done.stdout.decode())


def nasty_events() -> list[events.Event]:
    """An event of every kind, with the nasty text wherever there is text."""
    part = events.Participation(client=NASTY, status=events.ClientStatus.FAILED, reason=NASTY)
    store = events.StoreComparison(client=NASTY, best=None, accuracies={}, on_test=False, reason=NASTY)
    kept = events.StoreComparison(
        client=NASTY + "2", best=Candidate.LOCAL, accuracies={Candidate.LOCAL: 0.5}, on_test=True, reason=""
    )
    known: dict[str, Any] = {
        "status": events.RunStatus.STOPPED, "clients": (part,), "cohort": (NASTY,), "live": (NASTY,),
        "missing": (NASTY,), "stores": (store, kept), "round": 1, "num_rounds": 1, "attempt": 0,
    }  # fmt: skip
    found: list[events.Event] = []
    kinds = (
        events.RunStarted, events.WeightsLoaded, events.ClientJoined, events.ClientLeft, events.ClientExcluded,
        events.Waiting, events.ClientRefused, events.RoundStarted, events.UploadReceived, events.RoundVoid,
        events.RoundFinished, events.ComparisonStarted, events.ComparisonReceived, events.StoresCompared,
        events.RunEnded,
    )  # fmt: skip
    for kind in kinds:
        values: dict[str, Any] = {}
        for field in fields(kind):
            if kind is events.UploadReceived and field.name == "status":
                values["status"] = events.ClientStatus.FAILED
            elif kind is events.ComparisonStarted and field.name == "stores":
                values["stores"] = (NASTY,)
            elif field.name in known:
                values[field.name] = known[field.name]
            elif "str" in str(field.type):
                values[field.name] = (NASTY,) if "tuple" in str(field.type) else NASTY
            else:
                values[field.name] = 1
        found.append(kind(**values))
    return found


def test_every_event_is_one_line_on_the_console_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    console, stream = ConsoleSink(make_console()), io.StringIO()
    lines = JsonLinesSink(stream)
    for event in nasty_events():
        console.emit(event)
        lines.emit(event)
    assert_harmless(capsys.readouterr().out)
    assert_harmless(stream.getvalue())
    assert len(stream.getvalue().splitlines()) == len(nasty_events())
    assert json.loads(stream.getvalue().splitlines()[3])["client"] == NASTY


def test_a_terminal_gets_no_escape_sequence_but_the_consoles_own(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    code, text = run_on_terminal("simulate", "--data-dir", str(stores), *TINY)
    assert code == 0
    assert {"\x07", "\x9b", "\u202e", "\u2066", "\u2028", "\x7f"}.isdisjoint(text)
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text


def test_runs_of_nasty_clients_are_listed_shown_and_stopped_harmlessly(home: Path) -> None:
    run_id = "20261121-083512-a1b2"
    directory = RunDirectory.create(
        Path("runs") / run_id, run_id=run_id, config_toml=f"seed = 0\nnote = {json.dumps('evil')}\n", config_digest=""
    )
    database = RunDatabase(directory.database)
    database.emit_all(nasty_events())
    database.close()
    other = RunDirectory.create(Path("runs") / "b", run_id=NASTY, config_toml="seed = 1\n", config_digest="")
    RunDatabase(other.database).close()
    for command in (
        ["list"], ["list", "--json"], ["show", run_id], ["show", run_id, "--json"], ["stop", run_id],
        ["compare", run_id, "b"], ["show", "b"],
    ):  # fmt: skip
        code, text = run("runs", *command)
        assert code == 0, text
        assert_harmless(text)


def test_a_log_record_is_one_line_and_its_traceback_is_indented(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("service")
    log.addHandler(LogHandler())
    log.warning("answer of %s: %s", "lyon", NASTY)
    try:
        raise ValueError(NASTY)
    except ValueError:
        log.exception(NASTY)
    log.error(NASTY, stack_info=True)
    text = capsys.readouterr().err
    assert_harmless(text)
    starts = [line for line in text.splitlines() if not line.startswith("  ")]
    assert [line.split(":")[0] for line in starts] == ["warning", "error", "error"]


@pytest.mark.parametrize("where", ["main", "thread"])
def test_an_exception_that_nothing_catches_is_shown_in_the_same_way(where: str) -> None:
    code = (
        "import threading, sys\n"
        "from fedshelf.tracking.terminal import show_uncaught_exceptions\n"
        "show_uncaught_exceptions()\n"
        "def fail():\n    raise ValueError(sys.argv[1])\n"
        + ("fail()" if where == "main" else "thread = threading.Thread(target=fail); thread.start(); thread.join()")
    )
    done = subprocess.run([sys.executable, "-c", code, NASTY], capture_output=True, check=False)
    text = done.stderr.decode()
    assert_harmless(text)
    assert text.startswith("error: unexpected error")
    assert "ValueError" in text
    assert [line for line in text.splitlines()[1:] if not line.startswith("  ")] == []


def test_json_is_escaped_without_loss_and_readable_where_it_may_be() -> None:
    text = records.dump({NASTY: [NASTY, "\u82f9\u679c", "\U000e0041"]})
    assert json.loads(text) == {NASTY: [NASTY, "\u82f9\u679c", "\U000e0041"]}
    assert printable(text) == text
    assert "\u82f9\u679c" in text
    assert records.dump(["\x7f\u82f9"], ascii=True) == '["\\u007f\\u82f9"]'


def test_an_error_of_any_text_is_one_line() -> None:
    assert_harmless(str(DataError(NASTY, NASTY)))


@contextmanager
def answering(content: bytes) -> Iterator[int]:
    """A server on the yielded port that gives every connection the same answer."""
    with socket.create_server(("127.0.0.1", free_port())) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(content)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def http(status: str, body: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body.encode())}\r\nUpload-Offset: \x1b[2J\r\n\r\n"
    return (head + body).encode()


@pytest.mark.parametrize(
    "answer",
    [
        http("200 OK", json.dumps({"protocol": NASTY, "version": NASTY})),
        http("200 OK", f'{{"protocol": 99, "version": {json.dumps(NASTY, ensure_ascii=False)}}}'),
        http("503 \x1b[2Jevil", NASTY),
        f"HTTP/9{NASTY} 200 evil\r\n\r\n".encode(),
        b"\x1b[2Jevil\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: \x1b[2Jevil\r\n" * 200 + b"\r\n",
    ],
)
def test_a_hostile_servers_answer_is_shown_escaped_by_a_client(home: Path, answer: bytes) -> None:
    write_pack(Path("photos"), {"apple": 2})
    with answering(answer) as port:
        command = [
            sys.executable, "-m", "fedshelf", "client", "--data-dir", "photos", "--name", "evil", "--insecure",
            "--server-address", f"127.0.0.1:{port}", "--max-wait", "0.1",
        ]  # fmt: skip
        client = fork_server.start(command, environment=fork_server.environment_of_a_process(), cwd=Path.cwd())
        assert client.stdout is not None
        assert client.stderr is not None
        with client.stdout as out, client.stderr as errors:
            text = (out.read() + errors.read()).decode()
        assert client.wait(60) == 1, text
    assert_harmless(text)
