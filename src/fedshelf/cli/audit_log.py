"""The `fedshelf audit-log` command."""

import json
from typing import Annotated

import typer

from fedshelf.cli.enroll import Home


def audit_log(
    home: Home = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check that no line was altered, moved or removed.")
    ] = False,
) -> None:
    """Print and check the server's audit log.

    Each event is a line of JSON. A log with altered, missing or moved lines is an error.
    Lines missing at its end show only against a copy.

    Example: fedshelf audit-log --verify
    """
    from fedshelf.config import places
    from fedshelf.core.errors import RunError, UsageError
    from fedshelf.core.text import counted
    from fedshelf.identity.audit_log import AuditLog

    if home is not None:
        places.use_home(home)
    folder, count = places.identity_directory(), 0
    if not folder.is_dir():
        raise UsageError(f"'{folder}' does not exist: no server has been started from this home")
    for event in AuditLog(folder).events():
        count += 1
        if not verify:
            typer.echo(json.dumps(event))
    if not count and (folder / "roster.json").exists():
        raise RunError(f"'{folder}' has enrolled stores and no audit log: its files were deleted or moved away")
    if verify:
        typer.echo(f"No line of the audit log was altered, moved or removed: {counted(count, 'event')}.")
