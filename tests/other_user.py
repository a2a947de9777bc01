"""Doing something as a user who has no rights, no home directory and no name."""

import os
import traceback
import warnings
from collections.abc import Callable

from fedshelf.core.errors import FedShelfError

UID = 54_321  # in nobody's list of users


def error_as_other_user(action: Callable[[], object]) -> str:
    """The message of the expected error that `action` raises, run by that user (in a child process) where the tests
    run as root, else by this one; the traceback of any other error; empty where there is none."""
    if os.geteuid() != 0:
        return _error(action)
    source, sink = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forking beside threads: the child does no more than this
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(UID)
            os.setuid(UID)
            os.write(sink, _error(action).encode())
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def _error(action: Callable[[], object]) -> str:
    try:
        action()
    except FedShelfError as error:
        return str(error)
    except BaseException:
        return traceback.format_exc()
    return ""
