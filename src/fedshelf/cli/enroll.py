"""The `fedshelf enroll` commands: which stores may take part."""

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.identity.chain import Chain

app = Commands(help="Enroll stores, and revoke them.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Home = Annotated[
    Path | None, typer.Option("--home", metavar="DIR", help="The server's home (default: $FEDSHELF_HOME).")
]
Address = Annotated[
    list[str] | None,
    typer.Option("--server-address", metavar="HOST:PORT", help="Address by which the store reaches the server "
    "(default: the one of the server's last start). Can be repeated."),
]  # fmt: skip
Name = Annotated[str, typer.Argument(metavar="NAME", help="The store's name.")]


@app.command()
def add(name: Name, home: Home = None, server_address: Address = None) -> None:
    """Print a token that enrolls one store, once, within 24 hours.

    Example: fedshelf enroll add lyon-03
    """
    chain = chain_of(home)
    addresses, authority = _server(chain, server_address)
    typer.echo(chain.add(name, authority=authority, addresses=addresses))


@app.command()
def rotate(name: Name, home: Home = None, server_address: Address = None) -> None:
    """Print a token that gives an enrolled store a new key.

    The old key ends when the token is used.

    Example: fedshelf enroll rotate lyon-03
    """
    chain = chain_of(home, must_exist=True)
    addresses, authority = _server(chain, server_address)
    typer.echo(chain.add(name, authority=authority, addresses=addresses, replaces=True))


@app.command()
def revoke(name: Name, home: Home = None) -> None:
    """End a store's key and its unused token at once.

    A server that is running refuses the store from its next request on.

    Example: fedshelf enroll revoke lyon-03
    """
    chain_of(home, must_exist=True).revoke(name)
    typer.echo(f"'{name}' may no longer take part.", err=True)


@app.command("list")
def list_stores(home: Home = None, as_json: AsJson = False) -> None:
    """List all stores and their keys.

    Example: fedshelf enroll list
    """
    from fedshelf.cli.tables import Column, Table
    from fedshelf.core.text import counted

    chain = chain_of(home, must_exist=True)
    entries, tokens = chain.roster().entries, chain.open_tokens()
    if as_json:
        fields = [{"name": e.name, "state": e.state.value, "since": e.since, "key": e.key.text} for e in entries]
        typer.echo(json.dumps(fields))
    elif not entries:
        typer.echo("No store is enrolled yet: 'fedshelf enroll add NAME' makes a token for one.")
    else:
        table = Table(columns=[Column(name=name) for name in ("store", "state", "since (UTC)", "key")])
        for entry in sorted(entries, key=lambda e: (e.name, e.since)):
            table.add(entry.name, entry.state.value, entry.since, entry.key.text[:12])
        echo(table)
    if tokens and not as_json:
        typer.echo(f"{counted(len(tokens), 'open token')}: see 'fedshelf enroll tokens'.")


@app.command()
def tokens(home: Home = None, as_json: AsJson = False) -> None:
    """List open tokens and invitations.

    Example: fedshelf enroll tokens
    """
    from fedshelf.cli.run_tables import utc
    from fedshelf.cli.tables import Column, Table

    found = chain_of(home, must_exist=True).open_tokens()
    if as_json:
        fields = [{"id": t.id, "name": t.name or None, "uses": t.uses, "expires": utc(t.expires)} for t in found]
        typer.echo(json.dumps(fields))
    elif not found:
        typer.echo("There are no open tokens.")
    else:
        table = Table(columns=[Column(name=name) for name in ("id", "for", "stores", "expires (UTC)")])
        for token in found:
            table.add(token.id, token.name or "any store", str(token.uses), utc(token.expires) or "")
        echo(table)


