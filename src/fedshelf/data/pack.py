"""A pack: decoded photos in one file, uint8 [N, S, S, 3], nothing else. Never changed once it has its name.

Packs are written with plain writes rather than through a map: on a full disk, a write fails with an error, but a map
kills the process.
"""

import os
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SUFFIX = ".rgb"
_TEMPORARY_SUFFIX = ".tmp"
_LEFTOVER_SECONDS = 86_400
_CHECK_BYTES = 1 << 24


class PackWriter:
    """Writes rows to a temporary file in `folder`; leaving the context without `publish` removes it.

    Args:
        folder: the folder of the pack.
    """

    def __init__(self, folder: Path) -> None:
        handle, name = tempfile.mkstemp(dir=folder, suffix=_TEMPORARY_SUFFIX)
        self._temporary = Path(name)
        self._file = os.fdopen(handle, "wb")
        self._checksum = 0

    def __enter__(self) -> "PackWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, row: NDArray[np.uint8]) -> None:
        """Append one image [S, S, 3]."""
        data = np.ascontiguousarray(row).data.cast("B")
        self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)

    def publish(self, path: Path) -> int:
        """Rename the finished file to `path` and return its checksum."""
        self._file.flush()
        self._temporary.replace(path)
        return self._checksum


def open_pack(path: Path, image_size: int, checksum: int) -> NDArray[np.uint8] | None:
    """Map a pack read-only.

    Args:
        path: the file.
        image_size: S.
        checksum: checksum of its bytes as written.

    Returns:
        The photos [N, S, S, 3]; None if the file is missing or damaged.
    """
    try:
        rows, rest = divmod(path.stat().st_size, image_size * image_size * 3)
        if rest or not rows:
            return None
        images: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r", shape=(rows, image_size, image_size, 3))
    except FileNotFoundError:
        return None
    flat = images.reshape(-1)
    actual = 0
    for start in range(0, flat.size, _CHECK_BYTES):
        actual = zlib.crc32(flat[start : start + _CHECK_BYTES].data, actual)
    return images if actual == checksum else None


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a crash left behind; recent ones may belong to a live process."""
    for path in folder.glob(f"*{_TEMPORARY_SUFFIX}"):
        try:
            if path.stat().st_mtime < time.time() - _LEFTOVER_SECONDS:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            continue
