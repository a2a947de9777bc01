"""Verify files against a git commit, without git.

A commit's id is the SHA-1 of the commit object, which holds the id of its tree, a hash over all files. It suffices to
request only the commit object (a few hundred bytes), check it against the known id, and compare its tree id with the
one computed from the files. Neither the server nor the archive has to be trusted. (SHA-1 collisions require control
over both files, and do not help against an existing commit.)

Source: git's documentation: gitformat-pack, gitprotocol-v2, gitprotocol-common ("pkt-line"), git-hash-object.
"""

import hashlib
import http.client
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO

from fedshelf.core.errors import DataError, TransportError
from fedshelf.core.system_errors import reason

_BLOCK = 1 << 20
_COMMIT_TYPE = 1
_TIMEOUT_SECONDS = 60
_FLUSH, _DELIMITER = b"0000", b"0001"
MODE_FILE, MODE_EXECUTABLE, MODE_LINK = "100644", "100755", "120000"
_MODE_TREE = "40000"


def blob_id(content: BinaryIO, size: int) -> str:
    """The git id of a file with `size` bytes of content."""
    digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    while block := content.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def tree_id(files: Mapping[str, tuple[str, str]]) -> str:
    """The git id of a tree; `files` maps '/'-separated paths to (mode, blob id)."""
    entries: dict[str, tuple[str, str]] = {}
    below: dict[str, dict[str, tuple[str, str]]] = {}
    for path, entry in files.items():
        head, _, rest = path.partition("/")
        if rest:
            below.setdefault(head, {})[rest] = entry
        else:
            entries[head] = entry
    entries |= {name: (_MODE_TREE, tree_id(members)) for name, members in below.items()}

    def order(name: str) -> bytes:
        return name.encode() + (b"/" if name in below else b"")

    content = b"".join(
        f"{entries[name][0]} {name}\0".encode() + bytes.fromhex(entries[name][1]) for name in sorted(entries, key=order)
    )
    return _object_id("tree", content)


def fetch_tree_id(repository_url: str, commit: str) -> str:
    """Ask a git server (smart HTTP, protocol 2) for the tree of a commit.

    Args:
        repository_url: the repository.
        commit: the commit id.

    Returns:
        The tree id.

    Raises:
        TransportError: the server cannot be reached or does not respond as a git server.
        DataError: the response is not that commit.
    """
    lines = [b"command=fetch\n", b"agent=fedshelf\n", _DELIMITER, b"no-progress\n", b"filter tree:0\n", b"deepen 1\n",
             f"want {commit}\n".encode(), b"done\n", _FLUSH]  # fmt: skip
    body = b"".join(line if line in {_FLUSH, _DELIMITER} else b"%04x%s" % (len(line) + 4, line) for line in lines)
    request = urllib.request.Request(  # noqa: S310  the caller has checked the scheme
        f"{repository_url}/git-upload-pack",
        data=body,
        headers={
            "Content-Type": "application/x-git-upload-pack-request",
            "Accept": "application/x-git-upload-pack-result",
            "Git-Protocol": "version=2",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310
            pack = b"".join(_pack_data(response))
        commits = [content for kind, content in _objects(pack) if kind == _COMMIT_TYPE]
    except (OSError, http.client.HTTPException, ValueError, IndexError, zlib.error) as error:
        raise TransportError(
            f"the git server at '{repository_url}' does not tell commit {commit[:7]}: {reason(error)}"
        ) from error
    for content in commits:
        if _object_id("commit", content) == commit:
            return content.split(b"\n", 1)[0].decode().removeprefix("tree ")
    raise DataError(f"the git server at '{repository_url}' sent something else than commit {commit}")


def _object_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _pack_data(response: BinaryIO) -> Iterator[bytes]:
    """Yield the pack's bytes from the response's packet lines."""
    in_pack = False
    while (head := response.read(4)) != _FLUSH:
        length = int(head, 16)
        if length < 4:
            continue
        line = response.read(length - 4)
        if line.startswith(b"ERR "):
            raise ValueError(line[4:].decode(errors="replace").strip())
        if not in_pack:
            in_pack = line.strip() == b"packfile"
        elif line[0] == 1:
            yield line[1:]
        elif line[0] == 3:
            raise ValueError(line[1:].decode(errors="replace").strip())


def _objects(pack: bytes) -> Iterable[tuple[int, bytes]]:
    """Yield (type, content) of the objects of a pack without deltas, as git sends for a few objects."""
    if pack[:4] != b"PACK":
        raise ValueError("the answer holds no pack")
    count, position = int.from_bytes(pack[8:12], "big"), 12
    for _ in range(count):
        kind = pack[position] >> 4 & 7
        while pack[position] & 0x80:
            position += 1
        inflater = zlib.decompressobj()
        content = inflater.decompress(pack[position + 1 :])
        position = len(pack) - len(inflater.unused_data)
        yield kind, content
