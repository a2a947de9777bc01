"""What simulated messages would be on the wire: how many bytes, and what clients make of compressed ones."""

import weakref
from collections.abc import Hashable, Sequence

from torch import Tensor

from fedshelf.compression.download import MemoryHeldModel, open_broadcast
from fedshelf.core.messages import Broadcast, ClientMessage, Purpose, Ready, ServerMessage, Setup
from fedshelf.serialization import messages as payload

MOST_KNOWN = 10_000


class Wire:
    """Between one server and its simulated clients.

    Bytes are those that a deployed run would put on the wire: a body that a client was sent last time is not sent to
    it again.
    """

    def __init__(self) -> None:
        self._held: dict[str, list[weakref.ref[Tensor]]] = {}  # what only stores hold is not kept alive for that
        self._model, self._version = MemoryHeldModel(), 0
        self._sizes = Sizes()

    def down(self, client: str, message: ServerMessage) -> tuple[ServerMessage, int]:
        """What `client` is to do, and the bytes that it takes to tell it so."""
        header, body = self._sizes.of(message)
        if not isinstance(message, Broadcast):
            return message, header
        if not message.is_plain:
            return self._opened(message), header + body
        holds = self._holds(client, [message.params, *message.auxiliary.values()])
        return message, header if holds else header + body

    def up(self, message: ClientMessage) -> int:
        """The bytes of a client's answer."""
        return sum(self._sizes.of(message))

    def _opened(self, message: Broadcast) -> Broadcast:
        """Each model is decoded once for all: every client would decode the same. One that is older than others (a
        resumed asynchronous run asks for what was out) is sent whole, and the next differences do not begin at it."""
        version = message.key.round - (message.purpose is Purpose.TRAIN)
        if version < self._version:
            return open_broadcast(message, MemoryHeldModel())
        self._version = version
        return open_broadcast(message, self._model)

    def _holds(self, client: str, vectors: Sequence[Tensor]) -> bool:
        """Whether these are what the client was sent last time; from now on they are."""
        held = self._held.get(client, [])
        self._held[client] = [weakref.ref(vector) for vector in vectors]
        return len(held) == len(vectors) and all(
            reference() is vector for reference, vector in zip(held, vectors, strict=True)
        )


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
