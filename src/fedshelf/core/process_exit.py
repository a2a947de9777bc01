"""Consistent descriptions of how a process ended."""

import signal

CRASHES = frozenset({"SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE"})
"""Signals that indicate a fault in native code: torch, a driver, memory."""


def signal_of(exit_code: int | None) -> str:
    """The name of the signal that ended a process, such as "SIGSEGV"; empty if it exited by itself or still runs.

    Args:
        exit_code: as `subprocess` and `multiprocessing` report it: negative for a signal.
    """
    if exit_code is None or exit_code >= 0:
        return ""
    try:
        return signal.Signals(-exit_code).name
    except ValueError:  # one of the real-time signals
        return f"signal {-exit_code}"


def ended_by(process: str, signal_name: str) -> str:
    """Describe a process that was ended by a signal, with a likely cause.

    For example: "the process of store-2 was ended by SIGSEGV (a fault in native code)".

    Args:
        process: how to refer to it.
        signal_name: the signal; empty if unknown.
    """
    if not signal_name:
        return f"{process} ended without a message (killed, or out of memory?)"
    hint = " (out of memory?)" if signal_name == "SIGKILL" else ""
    hint = " (a fault in native code)" if signal_name in CRASHES else hint
    return f"{process} was ended by {signal_name}{hint}"


def describe_exit(process: str, exit_code: int) -> str:
    """Describe how `process` ended: by a signal, or with an exit code."""
    by = signal_of(exit_code)
    return ended_by(process, by) if by else f"{process} ended with exit code {exit_code}"
