"""The `fedshelf privacy` commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo, print_json
from fedshelf.cli.enroll import AsJson
from fedshelf.core.settings import MAX_INTEGER

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.app.privacy_explanation import Explanation

app = Commands(help="What leaves a store, and what it costs.")


@app.command()
def explain(
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME|FILE", help="open, standard, strict, or a TOML file.")
    ] = "standard",
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Configuration of a run, from headquarters (TOML)."),
    ] = None,
    classes: Annotated[
        int, typer.Option("--classes", min=1, max=MAX_INTEGER, help="With --config: products of the run.")
    ] = 100,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir", metavar="DIR", help="With --config: the store's photos, to predict how long a round takes."
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="HOST:PORT", help="Also check this server's address and authority."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain a policy before joining: what would leave the store.

    Shows every field of every message, who learns what, ε, bytes, and seconds. A server does not tell its run's
    configuration to a store that has not joined: give it with --config, or see what any run could ask for.

    Example: fedshelf privacy explain --policy strict
    """
    from fedshelf.app.privacy_explanation import explain as explained
    from fedshelf.config import files
    from fedshelf.config.schema import RunConfig
    from fedshelf.core.errors import UsageError
    from fedshelf.data.folder import scan
    from fedshelf.deploy.allowed_server import look_at_server
    from fedshelf.privacy import policy as policies

    if data_dir is not None and config is None:
        raise UsageError("--data-dir needs --config: how long a round takes depends on the run")
    chosen = policies.load(policy)
    run = None if config is None else files.load(RunConfig, config, {})
    num_train = None
    if run is not None and data_dir is not None:
        num_train = len(scan(data_dir, val_fraction=run.val_fraction, seed=run.seed).train)
    found = explained(chosen, run, num_classes=classes, num_train=num_train)
    authority, problem = ("", "") if server is None else look_at_server(chosen.server, server)
    if as_json:
        told = None if server is None else {"address": server, "authority": authority, "problem": problem or None}
        print_json({"policy": policy, **found.to_record(), "server": told}, indent=1)
    else:
        told_of = [f"server {server}: {problem or 'the policy allows it'}"] * (server is not None)
        _show(policy, found, [*told_of, *([f"fingerprint of its authority: {authority}"] if authority else [])])


def _show(policy: str, found: "Explanation", told: list[str]) -> None:
    from fedshelf.cli.tables import Column, Table
    from fedshelf.reporting.formatting import duration, size

    fields = Table(columns=[Column(name=name) for name in ("message", "field", "leaves", "decided by")])
    for field in found.fields:
        fields.add(field.message.lower(), field.field, field.state, field.key)
    epsilon = "unlimited" if found.epsilon is None else f"at most {found.epsilon:g} in 365 days (δ = {found.delta:g})"
    most = "" if found.is_of_a_run else "at most "
    each = "unlimited" if found.bytes_up is None else most + size(found.bytes_up)
    daily = "unlimited" if found.bytes_per_day is None else f"at most {size(found.bytes_per_day)}"
    echo(
        f"policy {policy}{': it refuses this run' * bool(found.refusals)}",
        *(f"  refused: {reason}" for reason in found.refusals),
        *told,
        fields,
        *found.learns,
        f"ε: {epsilon}. {found.protection}",
        f"Bytes of an upload before compression: {each}. In 24 hours: {daily}.",
        "Seconds: unknown without --config and --data-dir."
        if found.seconds_per_round is None
        else f"Seconds: about {duration(found.seconds_per_round)} of training a round on this machine.",
    )
