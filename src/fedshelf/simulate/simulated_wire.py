"""Simulates the wire: message sizes in bytes, and decompression at the clients."""

import weakref
from collections.abc import Hashable, Sequence

from torch import Tensor

from fedshelf.compression.download import MemoryHeldModel, open_broadcast
from fedshelf.core.messages import Broadcast, ClientMessage, Purpose, Ready, ServerMessage, Setup
from fedshelf.serialization import messages as payload

MOST_KNOWN = 10_000


class Wire:
    """The wire between one server and its simulated clients.

    Sizes are those of a deployed run: a client does not receive a blob again that it was sent last time.
    """

    def __init__(self) -> None:
        self._held: dict[str, list[weakref.ref[Tensor]]] = {}  # weak, so as not to keep them alive
        self._model, self._version = MemoryHeldModel(), 0
        self._sizes = Sizes()

    def down(self, client: str, message: ServerMessage) -> tuple[ServerMessage, int]:
        """Return the message as `client` sees it, and its size in bytes."""
        header, body = self._sizes.of(message)
        if not isinstance(message, Broadcast):
            return message, header + body
        if not message.is_plain:
            return self._opened(message), header + body
        holds = self._holds(client, [message.params, *message.auxiliary.values()])
        return message, header if holds else header + body

    def up(self, message: ClientMessage) -> int:
        """Return the size of a client's answer in bytes."""
        return sum(self._sizes.of(message))

    def _opened(self, message: Broadcast) -> Broadcast:
        """Decode each model once for all clients, since each would decode the same.

        An older model (a resumed asynchronous run asks for what was in flight) is sent whole, and later differences are
        not based on it.
        """
        version = message.key.round - (message.purpose is Purpose.TRAIN)
        if version < self._version:
            return open_broadcast(message, MemoryHeldModel())
        self._version = version
        return open_broadcast(message, self._model)

    def _holds(self, client: str, vectors: Sequence[Tensor]) -> bool:
        """Whether the client was sent these vectors last time; records them as sent."""
        held = self._held.get(client, [])
        self._held[client] = [weakref.ref(vector) for vector in vectors]
        return len(held) == len(vectors) and all(
            reference() is vector for reference, vector in zip(held, vectors, strict=True)
        )


class Sizes:
    """`payload.size`, cached for messages that have the same size."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[int, int]] = {}

    def of(self, message: ServerMessage | ClientMessage) -> tuple[int, int]:
        """Return the sizes in bytes of the header and the blob."""
        key = _key(message)
        if key is None:
            return payload.size(message)
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = payload.size(message)
        return self._known[key]


def _key(message: ServerMessage | ClientMessage) -> Hashable | None:
    """Return everything that a message's size depends on; None if another message is unlikely to match."""
    if isinstance(message, Setup | Ready):
        return message
    if isinstance(message, Broadcast) and message.is_plain:
        vectors = tuple((name, vector.numel()) for name, vector in message.auxiliary.items())
        numbers = (message.purpose, message.client_lr, message.params.numel())
        return message.key, message.counted, numbers, vectors
    return None
