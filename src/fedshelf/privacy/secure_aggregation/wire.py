"""Messages as JSON text, for the headers of the transport and for the server's record. Masked vectors travel apart.

The text of another peer is limited before it is parsed, and every field has to be there, of its type, and known. Errors
name fields and never values, which may be secret.
"""

from functools import cache, lru_cache
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedshelf.core.errors import RefusedError

MAX_CHARACTERS = 4 << 20
"""Of a message. The roster of 1,000 members has 0.4 million, the record of a server more."""
_CONFIG = ConfigDict(
    strict=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64", hide_input_in_errors=True
)  # fmt: skip
_MOST_PROBLEMS = 3
Message = TypeVar("Message")


def to_text(message: object) -> str:
    """Encode a message of this package, or a `ServerRecord`."""
    return _adapter(cast(Any, type(message))).dump_json((message,)).decode()


def from_text(text: str, kind: type[Message], *, most: int = MAX_CHARACTERS) -> Message:
    """Decode a message.

    Args:
        text: from any source, untrusted.
        kind: the class that is expected.
        most: the longest text to read.

    Raises:
        RefusedError: the text is too long, or not such a message.
    """
    what = kind.__name__
    if len(text) > most:
        raise RefusedError(
            f"a message of secure aggregation ({what}) of {len(text):,} characters: the limit is {most:,}"
        )
    try:
        message: Message = _adapter(cast(Any, kind)).validate_json(text)[0]
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        told = [f"{'.'.join(map(str, each['loc'][1:3]))[:80]}: {each['msg'][:80]}" for each in found[:_MOST_PROBLEMS]]
        raise RefusedError(f"a message of secure aggregation ({what}) is malformed: {'; '.join(told)}") from None
    return message


def from_common_text(text: str, kind: type[Message]) -> Message:
    """`from_text` of a message that all members get: simulated ones, of one process, share what was made of it."""
    return cast(Message, _last_common(text, cast(Any, kind)))


@lru_cache(maxsize=1)
def _last_common(text: str, kind: Any) -> object:
    return from_text(text, kind)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(tuple[kind], config=_CONFIG)  # of a tuple: a dataclass takes no configuration
