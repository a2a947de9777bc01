"""Real ``python -m fedshelf …`` processes for tests: started, listened to, paused, killed, and always cleaned up.

A test waits for what a process says (the events that ``--json`` prints), never for time to pass. It does not wait for
the dead: once any process of its machine was ended by a signal that the test did not send, all waiting fails.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedshelf.cli import runs
from fedshelf.core.process_exit import describe_exit, signal_of
from tests import fork_server
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0  # seconds for anything to happen that must, on a busy machine
LOOK_SECONDS = 0.2  # between looks at whether a process has died
CLASSES = ("apple", "bread", "cocoa", "dates")
Event = dict[str, Any]

TINY = (
    "--model", "resnet10", "--width", "8", "--image-size", "16", "--local-epochs", "1", "--batch-size", "8",
    "--client-lr", "0.05", "--warmup-rounds", "0", "--seed", "7", "--threads", "1",
)  # fmt: skip
"""A recipe that trains a store in a blink, for `simulate` and `server` alike."""


class Process:
    """One process; its standard output is read as events, its standard error as its log.

    Args:
        command: what to run.
        environment: its environment.
        cwd: its working folder.
        together: the processes that work together, this one to be added by the caller: see the module's text.
        fresh: start it as a shell does, not from the fork server.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: dict[str, str],
        cwd: Path,
        together: Sequence["Process"] = (),
        fresh: bool = False,
    ) -> None:
        self.events: list[Event] = []
        self._command = command
        self._together = together
        self._may_die = False
        self._log = bytearray()
        self._news = threading.Condition()
        self._ended = False
        self._process = fork_server.start(command, environment=environment, cwd=cwd, fresh=fresh)
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_log)]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, kind: str, /, **fields: Any) -> Event:
        """The first event of `kind` with these values, which may have come already; fails when the process ends
        without it."""

        def match(event: Event) -> bool:
            return event["event"] == kind and fields.items() <= event.items()

        deadline = time.monotonic() + PATIENCE
        with self._news:
            while True:
                found = next((event for event in self.events if match(event)), None)
                if found is not None:
                    return found
                self._fail_if_one_died()
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    what = "ended" if self._ended else f"was silent for {PATIENCE:g} s"
                    raise AssertionError(
                        f"the process {what} without {kind} {fields}; events: {self.events}; log:\n{self.text()}"
                    )
                self._news.wait(min(left, LOOK_SECONDS))

    def wait_for_text(self, text: str) -> None:
        """Return once `text` stands in the log."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.text():
            if time.monotonic() > deadline or (self._ended and text not in self.text()):
                raise AssertionError(f"no {text!r} in the log:\n{self.text()}")
            self._fail_if_one_died()
            time.sleep(0.02)

    def has(self, kind: str, **fields: Any) -> bool:
        """Whether such an event has come so far."""
        with self._news:
            return any(event["event"] == kind and fields.items() <= event.items() for event in self.events)

    def text(self) -> str:
        """The log so far, its lines joined: the console breaks them where it likes."""
        return " ".join(bytes(self._log).decode(errors="replace").split())

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def kill(self, by: signal.Signals = signal.SIGKILL) -> None:
        """`kill -9`, or by another signal that ends it, and wait until it is dead."""
        self._may_die = True
        self._process.send_signal(by)
        self._process.wait(PATIENCE)
        self._join()

    def wait_for_death(self) -> int | None:
        """Wait until a signal that it was told to expect has ended it; return the exit code."""
        self._may_die = True
        self._process.wait(PATIENCE)
        self._join()
        return self.poll()

    def end(self) -> int:
        """Wait for the end and return the exit code."""
        deadline = time.monotonic() + PATIENCE
        while (code := self._process.poll()) is None:
            self._fail_if_one_died()
            if time.monotonic() > deadline:
                raise AssertionError(f"the process did not end; last events: {self.events[-8:]}; log:\n{self.text()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LOOK_SECONDS)
        self._join()
        return code

    def _fail_if_one_died(self) -> None:
        for process in self._together:
            code = process._process.poll()
            if signal_of(code) and not process._may_die:
                process._join()
                ending = describe_exit(f"'{' '.join(process._command)}'", code or 0)
                raise AssertionError(f"{ending}; its log:\n{process.text()}")

    def running(self) -> bool:
        return self.poll() is None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(PATIENCE)

    def _read_log(self) -> None:
        stream = self._process.stderr
        if stream is not None:
            with stream:
                for line in stream:
                    self._log += line

    def _read(self) -> None:
        stream = self._process.stdout
        if stream is None:
            return
        with stream:
            for line in stream:
                with self._news:
                    self.events.append(_event(line))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def _event(line: bytes) -> Event:
    try:
        event: Event = json.loads(line)
    except ValueError:
        event = {}
    return event if "event" in event else {"event": "text", "text": line.decode(errors="replace")}


class Site:
    """A machine of a test's own: a home for FedShelf's files, a port, and every process started there.

    Attributes:
        fresh: start processes as a shell does, not from the fork server.
    """

    def __init__(self, root: Path, stores: Path, *, fresh: bool = False) -> None:
        self.root = root
        self.stores = stores
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {**fork_server.environment_of_a_process(), "FEDSHELF_HOME": str(root / "home")}
        self.fresh = fresh
        self._processes: list[Process] = []

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.stores.iterdir())

    def start(self, *command: str, cwd: Path | None = None) -> Process:
        """Start any command in this machine's environment."""
        process = Process(
            command, environment=self.environment, cwd=cwd or self.root, together=self._processes, fresh=self.fresh
        )
        self._processes.append(process)
        return process

    def fedshelf(self, *arguments: str) -> Process:
        return self.start(sys.executable, "-m", "fedshelf", *arguments)

    def server(self, *arguments: str, min_clients: int | None = None) -> Process:
        """A server of the tiny recipe on this machine's port, for all stores unless said otherwise."""
        count = str(len(self.names) if min_clients is None else min_clients)
        return self.fedshelf("server", *TINY, "--address", self.address, "--min-clients", count, "--json", *arguments)

    def client(self, name: str, *arguments: str) -> Process:
        data = str(self.stores / name)
        return self.fedshelf("client", "--data-dir", data, "--server-address", self.address, *arguments)

    def odd_client(self, name: str, *arguments: str) -> Process:
        """A client that does something odd: see `tests.odd_client`."""
        data = str(self.stores / name)
        return self.start(
            sys.executable, "-m", "tests.odd_client", "--data-dir", data, "--server-address", self.address, *arguments
        )

    def held_client(self, name: str, *orders: str) -> Process:
        """A client that waits at what `orders` say (``hold@2``) until `release` is called for that round."""
        told = [part for order in orders for part in ("--do", order)]
        return self.odd_client(name, *told, "--until", str(self.root))

    def release(self, round: int) -> None:
        """Let clients go on that wait in `round`, now or later."""
        (self.root / str(round)).touch()

    def clients(self, *arguments: str) -> dict[str, Process]:
        """A client for each store."""
        return {name: self.client(name, *arguments) for name in self.names}

    def simulate(self, *arguments: str, run_dir: Path) -> Process:
        """Simulate the tiny recipe to its end."""
        process = self.fedshelf(
            "simulate", *TINY, "--data-dir", str(self.stores), "--run-dir", str(run_dir), "--json", *arguments
        )
        assert process.end() == 0, process.text()
        return process

    def show(self, run_dir: Path) -> dict[str, Any]:
        """What `fedshelf runs show --json` says."""
        shown = CliRunner().invoke(runs.app, ["show", str(run_dir), "--json"], catch_exceptions=False)
        assert shown.exit_code == 0, shown.output
        summary: dict[str, Any] = json.loads(shown.stdout)
        return summary

    def only_run(self) -> Path:
        """The one run below the working folder."""
        (run,) = (self.root / "runs").iterdir()
        return run

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def draw_stores(root: Path, *, num_stores: int, photos: int = 8, classes: Sequence[str] = CLASSES) -> Path:
    """Photos of 24 pixels in `root/store-N/CLASS/…`: each store holds all classes but one; returns `root`."""
    for store in range(num_stores):
        for index, name in enumerate(classes):
            if num_stores > 1 and index == store % len(classes):
                continue
            draw_photos(root / f"store-{store + 1}" / name, index, count=photos, seed=1000 * store + index)
    return root


