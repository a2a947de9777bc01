"""Turns an exception into text that a client may send: no traceback, paths or user names."""

import re

from fedshelf.core.errors import FedShelfError
from fedshelf.data.photo_files import ALL_EXTENSIONS

MAX_CHARACTERS = 500
_QUOTED = re.compile(r"""(['"])(?:(?!\1).)*(?:[/\\]|\.[A-Za-z]\w{1,11}\b)(?:(?!\1).)*\1""")
_ENDINGS = "|".join(ending.removeprefix(".") for ending in sorted(ALL_EXTENSIONS))
_BARE = re.compile(rf"(?:[A-Za-z]:|\.{{1,2}}|~)?[^\s'\"(),;:=]*[/\\][^\s'\"(),;]*|\S+\.(?:{_ENDINGS})\b", re.IGNORECASE)
_USER = re.compile(r"\b(user (?:id )?)(?:'[^']*'|[0-9]+)")


def failure_text(error: BaseException) -> str:
    """Describe an error for the server.

    Anything that looks like a path, a photo's file name or a user name becomes "…", because a store has not agreed to
    share them. The client's own log has the full error.

    Args:
        error: the exception.

    Returns:
        The exception's class and message.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else without_places(str(error))
    if isinstance(error, FedShelfError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def without_places(text: str) -> str:
    """Return `text` on one line of bounded length, without paths, file names and user names."""
    return " ".join(_BARE.sub("…", _QUOTED.sub("…", _USER.sub(r"\1…", text))).split())[:MAX_CHARACTERS]
