"""The packs of groceries photos, and the arrays that *pilot* and *chain* train on.

Shapes: N photos, H height, W width.
"""

import contextlib
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.workloads import Workload
from fedshelf.core.errors import DataError

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
PACK, SMALL_PACK = "groceries-128", "groceries-small"
FORMAT = 1  # increase it when the preparation changes: folders of another format are not read
Images: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]


class PhotosMissingError(DataError):
    """The photos that a benchmark needs are not on this machine: it is skipped."""

    exit_code = 77


@dataclass(frozen=True, kw_only=True, eq=False)
class Photos:
    """Memory-mapped photos. Store number i holds the rows from i · photos_per_store on.

    Attributes:
        train_images: uint8 [N, H, W, 3].
        train_labels: int64 [N].
        test_images: uint8 [N, H, W, 3].
        test_labels: int64 [N].
    """

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


def load(folder: Path) -> Photos:
    """Map the arrays that `prepare` wrote; all processes share their pages, and writes stay private."""
    return Photos(**{name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in Photos.__dataclass_fields__})


def unpack(photos: Path, work: Path, name: str = PACK) -> Path:
    """Return the folder of a pack, unpacked below `work` if only its archive is there.

    Args:
        photos: The folder that holds the pack, unpacked or as an archive.
        work: The folder for unpacked archives.
        name: The pack's name.

    Raises:
        PhotosMissingError: Neither the pack nor its archive is there.
    """
    for folder in (photos / name, work / name):
        if folder.is_dir():
            return folder
    archive = next((path for path in (photos / f"{name}.tar.gz", photos / f"{name}.tar") if path.is_file()), None)
    if archive is None:
        raise PhotosMissingError(
            f"skipped: '{photos}' holds no {name}.tar.gz, {name}.tar or {name}/. "
            "Give the folder that holds the groceries photos with --photos"
        )
    work.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=work) as fresh:
        tar.extractall(fresh, filter="data")
        (Path(fresh) / name).rename(work / name)
    return work / name


def link_stores(folder: Path, stores: Mapping[str, Path]) -> Path:
    """Make a folder of stores that holds links to the given folders, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in stores.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target.resolve(), target_is_directory=True)
    return folder


def write_catalogue(path: Path, tested: Path) -> Path:
    """Write the catalogue of all products in a folder of test photos, and return its path."""
    names = sorted({photo.parent.name for photo in tested.rglob("*.*")})
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return path


def prepare(workload: Workload, *, photos: Path, work: Path) -> Path:
    """Return the folder with the workload's arrays, made now if it is not there.

    Args:
        workload: What to prepare for.
        photos: The folder that holds the groceries-128 pack.
        work: Where prepared arrays are kept.

    Raises:
        DataError: There is no pack, or it holds too few photos.
    """
    folder = work / f"{workload.name}-{FORMAT}"
    if folder.is_dir():
        return folder
    pack = unpack(photos, work)
    make = {"pilot": _whole_photos, "chain": _crops}[workload.name]
    rng = np.random.default_rng(workload.seed)
    train_images, train_labels = make(workload, _entries(pack / "train.txt"), rng)
    tests = _entries(pack / "test.txt")
    chosen = sorted(rng.choice(len(tests), workload.num_test, replace=False).tolist())
    arrays = Photos(
        train_images=train_images, train_labels=train_labels,
        test_images=_stack([_resized(_decode(tests[i][0]), workload.image_size) for i in chosen], workload),
        test_labels=np.array([tests[i][1] for i in chosen], dtype=np.int64),
    )  # fmt: skip
    _write(arrays, folder)
    return folder


def _whole_photos(
    workload: Workload, entries: list[tuple[Path, int]], rng: np.random.Generator
) -> tuple[Images, Labels]:
    """Every training photo once, resized, dealt at random."""
    count = workload.num_stores * workload.photos_per_store
    if len(entries) < count:
        raise DataError(f"{workload.name} needs {count:,} training photos, and the pack has {len(entries):,}")
    chosen = rng.permutation(len(entries))[:count]
    images = [_resized(_decode(entries[i][0]), workload.image_size) for i in chosen]
    return _stack(images, workload), np.array([entries[i][1] for i in chosen], dtype=np.int64)


def _crops(workload: Workload, entries: list[tuple[Path, int]], rng: np.random.Generator) -> tuple[Images, Labels]:
    """Square crops of 40 to 100 % of the side, half of them mirrored; each photo is used equally often."""
    decoded = [_decode(path) for path, _ in entries]
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


def _entries(listing: Path) -> list[tuple[Path, int]]:
    """(path, coarse class) of each photo of an official split."""
    rows = [line.split(",") for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [(listing.parent / path.strip(), int(coarse)) for path, _, coarse in rows]


def _decode(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def _resized(photo: Image.Image, size: int) -> Images:
    return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR))


def _stack(images: list[Images], workload: Workload) -> Images:
    return np.stack(images) if images else np.empty((0, workload.image_size, workload.image_size, 3), np.uint8)


def _write(photos: Photos, folder: Path) -> None:
    """Write into a temporary folder and rename that: an interrupted preparation leaves nothing incomplete."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        complete = Path(temporary) / folder.name
        complete.mkdir()
        for name in Photos.__dataclass_fields__:
            np.save(complete / f"{name}.npy", np.ascontiguousarray(getattr(photos, name)))
        with contextlib.suppress(OSError):  # another process has written the same
            complete.rename(folder)
