"""Bodies that clients may fetch: to each node the newest that was sent to it, and no other."""

from fedshelf.serialization.body import Body


class Outgoing:
    """Any thread may call: each operation is a single one on a dictionary."""

    def __init__(self) -> None:
        self._bodies: dict[int, Body] = {}

    def publish(self, node_id: int, body: Body) -> None:
        """From now on the node may fetch `body`, in place of the one before: a newer task replaces an older."""
        self._bodies[node_id] = body

    def withdraw(self, node_id: int) -> None:
        """The node has gone."""
        self._bodies.pop(node_id, None)

    def find(self, node_id: int, digest: str) -> Body | None:
        """The body named `digest`, if it is this node's to have."""
        body = self._bodies.get(node_id)
        return body if body is not None and body.digest == digest else None
