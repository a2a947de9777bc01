"""The `fedshelf data` commands: partition, generate, download and check photos, and generate sales."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo, echo_command, print_json, progress_bar
from fedshelf.cli.tables import Column, Table
from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.settings import MAX_INTEGER, MAX_SEED
from fedshelf.core.text import counted, from_filesystem

if TYPE_CHECKING:  # imported inside the commands, because these packages need seconds to import
    from fedshelf.data.health import Health

app = Commands(help="Partition photos over stores, check them, download or draw some.")

_PhotosArgument = Annotated[Path, typer.Argument(help="Folder with one folder of photos per class.")]
_Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of everything random.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command(epilog="Example: fedshelf data partition photos/ --out stores/ --mode dirichlet --stores 8 --alpha 0.3")
def partition(
    photos: _PhotosArgument,
    out: Annotated[Path, typer.Option(help="Folder to create, with one folder per store.")],
    mode: Annotated[
        Literal["iid", "dirichlet", "assortment", "feature"],
        typer.Option(
            help="Same mix of classes everywhere (iid), uneven mix (dirichlet), a third of the classes each "
            "(assortment), or same mix but different cameras (feature)."
        ),
    ] = "dirichlet",
    stores: Annotated[int, typer.Option(min=1, max=MAX_INTEGER, help="Number of stores.")] = 8,
    alpha: Annotated[
        float, typer.Option(help="Evenness of --mode dirichlet: 0.1 is very uneven, 100 nearly even.")
    ] = 0.3,
    seed: _Seed = 0,
    assignment: Annotated[
        Path | None, typer.Option(help="CSV with the columns photo,store, instead of --mode. Paths are below PHOTOS.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Partition one folder of photos over stores.

    Photos are linked if the file system allows it, and copied otherwise. If PHOTOS has a train/ folder, only that is
    used.
    """
    from fedshelf.data.partition import Mode, deal, read_assignment, write_stores

    if assignment is not None:
        dealt = read_assignment(assignment, photos)
    else:
        dealt = deal(photos, mode=Mode(mode), num_stores=stores, alpha=alpha, seed=seed)
    with progress_bar("Partitioning photos") as progress:
        write_stores(dealt, photos, out, progress=progress)
    counts = {store: len(members) for store, members in dealt.stores.items()}
    if as_json:
        print_json({"out": from_filesystem(str(out)), "stores": counts})
        return
    table = Table(columns=[Column(name="store"), Column(name="photos", is_figure=True)])
    for store, number in counts.items():
        table.add(store, f"{number:,}")
    echo(table, f"{counted(sum(counts.values()), 'photo')} in {counted(len(counts), 'store')} below '{out}'")
    echo_command(f"fedshelf simulate --data-dir {shlex.quote(str(out))} --rounds 10")


@app.command("make-demo", epilog="Example: fedshelf data make-demo demo/ --seed 1")
def make_demo(
    out: Annotated[Path, typer.Argument(help="Folder to create, with stores/ and test/ in it.")],
    seed: _Seed = 0,
    photos_per_class: Annotated[
        int, typer.Option(min=5, max=MAX_INTEGER, help="Photos of each product over all stores.")
    ] = 90,
    image_size: Annotated[int, typer.Option(min=32, max=2048, help="Side of the photos in pixels.")] = 96,
    as_json: _Json = False,
) -> None:
    """Draw a small synthetic photo set.

    It has five stores, twelve products, and test photos.
    """
    from fedshelf.data.demo import make_demo as draw

    with progress_bar("Drawing photos") as progress:
        made = draw(out, seed=seed, photos_per_class=photos_per_class, image_size=image_size, progress=progress)
    if as_json:
        print_json(
            {
                "stores": from_filesystem(str(made.stores)),
                "test": from_filesystem(str(made.test)),
                "num_train": made.num_train,
                "num_test": made.num_test,
                "classes": made.classes,
            }
        )
        return
    echo(
        f"Drew {counted(made.num_train, 'photo')} for {counted(len(made.classes), 'store')} and "
        f"{counted(made.num_test, 'test photo')} in '{out}'"
    )
    stores, test = shlex.quote(str(made.stores)), shlex.quote(str(made.test))
    echo_command(f"fedshelf simulate --data-dir {stores} --test-dir {test} --rounds 10")


