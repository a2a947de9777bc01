"""FedShelf's own commands, run as processes: a simulation, or a server with one client process per store."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import MeasurementError
from benchmarks.processes import free_ports, running
from fedshelf.core.process_exit import describe_exit

POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class FedShelfCli:
    """`python -m fedshelf`.

    Attributes:
        home: The folder for certificates, decoded photos, client states and the clients' logs.
        source: The `src` folder of the version to run; None runs the version that the benchmarks import.
    """

    home: Path
    source: Path | None = None

    @contextlib.contextmanager
    def started(
        self, *arguments: str, stdout: int | None = None, log: Path | None = None
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """A running command, which is stopped at the end of the block.

        Args:
            arguments: The command and its flags.
            stdout: Where its standard output goes; None is standard error.
            log: The file for all of its output.
        """
        source = {"PYTHONPATH": str(self.source.resolve())} if self.source else {}
        environment = {**os.environ, "FEDSHELF_HOME": str(self.home.resolve()), **source}
        command = [sys.executable, "-m", "fedshelf", *arguments]
        with contextlib.ExitStack() as stack:
            file = None if log is None else stack.enter_context(log.open("wb"))
            yield stack.enter_context(running(command, environment=environment, stdout=file or stdout, stderr=file))

    def run(self, *arguments: str) -> None:
        """Run a command to its end.

        Raises:
            MeasurementError: It failed.
        """
        with self.started(*arguments) as process:
            if code := process.wait():
                raise MeasurementError(f"{describe_exit(f'fedshelf {arguments[0]}', code)}; see above")

    def deploy(self, stores: Sequence[Path], *server_flags: str) -> None:
        """Run a server on a free port of this machine and a client for each store, to the end of the run.

        Args:
            stores: The stores' folders of photos.
            server_flags: The server's flags.

        Raises:
            MeasurementError: The server or a client failed.
        """
        address, logs = f"127.0.0.1:{free_ports(1)[0]}", self.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            command = ("server", "--address", address, "--min-clients", str(len(stores)), *server_flags)
            server, clients = stack.enter_context(self.started(*command)), {}
            for store in stores:
                command = ("client", "--data-dir", str(store), "--server-address", address)
                log = logs / f"{store.name}.log"
                clients[log] = stack.enter_context(self.started(*command, log=log))
            while (code := server.poll()) is None:
                for log, client in clients.items():
                    if failed := client.poll():
                        raise MeasurementError(
                            f"{describe_exit(f'the client of {log.stem}', failed)}; its log is {log}"
                        )
                time.sleep(POLL_SECONDS)
        if code:
            raise MeasurementError(f"{describe_exit('fedshelf server', code)}; see above")
