"""`fedshelf data …`: deal, draw, download and check photos."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedshelf.core.errors import UsageError
from fedshelf.core.text import from_filesystem

if TYPE_CHECKING:  # the rooms below need seconds to import: inside the commands only
    from fedshelf.data.health import Health

app = typer.Typer(
    no_args_is_help=True, help="Deal photos to stores, draw a demo set, download a public one, check one."
)

_PhotosArgument = Annotated[Path, typer.Argument(help="Folder with one folder of photos per class.")]
_Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command(epilog="Example: fedshelf data partition photos/ --out stores/ --mode dirichlet --stores 8 --alpha 0.3")
def partition(
    photos: _PhotosArgument,
    out: Annotated[Path, typer.Option(help="Folder to make: STORES/<store>/<class>/<photo>.")],
    mode: Annotated[
        Literal["iid", "dirichlet", "assortment", "feature"],
        typer.Option(help="Same mix for all; uneven mix; a third of the classes each; same mix, other cameras."),
    ] = "dirichlet",
    stores: Annotated[int, typer.Option(min=1, help="Number of stores.")] = 8,
    alpha: Annotated[float, typer.Option(help="Evenness of mode dirichlet: 0.1 very uneven, 100 nearly even.")] = 0.3,
    seed: _Seed = 0,
    assignment: Annotated[
        Path | None, typer.Option(help="CSV with the columns photo,store instead of a mode; paths below PHOTOS.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Deal one folder of photos to stores.

    Photos become links where the file system allows. Where PHOTOS has a train/ folder, only that is dealt.
    """
    from fedshelf.data.partition import Mode, deal, read_assignment, write_stores

    if assignment is not None:
        dealt = read_assignment(assignment, photos)
    else:
        dealt = deal(photos, mode=Mode(mode), num_stores=stores, alpha=alpha, seed=seed)
    with _counting("Dealing photos") as progress:
        write_stores(dealt, photos, out, progress=progress)
    counts = {store: len(members) for store, members in dealt.stores.items()}
    if as_json:
        print(json.dumps({"out": from_filesystem(str(out)), "stores": counts}))
        return
    print(f"{sum(counts.values())} photos dealt to {len(counts)} stores in '{out}':")
    for store, count in counts.items():
        print(f"  {store}  {count}")
    print(f"Next: fedshelf simulate --data-dir {out} --rounds 10")


@app.command("make-demo", epilog="Example: fedshelf data make-demo demo/ --seed 1")
def make_demo(
    out: Annotated[Path, typer.Argument(help="Folder to make: stores/ and test/ in it.")],
    seed: _Seed = 0,
    photos_per_class: Annotated[int, typer.Option(min=5, help="Photos of each product over all stores.")] = 90,
    image_size: Annotated[int, typer.Option(min=32, help="Side of the photos in pixels.")] = 96,
    as_json: _Json = False,
) -> None:
    """Draw a small synthetic product-photo set: five stores, twelve products, and test photos."""
    from fedshelf.data.demo import make_demo as draw

    with _counting("Drawing photos") as progress:
        made = draw(out, seed=seed, photos_per_class=photos_per_class, image_size=image_size, progress=progress)
    if as_json:
        print(
            json.dumps(
                {
                    "stores": from_filesystem(str(made.stores)),
                    "test": from_filesystem(str(made.test)),
                    "num_train": made.num_train,
                    "num_test": made.num_test,
                    "classes": made.classes,
                }
            )
        )
        return
    print(f"{made.num_train} photos in {len(made.classes)} stores and {made.num_test} test photos, all drawn: '{out}'")
    print(f"Next: fedshelf simulate --data-dir {made.stores} --test-dir {made.test} --rounds 10")


@app.command(epilog="Example: fedshelf data fetch groceries --out groceries/")
def fetch(
    name: Annotated[str, typer.Argument(help="What to fetch: groceries.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make; default: the name.")] = None,
    sha256: Annotated[
        str | None, typer.Option(help="Checksum of the archive; without it the files are proven by the git commit.")
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Address of a mirror instead of GitHub.")] = None,
    as_json: _Json = False,
) -> None:
    """Download a public photo set (needs internet; goes on where it was interrupted).

    groceries: the Grocery Store Dataset, 5,125 photos of 81 products taken in real grocery stores (MIT license).
    """
    from fedshelf.data.fetch import GROCERIES
    from fedshelf.data.fetch import fetch as get

    if name != "groceries":
        raise UsageError(f"there is no photo set '{name}' to fetch: 'groceries' is the one known")
    target = out or Path(name)
    with _downloading("Downloading") as progress:
        fetched = get(GROCERIES, target, sha256=sha256, base_url=base_url, progress=progress)
    if as_json:
        print(
            json.dumps(
                {"photos": from_filesystem(str(fetched.photos)), "sha256": fetched.sha256, "proof": fetched.proof}
            )
        )
        return
    print(f"Photos in '{fetched.photos}', proven by {fetched.proof} (the archive's SHA-256: {fetched.sha256})")
    print(f"Please cite: {GROCERIES.citation}")
    print(f"Next: fedshelf data partition {fetched.photos} --out stores/")


@app.command(epilog="Example: fedshelf data check stores/store-1")
def check(
    photos: _PhotosArgument,
    val_fraction: Annotated[float, typer.Option(help="Share kept for validation where there is no val/ folder.")] = 0.1,
    seed: _Seed = 0,
    fewest: Annotated[int, typer.Option(min=1, help="Name classes with fewer training photos than this.")] = 10,
    as_json: _Json = False,
) -> None:
    """Report the health of a photo folder, class by class: counts, unusable files, copies, tiny photos, imbalance."""
    from fedshelf.data.health import check as examine

    with _counting("Looking at photos") as progress:
        health = examine(photos, val_fraction=val_fraction, seed=seed, fewest=fewest, progress=progress)
    if as_json:
        print(json.dumps(health.to_dict()))
    else:
        _print_health(health)


def _print_health(health: "Health") -> None:
    console = Console()
    table = Table("class", title=health.root, title_justify="left")
    for column in ("train", "validation", "unusable", "tiny"):
        table.add_column(column, justify="right")
    for entry in health.classes:
        table.add_row(entry.path, *(str(n or "") for n in (entry.train, entry.validation, entry.unusable, entry.tiny)))
    console.print(table)
    print(f"{len(health.classes)} classes, {health.num_train} training and {health.num_validation} validation photos")
    for path, reason in health.unusable.items():
        print(f"  unusable  '{path}': {reason}")
    for duplicate in health.duplicates:
        what = "in several classes" if len(duplicate.classes) > 1 else "the same"
        print(f"  {what}  {', '.join(duplicate.files)}")
    for finding in health.findings:
        print(f"! {finding}")
    if not health.findings:
        print("Nothing to complain about.")


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _downloading(what: str) -> Iterator[Callable[[int, int | None], None]]:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
