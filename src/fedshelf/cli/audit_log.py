"""The `fedshelf audit-log` command."""

import datetime
import json
from typing import Annotated

import typer

from fedshelf.cli.enroll import Home


def audit_log(
    home: Home = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check that no line was altered, moved or removed.")
    ] = False,
    prune_before: Annotated[
        datetime.datetime | None,
        typer.Option(
            "--prune-before",
            metavar="YYYY-MM-DD",
            formats=["%Y-%m-%d"],
            help="Delete the files of the log "
            "in which every line is older; the newest file stays. The rest can still be verified.",
        ),
    ] = None,
) -> None:
    """Print and check the server's audit log.

    Each event is a line of JSON. A log with altered, missing or moved lines is an error.
    Lines missing at its end show only against a copy, or against the hash that --verify has printed before.

    Example: fedshelf audit-log --verify
    """  # fmt: skip
    from fedshelf.config import places
    from fedshelf.core.errors import RunError, UsageError
    from fedshelf.core.text import counted
    from fedshelf.identity.audit_log import AuditLog

    if home is not None:
        places.use_home(home)
    folder, count = places.identity_directory(), 0
    if not folder.is_dir():
        raise UsageError(f"'{folder}' does not exist: no server has been started from this home")
    log = AuditLog(folder)
    if prune_before is not None:
        if verify:
            raise UsageError("--prune-before verifies the log by itself: leave --verify out")
        typer.echo(f"Deleted {counted(log.prune(prune_before.date()), 'file')} of the audit log.")
        return
    for event in log.events():
        count += 1
        if not verify:
            typer.echo(json.dumps(event))
    if not count and (folder / "roster.json").exists():
        raise RunError(f"'{folder}' has enrolled stores and no audit log: its files were deleted or moved away")
    if verify:
        typer.echo(f"No line of the audit log was altered, moved or removed: {counted(count, 'event')}.")
        typer.echo(f"Hash of the newest line: {log.head().hash}")