@app.command()
def cancel(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="As 'enroll tokens' shows them.")] = None,
    home: Home = None,
    every: Annotated[bool, typer.Option("--all", help="End all of them.")] = False,
) -> None:
    """End open tokens and invitations at once.

    Stores that are enrolled are not affected.

    Example: fedshelf enroll cancel --all
    """
    from fedshelf.core.errors import UsageError
    from fedshelf.core.text import counted

    if bool(ids) == every:
        raise UsageError("give the ids of the tokens to end, which 'fedshelf enroll tokens' shows, or --all")
    ended = chain_of(home, must_exist=True).cancel(None if every else ids)
    typer.echo(f"Ended {counted(len(ended), 'token')}.", err=True)


@app.command()
def key(home: Home = None) -> None:
    """Print the chain's public key, which a store can pin in its policy.

    Example: fedshelf enroll key
    """
    typer.echo(chain_of(home, must_exist=True).key.text)


@app.command()
def renumber(home: Home = None) -> None:
    """Sign the roster again, after a backup was restored.

    Stores refuse a roster that is older than the one they have seen, until this was done.

    Example: fedshelf enroll renumber
    """
    chain = chain_of(home, must_exist=True)
    chain.renumber()
    typer.echo(f"The roster has the number {chain.roster().number} now.", err=True)


@app.command("import")
def import_stores(
    file: Annotated[Path, typer.Argument(metavar="CSV", help="A table with a column 'name'.")],
    home: Home = None,
    server_address: Address = None,
) -> None:
    """Make tokens for many stores, and print them as CSV.

    Stores that are enrolled already, or were revoked, are left out and named.

    Example: fedshelf enroll import stores.csv > tokens.csv
    """
    from fedshelf.core.errors import DataError
    from fedshelf.core.text import some
    from fedshelf.storage.atomic_files import translating_os_errors

    try:
        with translating_os_errors("read", file):
            text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"'{file}' is not UTF-8: save it as CSV with that encoding") from None
    rows = list(csv.DictReader(text.splitlines()))
    if not rows or "name" not in rows[0]:
        raise DataError(f"'{file}' has no column 'name': its first line must be a header")
    chain = chain_of(home)
    addresses, authority = _server(chain, server_address)
    roster, table = chain.roster(), csv.writer(sys.stdout)
    names = [name for name in dict.fromkeys((row["name"] or "").strip() for row in rows) if name]
    enrolled = [name for name in names if roster.active(name) is not None]
    revoked = sorted({*names}.difference(enrolled) & roster.revoked_names())
    table.writerow(("name", "token"))
    for name in names:
        if name not in enrolled and name not in revoked:
            table.writerow((name, str(chain.add(name, authority=authority, addresses=addresses))))
    if enrolled:
        typer.echo(f"left out, enrolled already: {some(enrolled)}", err=True)
    if revoked:
        typer.echo(
            f"left out, revoked: {some(revoked)}. 'fedshelf enroll add NAME' makes a token that lets one back in",
            err=True,
        )


def chain_of(home: Path | None, *, must_exist: bool = False) -> "Chain":
    """The chain's identity, created if it need not exist."""
    from fedshelf.config import places
    from fedshelf.core.errors import UsageError
    from fedshelf.identity.chain import Chain

    if home is not None:
        places.use_home(home)
    folder = places.identity_directory()
    if must_exist and not (folder / "chain.key").exists():
        raise UsageError(f"no server has been started from this home ('{folder}' has no key)")
    return Chain(folder)


def _server(chain: "Chain", given: list[str] | None) -> tuple[tuple[str, ...], str]:
    """What a token says about the server: its addresses, and its authority."""
    from fedshelf.config import places
    from fedshelf.core.errors import UsageError
    from fedshelf.deploy.address import parse_server_address
    from fedshelf.deploy.tls import certificate_fingerprint

    known = chain.server()
    if not given and known is None:
        raise UsageError(
            "no server has been started from this home, so its address is not known: start it once, or give "
            "--server-address HOST:PORT"
        )
    ca = places.tls_directory() / "ca.pem"
    authority = known[1] if known else certificate_fingerprint(ca) if ca.exists() else ""
    addresses = tuple(str(parse_server_address(text)) for text in given) if given else known[0] if known else ()
    return addresses, authority
