"""A client's behavior, independent of the connection: how it joins and answers, and what it says of a failure."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias, get_args

from flwr.app import Message

from fedshelf.core.errors import FedShelfError, RefusedError
from fedshelf.core.messages import ClientMessage, Failure, Join, ServerMessage, TaskKey
from fedshelf.core.text import printable
from fedshelf.data.photo_files import ALL_EXTENSIONS
from fedshelf.deploy.records import Control, ControlKind, Envelope, WireMessage, open_records
from fedshelf.serialization.blob import Buffer

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 500
_QUOTED = re.compile(r"""(['"])(?:(?!\1).)*(?:[/\\]|\.[A-Za-z]\w{1,11}\b)(?:(?!\1).)*\1""")
_ENDINGS = "|".join(ending.removeprefix(".") for ending in sorted(ALL_EXTENSIONS))
_BARE = re.compile(rf"(?:[A-Za-z]:|\.{{1,2}}|~)?[^\s'\"(),;:=]*[/\\][^\s'\"(),;]*|\S+\.(?:{_ENDINGS})\b", re.IGNORECASE)
_USER = re.compile(r"\b(user (?:id )?)(?:'[^']*'|[0-9]+)")

Handler: TypeAlias = Callable[[ServerMessage], ClientMessage]


class EndKind(StrEnum):
    """Why a client stopped without an error."""

    CLOSED = "closed"
    REFUSED = "refused"
    REFUSED_FOR_NOW = "refused-for-now"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a client's participation ended.

    Attributes:
        kind: who ended it.
        reason: the server's reason.
    """

    kind: EndKind
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientPart:
    """A client's behavior on any connection.

    Attributes:
        join: introduces the client.
        handle: answers the server's messages.
        find_blob: finds a blob that this machine has received before, by digest.
    """

    join: Join
    handle: Handler
    find_blob: Callable[[str], Buffer | None] = lambda digest: None

    def answer(self, message: Message) -> tuple[WireMessage, Ended | None]:
        """Answer a Flower message whose blob is inline. Never raises.

        Args:
            message: the server's message.

        Returns:
            The answer, and the end if the server announced it.
        """
        try:
            return self.answer_to(open_records(message.content))
        except Exception as error:  # noqa: BLE001 whatever the server sent, the client lives
            return self._failure(error), None

    def answer_to(self, asked: Control | Envelope, blob: Buffer | None = None) -> tuple[WireMessage, Ended | None]:
        """Answer a parsed message. Never raises.

        Args:
            asked: what the server sent.
            blob: the blob, if it was transferred separately.

        Returns:
            The answer, and the end if the server announced it.
        """
        if isinstance(asked, Control):
            return self._control(asked)
        try:
            request = asked.message(blob)
            if not isinstance(request, get_args(ServerMessage)):
                raise RefusedError(f"a server may not send a {type(request).__name__.lower()}")
            reply = self.handle(request)
            if isinstance(reply, Failure):  # an expected failure's message is for this machine's user, too
                reply = replace(reply, reason=without_paths(reply.reason))
            return reply, None
        except Exception as error:  # noqa: BLE001 whatever the server sent, the client lives
            return self._failure(error, asked.header.task), None

    def _failure(self, error: Exception, task: TaskKey | None = None) -> Failure:
        """Log an error, with a traceback only where somebody debugs, and describe it for the server."""
        text = str(error) if isinstance(error, FedShelfError) else f"{type(error).__name__}: {printable(str(error))}"
        logger.error("the server's request could not be answered: %s", text)
        logger.debug("the error", exc_info=error)
        return Failure(reason=failure_text(error), key=task)

    def _control(self, control: Control) -> tuple[WireMessage, Ended | None]:
        if control.kind is ControlKind.INTRODUCE:
            return self.join, None
        noted = Control(kind=ControlKind.NOTED)
        if control.kind is ControlKind.NOTED:
            return noted, None
        return noted, Ended(kind=EndKind(control.kind.value), reason=control.reason)


def failure_text(error: BaseException) -> str:
    """Describe an error for the server.

    Anything that looks like a path, a photo's file name or a user name becomes "…", because a store has not agreed to
    share them. The client's own log has the full error.

    Args:
        error: the exception.

    Returns:
        The exception's class and message.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else without_paths(str(error))
    if isinstance(error, FedShelfError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def without_paths(text: str) -> str:
    """Return `text` on one line of bounded length, without paths, file names and user names."""
    return " ".join(_BARE.sub("…", _QUOTED.sub("…", _USER.sub(r"\1…", text))).split())[:MAX_CHARACTERS]