def draw_photos(folder: Path, index: int, *, count: int, seed: int) -> None:
    """Noisy photos of one class, told apart by its colour."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    color = np.array([60 + 45 * index, 200 - 45 * index, 90 + 70 * (index % 2)])
    for number in range(count):
        pixels = np.clip(color + rng.normal(0, 40, (24, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"shelf-photo-{seed:04}-{number:03}.png")


def same_model(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same tensors, bit for bit."""
    return same_weights(one / "model", other / "model")


def same_weights(one: Path, other: Path) -> bool:
    """The same of two folders with a model each."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def figures(summary: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    """`names` of each round."""
    return [tuple(round_[name] for name in names) for round_ in summary["rounds"]]


def bytes_without_times(process: Process) -> list[tuple[int, int]]:
    """Payload bytes up and down of each round, less the digits of the one figure in them that is measured, not
    computed: the seconds that a client trained."""
    return [
        (
            event["bytes_up"] - sum(len(json.dumps(client["seconds"])) for client in event["clients"]),
            event["bytes_down"],
        )
        for event in process.events
        if event["event"] == "round_finished"
    ]


def statuses(summary: dict[str, Any], round: int) -> dict[str, str]:
    """How each client ended a round."""
    (found,) = (r for r in summary["rounds"] if r["round"] == round)
    return {client["client"]: client["status"] for client in found["clients"]}


def reason(summary: dict[str, Any], round: int, client: str) -> str:
    """Why a client was not counted in a round."""
    (found,) = (r for r in summary["rounds"] if r["round"] == round)
    return str(next(c["reason"] for c in found["clients"] if c["client"] == client))


@pytest.fixture(scope="session")
def drawn_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four stores, drawn once: do not write there."""
    return draw_stores(tmp_path_factory.mktemp("photos") / "stores", num_stores=4)


@pytest.fixture(scope="session")
def drawn_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, drawn once: do not write there."""
    return draw_stores(tmp_path_factory.mktemp("photos") / "stores", num_stores=2)


@pytest.fixture(scope="session")
def drawn_test_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test photos of all classes."""
    root = tmp_path_factory.mktemp("photos") / "test"
    for index, name in enumerate(CLASSES):
        draw_photos(root / name, index, count=6, seed=9000 + index)
    return root


@pytest.fixture
def site(tmp_path: Path, drawn_stores: Path, pytestconfig: pytest.Config) -> Iterator[Site]:
    """A machine with four stores; its processes end with the test."""
    yield from _site(tmp_path, drawn_stores, pytestconfig)


@pytest.fixture
def pair(tmp_path: Path, drawn_pair: Path, pytestconfig: pytest.Config) -> Iterator[Site]:
    """A machine with two stores; its processes end with the test."""
    yield from _site(tmp_path, drawn_pair, pytestconfig)


def _site(root: Path, stores: Path, config: pytest.Config) -> Iterator[Site]:
    opened = Site(root, stores, fresh=bool(config.getoption("long")))
    try:
        yield opened
    finally:
        opened.close()
        shutil.rmtree(root / "home", ignore_errors=True)
