"""The `fedshelf catalogue` commands: list, add, and unite the products of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo, print_json
from fedshelf.cli.runs import DEFAULT_ROOT, AsJson, Root, Run
from fedshelf.cli.tables import Column, Table
from fedshelf.core.errors import UsageError
from fedshelf.core.text import counted

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.data.catalogue import Catalogue
    from fedshelf.storage.run_directory import RunDirectory

app = Commands(help="List and add products of a run, and other names for them.")


@app.command("list")
def list_(run: Run, root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """List the products of a run, in the order of the model's outputs.

    Example: fedshelf catalogue list 20261121-0835
    """
    from fedshelf.data.catalogue import Catalogue
    from fedshelf.tracking.runs import resolve_run

    directory = resolve_run(run, root)
    if not directory.catalogue.exists():
        raise UsageError(f"run {directory.run_id} has no catalogue yet: it is made when enough stores have joined")
    catalogue = Catalogue.load(directory.catalogue)
    if as_json:
        products = [
            {"product": name, "names": list(paths)}
            for name, paths in zip(catalogue.names, catalogue.members, strict=True)
        ]
        print_json({"run_id": directory.run_id, "digest": catalogue.digest, "products": products})
        return
    table = Table(columns=[Column(name="product"), Column(name="folders and other names")])
    for name, paths in zip(catalogue.names, catalogue.members, strict=True):
        table.add(name, ", ".join(path for path in paths if path != name))
    echo(table, f"{counted(len(catalogue), 'product')} in run {directory.run_id}")


@app.command()
def add(
    run: Run,
    products: Annotated[list[str], typer.Argument(metavar="PRODUCT...", help="Names of the products' folders.")],
    root: Root = DEFAULT_ROOT,
    allow_similar: Annotated[
        bool, typer.Option(help="Also add names that are equal to known ones but for case, blanks, or plural.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add products to a run, also while it trains.

    A running server uses them from its next round on, and a stopped one when it resumes. What the model has learned is
    kept. Products cannot be removed.

    Example: fedshelf catalogue add 20261121-0835 Kiwi "Granny Smith"
    """
    from fedshelf.app.run_catalogue import add_products
    from fedshelf.tracking.runs import resolve_run

    directory = resolve_run(run, root)
    before = add_products(directory, products, allow_similar=allow_similar)
    _report(directory, before, as_json=as_json)


@app.command()
def alias(
    run: Run,
    aliases: Annotated[list[str] | None, typer.Argument(metavar="PAIR...", help="Pairs ALIAS=PRODUCT.")] = None,
    file: Annotated[Path | None, typer.Option(help="CSV file with the columns alias and class.")] = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Give products of a run other names, such as a SKU or another spelling.

    Stores count photos in folders of these names for the product. All conflicts are reported at once.

    Example: fedshelf catalogue alias 20261121-0835 "granny_smith=Granny Smith" "4017=Granny Smith"
    """
    from fedshelf.app.run_catalogue import add_aliases
    from fedshelf.data.catalogue import load_aliases, united
    from fedshelf.tracking.runs import resolve_run

    directory = resolve_run(run, root)
    if not aliases and file is None:
        raise UsageError("no alias is given: write ALIAS=PRODUCT, or give a file with --file")
    if wrong := [text for text in aliases or () if "=" not in text]:
        raise UsageError(*(f"'{text}' is not of the form ALIAS=PRODUCT" for text in wrong))
    pairs = [text.partition("=")[::2] for text in aliases or ()]
    if file is not None:
        pairs += load_aliases(file).items()
    before = add_aliases(directory, united(pairs))
    _report(directory, before, as_json=as_json)


def _report(directory: "RunDirectory", before: "Catalogue", *, as_json: bool) -> None:
    """Say what has changed, and when it is used."""
    from fedshelf.data.catalogue import Catalogue
    from fedshelf.storage.run_directory import differences

    after = Catalogue.load(directory.catalogue)
    added = after.names[len(before) :]
    named = sum(map(len, after.members)) - sum(map(len, before.members)) - len(added)
    if as_json:
        record = {"added": list(added), "aliases": named, "products": len(after), "digest": after.digest}
        print_json({"run_id": directory.run_id, **record})
        return
    if after == before:
        echo(f"The catalogue of run {directory.run_id} has all of that already.")
        return
    what = [counted(len(added), "product")] * bool(added) + [counted(named, "other name")] * bool(named)
    simulated = any(found.key == "data-dir" for found in differences("", directory.config_toml))
    running = directory.owner() is not None and not simulated
    when = "from its next round on" if running else "when it resumes"
    echo(f"Added {' and '.join(what)} to run {directory.run_id}, which uses them {when}.")
