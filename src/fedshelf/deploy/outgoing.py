"""Bodies that clients may fetch: to each node the newest that was sent to it, and no other."""

from fedshelf.serialization.blob import Blob


class Outgoing:
    """Any thread may call: each operation is a single one on a dictionary."""

    def __init__(self) -> None:
        self._blobs: dict[int, Blob] = {}

    def publish(self, node_id: int, blob: Blob) -> None:
        """From now on the node may fetch `blob`, in place of the one before: a newer task replaces an older."""
        self._blobs[node_id] = blob

    def withdraw(self, node_id: int) -> None:
        """The node has gone."""
        self._blobs.pop(node_id, None)

    def find(self, node_id: int, digest: str) -> Blob | None:
        """The body named `digest`, if it is this node's to have."""
        blob = self._blobs.get(node_id)
        return blob if blob is not None and blob.digest == digest else None
