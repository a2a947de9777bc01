"""What simulated messages would be on the wire: how many bytes, and what clients make of compressed ones."""

import weakref
from collections.abc import Sequence

from torch import Tensor

from fedshelf.core.messages import Broadcast, ClientMessage, Purpose, ServerMessage
from fedshelf.rounds.download import MemoryHeldModel, open_broadcast
from fedshelf.simulate.sizes import Sizes


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
