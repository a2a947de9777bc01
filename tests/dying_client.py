"""A store's client that is killed at a chosen line of the code that records and sends.

``python -m tests.dying_client LINES ARGUMENT…`` runs ``fedshelf client ARGUMENT…`` and ends itself by SIGKILL before
the line number LINES, counted over all that is executed in these modules.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from fedshelf.cli.app import main
from fedshelf.deploy import blob_client, flower_client, http_connection, registration
from fedshelf.privacy import ledger, ledger_content
from fedshelf.storage import hash_chain

FILES = frozenset(str(module.__file__) for module in (
    blob_client, flower_client, http_connection, registration, ledger, ledger_content, hash_chain,
))  # fmt: skip


def kill_after(lines: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that kills this process."""
    left = [lines]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


if __name__ == "__main__":
    tracer = kill_after(int(sys.argv[1]))
    threading.settrace(tracer)
    sys.settrace(tracer)
    main(["client", *sys.argv[2:]])
