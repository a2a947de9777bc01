"""`fedshelf data partition`: distribute one folder of photos to stores, to try federated training without real stores.

Modes::

    iid         every store gets the same distribution
    dirichlet   per class, shares over stores ~ Dir(alpha): the smaller alpha, the more the stores differ
    assortment  every store sells about a third of the classes, and gets photos of those only
    feature     the same distribution, but each store's photos are rendered by its own camera (see `camera`)

Source: Dirichlet over stores per class as in Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution
for Federated Visual Classification", 2019 (arXiv:1909.06335), in the per-class form of Yurochkin et al., "Bayesian
Nonparametric Federated Learning of Neural Networks", 2019 (arXiv:1905.12022).
"""

import csv
import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np

from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.text import counted, to_filesystem
from fedshelf.data.camera import Camera
from fedshelf.data.decode import UnusablePhotoError
from fedshelf.data.filesystem import cause, folder_problem, reading, whole_folder
from fedshelf.data.folder import has_split
from fedshelf.data.photo_files import Photo, is_photo_name, list_photos

_FEWEST_PHOTOS = 5
_REDRAWS = 1_000
_ASSORTMENT_SHARE = 1 / 3
_PROBLEMS_NAMED = 5

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class Mode(StrEnum):
    """How photos are distributed (see the module's docstring)."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    ASSORTMENT = "assortment"
    FEATURE = "feature"


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The photos of each store.

    Attributes:
        stores: by store, '/'-separated paths below the pack.
        cameras: by store, its camera, if photos are altered.
    """

    stores: Mapping[str, tuple[str, ...]]
    cameras: Mapping[str, Camera] = field(default_factory=dict)


