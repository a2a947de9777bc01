"""Processes forked from one that has imported everything: a start costs milliseconds instead of five CPU seconds.

``python -m tests.fork_server FD`` imports all of FedShelf once and then forks a process for each request on the socket
FD. A forked process is real: it has its own environment, working folder, pipes, signals and exit code, and runs its
module as ``python -m MODULE ARGUMENT…`` does, to the end of the interpreter. The server has one thread, so nothing is
lost in the fork. The differences to a fresh start: modules are imported already, and ``/proc/PID/cmdline`` is the
server's.

`start` forks where that makes no difference.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
FREE = {"FEDSHELF_HOME", "PYTEST_CURRENT_TEST"}
"""Variables that nothing reads at import. Where others differ from the server's, a process starts afresh."""

REQUEST_BYTES = 1 << 20  # at most
STATUS = struct.Struct("<i")  # what the server says of a process: its number, then its exit code


@dataclass(frozen=True, kw_only=True)
class Request:
    """A process to fork.

    Attributes:
        arguments: the module to run as ``__main__``, and its arguments.
        environment: all of its environment.
        cwd: its working folder.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    cwd: str


class ForkedProcess:
    """A process that the server has forked; used as a `subprocess.Popen` is."""

    def __init__(self, status: int, stdout: IO[bytes], stderr: IO[bytes], *, server: "subprocess.Popen[bytes]") -> None:
        self._server = server
        self._status = os.fdopen(status, "rb", buffering=0)
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self.pid = self._next()

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Args:
            timeout: seconds to wait.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = self._next()
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _next(self) -> int:
        told = self._status.read(STATUS.size)
        if len(told) < STATUS.size:
            raise RuntimeError(f"the fork server has died: {self._server.communicate()[1].decode()}")
        (number,) = STATUS.unpack(told)
        return int(number)


class ForkServer:
    """A server process with this environment, which ends with this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()],
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,  # pipes, as in its forks
            )  # fmt: skip

    def close(self) -> None:
        """End the server and what it has forked."""
        self._control.close()
        sys.stderr.write(self._process.communicate()[1].decode())

    def can_start(self, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Whether a forked process would do as a fresh one does."""
        return list(command[:2]) == [sys.executable, "-m"] and all(
            environment.get(name) == self._environment.get(name)
            for name in (environment.keys() | self._environment.keys()) - FREE
        )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path) -> ForkedProcess:
        """Fork a process that does as ``python -m ARGUMENT…``."""
        request = Request(arguments=arguments, environment=environment, cwd=str(cwd))
        pipes = [os.pipe() for _ in range(3)]
        with contextlib.ExitStack() as stack:
            for _, theirs in pipes:
                stack.callback(os.close, theirs)
            socket.send_fds(self._control, [json.dumps(asdict(request)).encode()], [theirs for _, theirs in pipes])
        status, stdout, stderr = (ours for ours, _ in pipes)
        return ForkedProcess(status, os.fdopen(stdout, "rb"), os.fdopen(stderr, "rb"), server=self._process)


@functools.cache
def _server() -> ForkServer | None:
    if not hasattr(os, "pidfd_open"):  # not Linux
        return None
    server = ForkServer(environment_of_a_process())
    atexit.register(server.close)
    return server


def environment_of_a_process() -> dict[str, str]:
    """What tests start processes with."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",  # the same figures on every machine
    }


def start(
    command: Sequence[str], *, environment: Mapping[str, str], cwd: Path, fresh: bool = False
) -> "subprocess.Popen[bytes] | ForkedProcess":
    """Start a command with no input and its output in pipes.

    Args:
        command: ``python -m MODULE ARGUMENT…`` is forked where that makes no difference.
        environment: all of its environment.
        cwd: its working folder.
        fresh: fork in no case.
    """
    server = _server()
    if not fresh and server is not None and server.can_start(command, environment):
        return server.start(command[2:], environment, cwd)
    return subprocess.Popen(
        command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _import_everything() -> dict[str, str]:
    """Import FedShelf's modules; returns the environment variables that they have set."""
    before = set(os.environ)
    import fedshelf

    for found in pkgutil.walk_packages(fedshelf.__path__, "fedshelf."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    importlib.import_module("tests.processes")  # what programs of the tests import
    return {name: value for name, value in os.environ.items() if name not in before}


def _serve(control: socket.socket) -> Request | None:
    """Fork until the socket ends. Returns twice for each request: in the forked process, with what it is to run."""
    set_by_imports = _import_everything()
    if (threads := len(os.listdir("/proc/self/task"))) != 1:  # noqa: PTH208
        raise RuntimeError(f"importing FedShelf started {threads - 1} threads, which a fork would lose")
    gc.collect()
    gc.freeze()  # or each forked process would copy what its own collections look at
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    running: dict[int, tuple[int, int]] = {}  # by pidfd: the process and where its status goes
    with selectors.DefaultSelector() as events:
        events.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj is not control:
                    events.unregister(key.fileobj)
                    pid, status = running.pop(key.fd)
                    _tell(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                    os.close(status)
                    os.close(key.fd)
                    continue
                told, pipes, _, _ = socket.recv_fds(control, REQUEST_BYTES, 3)
                if not told:
                    for pid, _ in running.values():
                        os.kill(pid, signal.SIGKILL)
                    return None
                status, stdout, stderr = pipes
                if not (pid := os.fork()):
                    for fd in (control.fileno(), status, *running, *(status for _, status in running.values())):
                        os.close(fd)
                    events.close()
                    request = Request(**json.loads(told))
                    _become(request, stdout, stderr, set_by_imports)
                    return request
                os.close(stdout)
                os.close(stderr)
                _tell(status, pid)
                pidfd = os.pidfd_open(pid)
                running[pidfd] = pid, status
                events.register(pidfd, selectors.EVENT_READ)


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the test no longer asks
        os.write(status, STATUS.pack(number))


def _become(request: Request, stdout: int, stderr: int, set_by_imports: Mapping[str, str]) -> None:
    """Make this forked process what a fresh one would be."""
    for source, target in ((stdout, 1), (stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update({**set_by_imports, **request.environment})
    os.chdir(request.cwd)
    tempfile.tempdir = None
    sys.path[0] = request.cwd
    sys.argv[:] = request.arguments


def main() -> None:
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        runpy.run_module(request.arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
