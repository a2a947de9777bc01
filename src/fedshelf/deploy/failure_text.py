"""What a client may say of an exception: its class and message, without traceback, places on its disk, and users."""

import re

from fedshelf.core.errors import FedShelfError
from fedshelf.data.photo_files import ALL_EXTENSIONS

MAX_CHARACTERS = 500
_QUOTED = re.compile(r"""(['"])(?:(?!\1).)*(?:[/\\]|\.[A-Za-z]\w{1,11}\b)(?:(?!\1).)*\1""")
_ENDINGS = "|".join(ending.removeprefix(".") for ending in sorted(ALL_EXTENSIONS))
_BARE = re.compile(rf"(?:[A-Za-z]:|\.{{1,2}}|~)?[^\s'\"(),;:=]*[/\\][^\s'\"(),;]*|\S+\.(?:{_ENDINGS})\b", re.IGNORECASE)
_USER = re.compile(r"\b(user (?:id )?)(?:'[^']*'|[0-9]+)")


def failure_text(error: BaseException) -> str:
    """`error` for the server's eyes.

    Anything that looks like a path or a photo's file name becomes "…", and so does the name of a user of that machine:
    they may tell more than a store has agreed to tell. The client's own log has the whole story.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else without_places(str(error))
    if isinstance(error, FedShelfError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def without_places(text: str) -> str:
    """`text` on one line of bounded length, without paths, file names and users."""
    return " ".join(_BARE.sub("…", _QUOTED.sub("…", _USER.sub(r"\1…", text))).split())[:MAX_CHARACTERS]
