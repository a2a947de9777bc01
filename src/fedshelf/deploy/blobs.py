"""What travels beside the engine, at the server: bodies that clients may fetch, and bodies that they bring."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedshelf.core.encoded import Encoded
from fedshelf.core.messages import Broadcast
from fedshelf.deploy.incoming import Incoming
from fedshelf.deploy.outgoing import Outgoing

# Bytes that an answer's body may have: several vectors as large as the model, and some more.
UPLOAD_MODELS = 4
UPLOAD_SLACK = 64 << 20
UPLOAD_UNKNOWN = 1 << 30  # where no model has been sent yet: clients of a resumed run may hold it already


@dataclass(frozen=True, kw_only=True, slots=True)
class Blobs:
    """Shared by the transport, which says who may fetch and bring what, and the routes, which move the bytes."""

    outgoing: Outgoing
    incoming: Incoming

    @classmethod
    def below(cls, directory: Path) -> Self:
        """Uploads come into `directory`."""
        return cls(outgoing=Outgoing(), incoming=Incoming(directory))

    def forget(self, node_id: int) -> None:
        """The node has gone."""
        self.outgoing.withdraw(node_id)
        self.incoming.forget(node_id)


def model_bytes(message: Broadcast) -> int:
    """Bytes of the model as float32 values; 0 where the message does not say."""
    if message.is_plain:
        return message.params.numel() * message.params.element_size()
    sizes = [4 * vector.size for vector in message.vectors.values() if isinstance(vector, Encoded)]
    return sum(sizes) // max(1, len(message.deltas))


def most_of_upload(largest_model: int) -> int:
    """The most bytes that an answer may have; `largest_model` in bytes, 0 if none was sent."""
    return UPLOAD_MODELS * largest_model + UPLOAD_SLACK if largest_model else UPLOAD_UNKNOWN
