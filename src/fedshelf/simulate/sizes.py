"""How many bytes a deployed run would send: the same messages go to many clients, and are measured once."""

from collections.abc import Hashable

from fedshelf.core.messages import Broadcast, ClientMessage, Ready, ServerMessage, Setup
from fedshelf.serialization import messages as payload

MOST_KNOWN = 10_000


class Sizes:
    """`payload.size`, remembered for messages that differ in nothing that it depends on."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[int, int]] = {}

    def of(self, message: ServerMessage | ClientMessage) -> tuple[int, int]:
        """Bytes of (header, body)."""
        key = _key(message)
        if key is None:
            return payload.size(message)
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = payload.size(message)
        return self._known[key]


def _key(message: ServerMessage | ClientMessage) -> Hashable | None:
    """All that the size of a message depends on; None where no other message is likely to have the same."""
    if isinstance(message, Setup | Ready):
        return message
    if isinstance(message, Broadcast) and message.is_plain:
        vectors = tuple((name, vector.numel()) for name, vector in message.auxiliary.items())
        numbers = (message.purpose, message.client_lr, message.params.numel())
        return message.key, message.counted, numbers, vectors
    return None
