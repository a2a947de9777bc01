"""The `fedshelf demo` command: a whole run on one machine with generated photos."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fedshelf.cli.display import echo, progress_bar
from fedshelf.core.child_process import end_all, start
from fedshelf.core.errors import RunError
from fedshelf.core.process_exit import describe_exit, signal_of
from fedshelf.core.settings import MAX_INTEGER, MAX_SEED
from fedshelf.core.stopping import stop_on_signals
from fedshelf.storage.atomic_files import make_folder, open_private

ROUNDS, LOCAL_EPOCHS = 15, 4  # reaches well over 80 % in a few minutes on two cores
FAREWELL_SECONDS, STOP_SECONDS = 5.0, 15.0


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for photos, run and logs.")] = Path("demo"),
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=MAX_INTEGER, help="Rounds to train.")] = ROUNDS,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of everything random.")] = 0,
) -> None:
    """Train one model over five stores on this machine.

    Draws product photos, then starts a real server and one real client per store.

    Example: fedshelf demo --dir /tmp/demo
    """
    from fedshelf.cli.run_summary import describe_demo

    stores = _photos(folder, seed)
    run_dir = folder / "runs" / f"rounds-{rounds}-seed-{seed}"
    address = f"127.0.0.1:{_free_port()}"
    # Keeps the demo's certificates, caches and client states inside its folder.
    environment = {**os.environ, "FEDSHELF_HOME": str((folder / "home").absolute())}
    echo("", f"Server on {address}, and one client process per store: {', '.join(store.name for store in stores)}", "")
    serve = [
        "server", "--address", address, "--min-clients", str(len(stores)), "--rounds", str(rounds),
        "--local-epochs", str(LOCAL_EPOCHS), "--seed", str(seed), "--test-dir", str(folder / "photos" / "test"),
        "--run-dir", str(run_dir),
    ]  # fmt: skip
    clients: dict[Path, subprocess.Popen[bytes]] = {}
    with stop_on_signals("stopping the server and its clients") as stop:
        server = _start(serve, environment, None)
        try:
            for store in stores:
                join = ["client", "--data-dir", str(store), "--server-address", address, "--max-wait", "120"]
                log = folder / "logs" / f"{store.name}.log"
                clients[log] = _start(join, environment, log)
            _wait_for_run(server, clients, stop)
        finally:
            end_all([server, *clients.values()], patience=STOP_SECONDS)
    if stop.is_set():
        typer.echo("Stopped. Start the same command again to resume the run.")
        return
    describe_demo(folder, run_dir)


def _wait_for_run(
    server: "subprocess.Popen[bytes]", clients: Mapping[Path, "subprocess.Popen[bytes]"], stop: threading.Event
) -> None:
    """Wait until the run and its clients (by log) have finished, or until `stop` is set.

    Raises:
        RunError: a process has failed.
    """

    while server.poll() is None and not stop.is_set():
        for log, client in clients.items():
            if code := client.poll():
                ending = describe_exit(f"the process of {log.stem}", code)
                words = "" if signal_of(code) else f": {log.read_text(errors='replace').strip()[-500:]}"
                raise RunError(f"{ending}{words}; its log is {log}")
        time.sleep(0.2)
    if server.returncode and not stop.is_set():
        logs = next(iter(clients)).parent
        ending = describe_exit("the server's process", server.returncode)
        raise RunError(f"{ending} (see above); the clients' logs are in {logs}")
    deadline = time.monotonic() + FAREWELL_SECONDS  # clients notice that the run is finished and exit
    while time.monotonic() < deadline and not stop.is_set() and any(c.poll() is None for c in clients.values()):
        time.sleep(0.1)


def _photos(folder: Path, seed: int) -> list[Path]:
    """Return the demo's store folders; generate their photos if necessary."""
    from fedshelf.data.demo import make_demo

    target = folder / "photos"
    if not (target / "test").is_dir():
        with progress_bar("Drawing product photos") as progress:
            make_demo(target, seed=seed, progress=progress)
    return sorted(path for path in (target / "stores").iterdir() if path.is_dir())


def _start(arguments: list[str], environment: dict[str, str], log: Path | None) -> "subprocess.Popen[bytes]":
    """Start `fedshelf ARGUMENTS` as a child that ends at the latest with this process."""

    command = [sys.executable, "-m", "fedshelf", *arguments]
    if log is None:
        return start(command, environment=environment)
    make_folder(log.parent)
    with os.fdopen(open_private(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as output:
        return start(command, environment=environment, output=output)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