@app.command(epilog="Example: fedshelf data fetch groceries --out groceries/")
def fetch(
    name: Annotated[str, typer.Argument(help="The photo set: groceries.")],
    out: Annotated[Path | None, typer.Option(help="Folder to create (default: NAME).")] = None,
    sha256: Annotated[
        str | None, typer.Option(help="Expected checksum of the archive (default: verify the files).")
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Address of a mirror instead of GitHub.")] = None,
    as_json: _Json = False,
) -> None:
    """Download a public photo set.

    Needs internet. An interrupted download resumes.

    groceries: the Grocery Store Dataset, 5,125 photos of 81 products taken in real grocery stores (MIT license).
    """
    from fedshelf.data.fetch import GROCERIES
    from fedshelf.data.fetch import fetch as get

    if name != "groceries":
        raise UsageError(f"unknown photo set '{name}': the only one is 'groceries'")
    target = out or Path(name)
    with progress_bar("Downloading", is_bytes=True) as progress:
        fetched = get(GROCERIES, target, sha256=sha256, base_url=base_url, progress=progress)
    if as_json:
        print_json({"photos": from_filesystem(str(fetched.photos)), "sha256": fetched.sha256, "proof": fetched.proof})
        return
    echo(f"Photos in '{fetched.photos}', verified by {fetched.proof} (SHA-256 of the archive: {fetched.sha256})")
    echo(f"Please cite: {GROCERIES.citation}")
    echo_command(f"fedshelf data partition {shlex.quote(str(fetched.photos))} --out stores/")


@app.command("synthetic-sales", epilog="Example: fedshelf data synthetic-sales stores/ --gamma 1 --listed 0.6")
def synthetic_sales(
    stores: Annotated[Path, typer.Argument(help="Folder with one folder of photos per store.")],
    test_dir: Annotated[
        Path | None, typer.Option(help="Test photos, which are dated at each store that sells their product.")
    ] = None,
    gamma: Annotated[
        float, typer.Option(min=0, max=10, help="How strongly photos follow sales: 1 in proportion, 0 not at all.")
    ] = 1.0,
    listed: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the time for which a store sells a product.")
    ] = 0.6,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Write synthetic sales, and dates of photos, next to photos.

    For trials of --sales: sales.csv has two years of drawn sales of each store, and photos.csv gives each photo a day
    on which its product is likely to be photographed. Photos are not changed, and existing files are not replaced.
    """
    from fedshelf.data.layout import store_folders
    from fedshelf.data.synthetic_sales import write_synthetic_sales

    rows = write_synthetic_sales(store_folders(stores), seed=seed, gamma=gamma, listed=listed, test=test_dir)
    if as_json:
        print_json({"stores": rows})
        return
    echo(f"Wrote {counted(sum(rows.values()), 'row')} of synthetic sales for {counted(len(rows), 'store')}")
    model = "--pretrained --model tf_efficientnet_lite0"
    echo_command(f"fedshelf simulate --data-dir {shlex.quote(str(stores))} --sales {model} --rounds 20")


@app.command(epilog="Example: fedshelf data check stores/store-1")
def check(
    photos: _PhotosArgument,
    val_fraction: Annotated[
        float, typer.Option(help="Share held out for validation where there is no val/ folder.")
    ] = 0.1,
    seed: _Seed = 0,
    fewest: Annotated[
        int, typer.Option(min=1, max=MAX_INTEGER, help="Warn of classes with fewer training photos.")
    ] = 10,
    as_json: _Json = False,
) -> None:
    """Check a photo folder, class by class.

    Reports counts, unusable files, copies, tiny photos and imbalance.
    """
    from fedshelf.data.health import check as examine

    with progress_bar("Checking photos") as progress:
        health = examine(photos, val_fraction=val_fraction, seed=seed, fewest=fewest, progress=progress)
    waiting = _in_inbox(photos)
    if as_json:
        print_json({**health.to_dict(), "inbox": waiting})
    else:
        _print_health(health)
        for product, number in waiting.items():
            echo(f"{counted(number, 'photo')} of the unknown product '{product}' in the inbox, not trained on")


def _in_inbox(photos: Path) -> dict[str, int]:
    """Corrected photos that wait until the catalogue has their product, by product."""
    from fedshelf.edge.serving.corrections import JOURNAL, Corrections, unknown_products

    if not (photos / JOURNAL).is_file():
        return {}
    try:
        return dict(sorted(unknown_products(Corrections(photos, create=False).all()).items()))
    except RunError as error:
        echo(f"warning: the corrections of this folder cannot be read: {error}")
        return {}


def _print_health(health: "Health") -> None:
    names = ("train", "validation", "unusable", "tiny")
    table = Table(columns=[Column(name="class"), *(Column(name=name, is_figure=True) for name in names)])
    for entry in health.classes:
        table.add(
            entry.path, *(f"{n:,}" if n else "" for n in (entry.train, entry.validation, entry.unusable, entry.tiny))
        )
    echo(
        table,
        f"{counted(len(health.classes), 'class', 'classes')}, {counted(health.num_train, 'training photo')} and "
        f"{counted(health.num_validation, 'validation photo')} in '{health.root}'",
    )
    for path, reason in health.unusable.items():
        echo(f"  unusable '{path}': {reason}")
    for duplicate in health.duplicates:
        what = "in several classes" if len(duplicate.classes) > 1 else "the same"
        echo(f"  {what}: {', '.join(duplicate.files)}")
    for finding in health.findings:
        echo(f"warning: {finding}")
    if not health.findings:
        echo("No problems found.")