def deal(pack: Path, *, mode: Mode, num_stores: int, alpha: float, seed: int) -> Partition:
    """Distribute the photos of a pack: all of them, or only those below `train/` if it has that.

    Args:
        pack: one folder per class, with any nesting, optionally below `train/`.
        mode: see the module's docstring.
        num_stores: number of stores, named store-1 and so on.
        alpha: parameter of the Dirichlet distribution; ignored by other modes.
        seed: the same seed gives the same partition.

    Raises:
        DataError: there are no photos, or too few for every store to get at least a few.
        UsageError: a number is out of range.
    """
    if num_stores < 1:
        raise UsageError(f"--stores is {num_stores}: give at least 1")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"--alpha is {alpha}: give a number above 0 (0.1 is very uneven, 100 nearly even)")
    if problem := folder_problem(pack):
        raise DataError(f"photo folder '{pack}': {problem}")
    top = pack / "train" if has_split(pack) else pack
    listing = list_photos(top)
    for finding in listing.findings():
        logger.warning(finding)
    photos = listing.photos
    fewest = min(_FEWEST_PHOTOS, len(photos) // num_stores)
    if fewest < 1:
        raise DataError(
            f"'{top}' has {counted(len(photos), 'photo')} in class folders: too few for {counted(num_stores, 'store')}"
        )
    rng = np.random.default_rng(seed)
    if mode is Mode.DIRICHLET:
        store_of = _redraw_until_enough(fewest, num_stores, lambda: _dirichlet(photos, num_stores, alpha, rng), alpha)
    elif mode is Mode.ASSORTMENT:
        store_of = _redraw_until_enough(fewest, num_stores, lambda: _assortment(photos, num_stores, rng), alpha)
    else:
        store_of = _evenly(photos, num_stores, rng)
    names = [f"store-{number:0{len(str(num_stores))}}" for number in range(1, num_stores + 1)]
    members: dict[str, list[str]] = {name: [] for name in names}
    for photo, store in zip(photos, store_of, strict=True):
        members[names[store]].append(photo.path.relative_to(pack).as_posix())
    cameras = {name: Camera.draw(rng) for name in names} if mode is Mode.FEATURE else {}
    return Partition(stores={name: tuple(paths) for name, paths in members.items()}, cameras=cameras)


def read_assignment(path: Path, pack: Path) -> Partition:
    """Read a partition from a CSV file with the columns `photo` (a path below the pack) and `store`.

    Raises:
        DataError: the file cannot be read, lacks a column, or names photos twice, photos that do not exist or are
            outside the pack or in no class folder, or store names that are invalid as folder names; several are
            reported at once.
    """
    with reading(f"assignment file '{path}'"), path.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = list(csv.DictReader(file))
        except csv.Error as error:
            raise DataError(f"assignment file '{path}' is not a CSV table: {error}") from error
    columns = set(rows[0]) if rows else set()
    if not rows:
        raise DataError(f"assignment file '{path}' has no rows: give the columns photo,store and one line per photo")
    if missing := {"photo", "store"} - columns:
        raise DataError(f"assignment file '{path}' has no column '{min(missing)}': its first line must be photo,store")
    problems: list[str] = []
    depth = 3 if has_split(pack) else 2
    stores: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for line, row in enumerate(rows, start=2):
        photo, store = to_filesystem((row["photo"] or "").strip()), (row["store"] or "").strip()
        problem = _row_problem(photo, store, pack, seen, depth)
        seen.add(photo)
        if problem:
            problems.append(f"line {line}: {problem}")
        stores[store].append(photo)
    if problems:
        rest = len(problems) - _PROBLEMS_NAMED
        more = f" (and {rest} more)" if rest > 0 else ""
        raise DataError(
            f"assignment file '{path}' does not fit '{pack}': {'; '.join(problems[:_PROBLEMS_NAMED])}{more}"
        )
    return Partition(stores={name: tuple(stores[name]) for name in sorted(stores)})


def write_stores(partition: Partition, pack: Path, out: Path, *, progress: Progress = lambda done, total: None) -> None:
    """Create `out/STORE/CLASS PATH/FILE`, completely or not at all; `train/`, if the pack has a split, is dropped.

    Photos are hard links if the file system supports them, otherwise symbolic links, otherwise copies; altered ones
    (mode feature) are new files. Unreadable photos are left out with a warning.

    Args:
        partition: the photos of each store.
        pack: the folder of photos.
        out: created; must be missing or empty.
        progress: called with the number of photos written and the total.

    Raises:
        DataError: `out` exists and is not empty, two photos would get the same path, or writing fails.
    """
    total = sum(len(members) for members in partition.stores.values())
    split = has_split(pack)
    done = 0
    with whole_folder(out) as work:
        for store, members in partition.stores.items():
            camera = partition.cameras.get(store)
            for member in members:
                target = work / store / (member.partition("/")[2] if split else member)
                if camera is not None and target.suffix.lower() not in {".jpg", ".jpeg"}:
                    target = target.with_name(f"{target.name}.jpg")
                if os.path.lexists(target):
                    raise DataError(f"two photos of store '{store}' would become '{target.relative_to(work)}'")
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    source = Path(os.path.realpath(pack / member, strict=True))
                    content = None if camera is None else camera.rerender(source.read_bytes())
                except (OSError, UnusablePhotoError) as error:
                    why = cause(error) if isinstance(error, OSError) else error
                    logger.warning("photo '%s' cannot be used and is left out: %s", pack / member, why)
                else:
                    _link(source, target) if content is None else target.write_bytes(content)
                done += 1
                progress(done, total)


def _row_problem(photo: str, store: str, pack: Path, seen: set[str], depth: int) -> str:
    parts = photo.split("/")
    if not photo or photo.startswith("/") or not {"", ".", ".."}.isdisjoint(parts):
        return f"'{photo}' is not a path below the pack"
    if not store or store.startswith(".") or "/" in store or "\0" in store:
        return f"'{store}' cannot be a store's name"
    if photo in seen:
        return f"photo '{photo}' is there twice"
    if not is_photo_name(parts[-1]) or not (pack / photo).is_file():
        return f"there is no photo '{photo}'"
    if len(parts) < depth:
        return f"photo '{photo}' lies in no class folder"
    return ""


def _by_class(photos: Sequence[Photo]) -> dict[str, list[int]]:
    classes: dict[str, list[int]] = defaultdict(list)
    for position, photo in enumerate(photos):
        classes[photo.class_path].append(position)
    return classes


def _evenly(photos: Sequence[Photo], num_stores: int, rng: np.random.Generator) -> list[int]:
    """Deal round-robin, class by class, so that every store gets the same distribution, to one photo."""
    store_of = [0] * len(photos)
    turn = 0
    for positions in _by_class(photos).values():
        for position in rng.permutation(positions):
            store_of[position] = turn % num_stores
            turn += 1
    return store_of


def _dirichlet(photos: Sequence[Photo], num_stores: int, alpha: float, rng: np.random.Generator) -> list[int]:
    store_of = [0] * len(photos)
    for positions in _by_class(photos).values():
        cuts = np.cumsum(rng.dirichlet(np.full(num_stores, alpha)))[:-1] * len(positions)
        shuffled = rng.permutation(positions)
        for store, part in enumerate(np.split(shuffled, np.round(cuts).astype(int))):
            for position in part:
                store_of[position] = store
    return store_of


def _assortment(photos: Sequence[Photo], num_stores: int, rng: np.random.Generator) -> list[int]:
    """Assign each class to about a third of the stores (at least one).

    Stores with the fewest classes so far come first.
    """
    store_of = [0] * len(photos)
    num_sold = np.zeros(num_stores, int)
    classes = _by_class(photos)
    num_sellers = max(1, round(num_stores * _ASSORTMENT_SHARE))
    for class_path in rng.permutation(sorted(classes)):
        sellers = np.lexsort((rng.random(num_stores), num_sold))[:num_sellers]
        num_sold[sellers] += 1
        for turn, position in enumerate(rng.permutation(classes[str(class_path)])):
            store_of[position] = int(sellers[turn % num_sellers])
    return store_of


def _redraw_until_enough(fewest: int, num_stores: int, draw: Callable[[], list[int]], alpha: float) -> list[int]:
    """Draw until every store has at least `fewest` photos."""
    for _ in range(_REDRAWS):
        store_of = draw()
        if min(np.bincount(store_of, minlength=num_stores)) >= fewest:
            return store_of
    raise DataError(
        f"{_REDRAWS} draws left some of {counted(num_stores, 'store')} with fewer photos than {fewest}: "
        f"give fewer --stores, or a larger --alpha than {alpha}"
    )


def _link(source: Path, target: Path) -> None:
    """Create `target` from `source` in the cheapest way that the file system supports."""
    for way in (os.link, os.symlink):
        try:
            way(source, target)
        except OSError:
            continue
        return
    shutil.copy2(source, target)
