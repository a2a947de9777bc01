"""The workloads' photos: made once from the groceries pack, then memory-mapped by every run.

Shapes: N photos, H height, W width.
"""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.workloads import Workload
from fedshelf.core.errors import DataError

PACK = "groceries-128"
FORMAT = 1  # raise it when preparation changes: folders of another format are not read
Images: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]
Reader: TypeAlias = Callable[[str], bytes]


@dataclass(frozen=True, kw_only=True, eq=False)
class Photos:
    """Memory-mapped photos: images uint8 [N, H, W, 3], labels int64 [N].

    Store number i holds the rows from i · photos_per_store on.
    """

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


def load(folder: Path) -> Photos:
    """Map the photos that `prepare` wrote; pages are shared by all processes that do so, and writes stay private."""
    return Photos(**{name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in Photos.__dataclass_fields__})


def prepare(workload: Workload, *, pack: Path | None, work: Path) -> Path:
    """The folder with the workload's photos, made now if it is not there.

    Args:
        workload: what to prepare for.
        pack: the unpacked pack, its archive, or a folder that holds either; None looks beside the project.
        work: where prepared photos live.

    Raises:
        DataError: there is no pack, or it holds too few photos.
    """
    folder = work / f"{workload.name}-{FORMAT}"
    if folder.is_dir():
        return folder
    read = open_pack(pack)
    make = {"pilot": _whole_photos, "chain": _crops}[workload.name]
    rng = np.random.default_rng(workload.seed)
    train_images, train_labels = make(workload, _entries(read, "train.txt"), read, rng)
    tests = _entries(read, "test.txt")
    chosen = sorted(rng.choice(len(tests), workload.num_test, replace=False).tolist())
    photos = Photos(
        train_images=train_images, train_labels=train_labels,
        test_images=_stack([_resized(_decode(read(tests[i][0])), workload.image_size) for i in chosen], workload),
        test_labels=np.array([tests[i][1] for i in chosen], dtype=np.int64),
    )  # fmt: skip
    _write(photos, folder)
    return folder


def open_pack(pack: Path | None) -> Reader:
    """A function from a path inside the pack to that file's bytes.

    Raises:
        DataError: nothing that looks like the pack was found.
    """
    root = pack or Path(__file__).resolve().parents[1].parent / "shared" / "data"
    for folder in (root, root / PACK):
        if (folder / "train.txt").is_file():
            return lambda path: (folder / path).read_bytes()
    for archive in (root, root / f"{PACK}.tar.gz"):
        if archive.is_file():
            with tarfile.open(archive) as tar:
                files = {m.name.removeprefix(f"{PACK}/"): m for m in tar.getmembers() if m.isfile()}
                content = {name: file.read() for name, m in files.items() if (file := tar.extractfile(m))}
            return content.__getitem__
    raise DataError(
        f"the groceries photos are not at {root}: pilot and chain are measured on them and were skipped. "
        f"Give --photos DIR, the folder that holds {PACK}.tar.gz or the unpacked pack (with its train.txt)"
    )


def _whole_photos(
    workload: Workload, entries: list[tuple[str, int]], read: Reader, rng: np.random.Generator
) -> tuple[Images, Labels]:
    """Every training photo once, resized, dealt at random."""
    count = workload.num_stores * workload.photos_per_store
    if len(entries) < count:
        raise DataError(f"{workload.name} needs {count:,} training photos, and the pack has {len(entries):,}")
    chosen = rng.permutation(len(entries))[:count]
    images = [_resized(_decode(read(entries[i][0])), workload.image_size) for i in chosen]
    return _stack(images, workload), np.array([entries[i][1] for i in chosen], dtype=np.int64)


def _crops(
    workload: Workload, entries: list[tuple[str, int]], read: Reader, rng: np.random.Generator
) -> tuple[Images, Labels]:
    """Square crops of 40 to 100 % of the side, half of them mirrored; each photo is used equally often."""
    decoded = [_decode(read(path)) for path, _ in entries]
    count = workload.num_stores * workload.photos_per_store
    chosen = rng.permutation(np.resize(np.arange(len(entries)), count))
    images = []
    for i in chosen:
        photo = decoded[i]
        side = int(min(photo.size) * rng.uniform(0.4, 1.0))
        left, top = rng.integers(photo.width - side + 1), rng.integers(photo.height - side + 1)
        crop = _resized(photo.crop((int(left), int(top), int(left) + side, int(top) + side)), workload.image_size)
        images.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return _stack(images, workload), np.array([entries[i][1] for i in chosen], dtype=np.int64)


def _entries(read: Reader, listing: str) -> list[tuple[str, int]]:
    """(path, coarse class) of each photo of an official split."""
    rows = [line.split(",") for line in read(listing).decode().splitlines() if line.strip()]
    return [(path.strip(), int(coarse)) for path, _, coarse in rows]


def _decode(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def _resized(photo: Image.Image, size: int) -> Images:
    return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR))


def _stack(images: list[Images], workload: Workload) -> Images:
    return np.stack(images) if images else np.empty((0, workload.image_size, workload.image_size, 3), np.uint8)


def _write(photos: Photos, folder: Path) -> None:
    """Into a temporary folder, renamed when complete: an interrupted preparation leaves nothing half done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    for name in Photos.__dataclass_fields__:
        np.save(temporary / f"{name}.npy", np.ascontiguousarray(getattr(photos, name)))
    try:
        os.rename(temporary, folder)  # noqa: PTH104  on purpose no replace: whoever was first has written the same
    except OSError:
        shutil.rmtree(temporary)
