"""What travels beside the engine, at the server: bodies that clients may fetch, and bodies that they bring."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedshelf.deploy.incoming import Incoming
from fedshelf.deploy.outgoing import Outgoing


@dataclass(frozen=True, kw_only=True, slots=True)
class Bodies:
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
