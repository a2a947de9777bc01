"""A process that says what it finds, and ends as it is told: see `tests.e2e.test_fork_server`."""

import atexit
import io
import json
import os
import signal
import sys
import threading
from pathlib import Path


def main(ending: str) -> None:
    found = {
        "arguments": sys.argv[1:],
        "name": __name__,
        "path": sys.path[0],
        "cwd": str(Path.cwd()),
        "environment": {name: os.environ.get(name) for name in ("FEDSHELF_HOME", "PYTHONPATH", "OPENBLAS_NUM_THREADS")},
        "input": sys.stdin.read(),
        "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "threads": threading.active_count(),
        "leader": os.getpid() == os.getsid(0),
        "streams": [
            (stream.name, stream.encoding, stream.errors, stream.line_buffering, stream.seekable(), stream.isatty())
            for stream in (sys.stdin, sys.stdout, sys.stderr)
            if isinstance(stream, io.TextIOWrapper)
        ],
        "open files": len([fd for fd in range(256) if is_open(fd)]),
    }
    print("to standard error", file=sys.stderr)
    atexit.register(print, "at the end")
    threading.Thread(target=print_after_main).start()
    print(json.dumps(found), flush=True)  # from now on a signal may come
    match ending:
        case "raises":
            raise ValueError("as told")
        case "waits":
            signal.pause()
        case code:
            sys.exit(int(code) if code.isdigit() else code)


def print_after_main() -> None:
    threading.main_thread().join()
    print("in a thread")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1])
