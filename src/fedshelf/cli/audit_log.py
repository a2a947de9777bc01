"""The `fedshelf audit-log` command."""

import json
from typing import Annotated

import typer

from fedshelf.cli.enroll import Home


def audit_log(
    home: Home = None,
    verify: Annotated[bool, typer.Option("--verify", help="Only check that the log is whole and unaltered.")] = False,
) -> None:
    """Print and check the server's audit log.

    Each event is a line of JSON. A log that was cut short or altered is an error.

    Example: fedshelf audit-log --verify
    """
    from fedshelf.config import places
    from fedshelf.core.text import counted
    from fedshelf.identity.audit_log import AuditLog

    if home is not None:
        places.use_home(home)
    count = 0
    for event in AuditLog(places.identity_directory()).events():
        count += 1
        if not verify:
            typer.echo(json.dumps(event))
    if verify:
        typer.echo(f"The audit log is whole and unaltered: {counted(count, 'event')}.")
