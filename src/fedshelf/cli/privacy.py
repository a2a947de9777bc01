"""The `fedshelf privacy` commands."""

import csv
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo, print_json
from fedshelf.cli.enroll import AsJson

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.cli.tables import Table
    from fedshelf.privacy.ledger import Content

app = Commands(help="What leaves a store, and what it costs.")


@app.command()
def ledger(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The store's photo folder or state directory.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check that no entry was altered, moved or removed.")
    ] = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, one line per release.")] = False,
    home: Annotated[
        Path | None, typer.Option("--home", metavar="DIR", help="The store's home (default: $FEDSHELF_HOME).")
    ] = None,
) -> None:
    """Print and check a store's ledger: what has left the store.

    Each release is written down before it is sent. A ledger with altered, missing or moved entries is an error.

    Example: fedshelf privacy ledger ./local_data --verify
    """
    from fedshelf.app.client_place import state_dir_of
    from fedshelf.config import places
    from fedshelf.core.errors import UsageError
    from fedshelf.identity.store_keys import StoreKeys
    from fedshelf.privacy.ledger import Release, read

    if verify + as_json + as_csv > 1:
        raise UsageError("choose one of --verify, --json and --csv")
    if home is not None:
        places.use_home(home)
    state_dir = state_dir_of(folder)
    content, enrollment = read(state_dir), StoreKeys(state_dir / "keys").enrollment()
    if as_json:
        print_json(_as_json(content), indent=2)
    elif as_csv:
        rows = [asdict(release) for release in content.releases]
        table = csv.DictWriter(sys.stdout, [field.name for field in fields(Release)])
        table.writeheader()
        table.writerows(
            {**row, "protections": "; ".join(row["protections"]), "mechanism": json.dumps(row["mechanism"] or {})}
            for row in rows
        )
    elif verify:
        echo(*_verdict(content, "" if enrollment is None else enrollment.chain.text))
    else:
        echo(*_tables(content))


def _as_json(content: "Content") -> dict[str, object]:
    return {
        "releases": [asdict(release) for release in content.releases],
        "totals": {
            purpose: {"releases": len(found), "bytes": sum(release.num_bytes for release in found)}
            for purpose, found in content.by_purpose.items()
        },
        "head": asdict(content.head),
        "countersigned": [
            {"chain": found.chain, **asdict(found.head), "time": found.time, "audit": found.audit}
            for found in content.countersigned.values()
        ],
    }


def _verdict(content: "Content", enrolled: str) -> list[str]:
    from fedshelf.core.text import counted

    lines = [
        f"No entry of the ledger was altered, moved or removed: {counted(content.head.number, 'entry', 'entries')}, "
        f"{counted(len(content.releases), 'release')}.",
        f"Hash of the newest entry: {content.head.hash}",
    ]
    if content.num_removed:
        lines.append(f"After a power cut, {counted(content.num_removed, 'incomplete line')} at the end was removed.")
    for found in content.countersigned.values():
        other = "" if found.chain == enrolled else ", which is not the one that this store is enrolled with"
        lines.append(
            f"Countersigned up to entry {found.head.number} at {found.time} by the chain {found.chain}{other}."
        )
    if enrolled not in content.countersigned:
        lines.append(
            "The server that this store is enrolled with has countersigned no entry: it would not show if all entries "
            "were replaced."
        )
    return lines


def _tables(content: "Content") -> list["str | Table"]:
    from fedshelf.cli.tables import Column, Table
    from fedshelf.reporting.formatting import ABSENT, number, size

    names = ("entry>", "time (UTC)", "purpose", "round>", "size>", "sent", "protections", "ε>", "run?")
    columns = [Column(name=n.rstrip(">?"), is_figure=n.endswith(">"), is_optional=n.endswith("?")) for n in names]
    releases, totals = Table(columns=columns), Table(columns=[
        Column(name="purpose"), Column(name="releases", is_figure=True), Column(name="size", is_figure=True),
    ])  # fmt: skip
    for release in content.releases:
        purpose = release.purpose if release.kind != "failure" else f"{release.purpose} (failed)"
        releases.add(
            f"{release.number}", release.time[:16].replace("T", " "), purpose,
            ABSENT if release.round is None else f"{release.round}", size(release.num_bytes),
            "yes" if release.is_sent else "maybe", "; ".join(release.protections), number(release.epsilon),
            release.run_id,
        )  # fmt: skip
    for purpose, found in content.by_purpose.items():
        totals.add(purpose, f"{len(found)}", size(sum(release.num_bytes for release in found)))
    if not content.releases:
        return ["Nothing has left this store."]
    return [releases, totals]
