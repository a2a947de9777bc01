"""The `fedshelf privacy` commands."""

import csv
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo, print_json
from fedshelf.cli.enroll import AsJson, Home
from fedshelf.cli.privacy_audit import audit
from fedshelf.cli.runs import DEFAULT_ROOT, Root, Run
from fedshelf.cli.tables import Column, Table
from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.settings import MAX_INTEGER
from fedshelf.core.text import counted, spreadsheet_cell
from fedshelf.tracking.terminal import make_console, wrapped

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.app.privacy_explanation import Explanation
    from fedshelf.privacy.ledger_content import Content, Release

app = Commands(help="What leaves a store, and what it costs.")


@app.command(
    epilog="Example: fedshelf privacy epsilon --noise-multiplier 1.1 --sampling-rate 0.05 --steps 1000 --delta 1e-5"
)
def epsilon(
    steps: Annotated[int, typer.Option(help="Number of steps with noise, over all rounds.")],
    delta: Annotated[
        float, typer.Option(help="Probability with which the bound may fail; well below 1 / number of photos.")
    ],
    sampling_rate: Annotated[
        float,
        typer.Option(help="Share of the photos in a step: batch size / number of photos; 1 is all of them."),
    ] = 1.0,
    noise_multiplier: Annotated[float | None, typer.Option(help="Standard deviation of the noise / clip norm.")] = None,
    target_epsilon: Annotated[
        float | None, typer.Option(help="Find the noise multiplier for this ε, instead of the ε.")
    ] = None,
    unit: Annotated[
        Literal["photo", "client"],
        typer.Option(help="What is protected: a photo, or a client with all its photos (then, steps are rounds)."),
    ] = "photo",
    as_json: AsJson = False,
) -> None:
    """Compute the ε of training with noise, or the noise for an ε.

    Batches are Poisson samples, and the neighboring relation is adding or removing one photo (or client).
    """
    from fedshelf.privacy.accounting import SampledGaussian, compose, noise_multiplier_for

    if noise_multiplier is None and target_epsilon is not None:
        noise_multiplier = noise_multiplier_for(target_epsilon, delta, sampling_rate=sampling_rate, steps=steps)
    elif noise_multiplier is None or target_epsilon is not None:
        raise UsageError("give either --noise-multiplier or --target-epsilon")
    release = SampledGaussian(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps)
    found = compose([release], delta, unit=unit)
    if as_json:
        result = {"rdp": found.rdp, "pld": found.pld, "assumptions": found.assumptions}
        print_json(result | ({} if target_epsilon is None else {"noise_multiplier": noise_multiplier}))
        return
    table = Table(columns=[Column(name="method"), Column(name="ε", is_figure=True)])
    for method, value in (("PLD", found.pld), ("RDP", found.rdp)):
        if value is not None:
            table.add(method, f"{value:,.3f}" if value >= 0.001 or not value else f"{value:.2g}")
    echo(
        f"Noise multiplier {noise_multiplier:.6g}, sampling rate {sampling_rate:g}, {counted(steps, 'step')}, "
        f"δ = {delta:g}:",
        table,
        "Assumptions:",
        *(line for text in found.assumptions for line in wrapped(f"- {text}", make_console().width, "  ")),
    )


@app.command(epilog="Example: fedshelf privacy receipt runs/20261121-0835 --round 3 --out receipt.json")
def receipt(
    run: Run,
    number: Annotated[int, typer.Option("--round", help="The round.", min=0)],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it to a file.")] = None,
    root: Root = DEFAULT_ROOT,
    home: Home = None,
) -> None:
    """Sign what happened in a round of a run.

    The receipt states who took part, how updates were protected, and which model was made. It is signed by the chain's
    key, in the server's home. Anybody who has the public key (fedshelf enroll key) can check it with
    scripts/check_receipt.py, without FedShelf.
    """
    from fedshelf.cli.enroll import chain_of
    from fedshelf.reporting.receipt import receipt_of
    from fedshelf.storage.atomic_files import write_atomically
    from fedshelf.storage.run_directory import differences
    from fedshelf.tracking.queries import model_digest, run_summary
    from fedshelf.tracking.runs import resolve_run

    directory = resolve_run(run, root)
    settings = {found.key: found.new for found in differences("", directory.config_toml)}
    summary = run_summary(directory.path)
    fields = receipt_of(
        summary.run_id, number, summary.rounds, voids=summary.voids, noise=summary.noise, settings=settings,
        config_toml=directory.config_toml, model=model_digest(directory.path, number),
    )  # fmt: skip
    text = chain_of(home, must_exist=True).receipt(fields)
    if out is None:
        print_json(json.loads(text), indent=1)
        return
    write_atomically(out, text)
    echo(f"Receipt of round {number} in '{out}'.")


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

    Each release is written down before it is sent. A ledger with altered, missing or moved entries is an error. Other
    state directories that were used with the same photos are named, with their totals.

    Example: fedshelf privacy ledger ./local_data --verify
    """
    from fedshelf.app.state_directories import other_state_dirs, state_dir_of
    from fedshelf.config import places
    from fedshelf.identity.store_keys import StoreKeys
    from fedshelf.privacy.ledger_content import Release, read

    if verify + as_json + as_csv > 1:
        raise UsageError("choose one of --verify, --json and --csv")
    if home is not None:
        places.use_home(home)
    state_dir = state_dir_of(folder).resolve()
    content, enrollment = read(state_dir), StoreKeys(state_dir / "keys").enrollment()
    if as_json:
        print_json(_as_json(content, other_state_dirs(state_dir)), indent=2)
    elif as_csv:
        rows = [asdict(release) for release in content.releases]
        table = csv.DictWriter(sys.stdout, [field.name for field in fields(Release)])
        table.writeheader()
        for row in rows:
            row |= {"protections": "; ".join(row["protections"]), "mechanism": json.dumps(row["mechanism"] or {})}
            table.writerow({k: spreadsheet_cell(v) if isinstance(v, str) else v for k, v in row.items()})
    elif verify:
        echo(*_verdict(content, "" if enrollment is None else enrollment.chain.text))
    else:
        echo(*_tables(content), *_others(other_state_dirs(state_dir)))


def _as_json(content: "Content", others: list[Path]) -> dict[str, object]:
    from fedshelf.privacy.ledger_content import epsilon_text

    return {
        "releases": [{**asdict(found), "epsilon": epsilon_text(found.epsilon)} for found in content.releases],
        "other_state_dirs": [
            {
                "state_dir": str(folder),
                "problem": problem,
                "releases": len(found),
                "bytes": sum(release.num_bytes for release in found),
                "epsilon": epsilon_text(last.epsilon if last else None),
                "delta": last.delta if last else None,
            }
            for folder, found, last, problem in _read_others(others)
        ],
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
    from fedshelf.reporting.formatting import ABSENT, number, size

    deltas = {release.delta for release in content.releases if release.delta is not None}
    names = ("entry>", "time (UTC)", "purpose", "round>", "size>", "sent", "protections", "ε>",
             "δ>" if len(deltas) > 1 else "δ>?", "run?", "server?")  # fmt: skip
    columns = [Column(name=n.rstrip(">?"), is_figure=">" in n, is_optional=n.endswith("?")) for n in names]
    releases, totals = Table(columns=columns), Table(columns=[
        Column(name="purpose"), Column(name="releases", is_figure=True), Column(name="size", is_figure=True),
    ])  # fmt: skip
    ended = {"failure": " (failed)", "refusal": " (refused)"}
    for release in content.releases:
        purpose = release.purpose + ended.get(release.kind, "")
        releases.add(
            f"{release.number}", release.time[:16].replace("T", " "), purpose,
            ABSENT if release.round is None else f"{release.round}", size(release.num_bytes),
            "yes" if release.is_sent else "maybe", "; ".join(release.protections), number(release.epsilon),
            ABSENT if release.delta is None else f"{release.delta:g}", release.run_id, release.server,
        )  # fmt: skip
    for purpose, found in content.by_purpose.items():
        totals.add(purpose, f"{len(found)}", size(sum(release.num_bytes for release in found)))
    if not content.releases:
        return ["Nothing has left this store."]
    recipients = Table(columns=[
        Column(name="server"), Column(name="releases", is_figure=True), Column(name="size", is_figure=True),
        Column(name="chain's key"),
    ])  # fmt: skip
    for who, found in content.by_recipient.items():
        total = sum(release.num_bytes for release in found)
        recipients.add(who.server or "not recorded", f"{len(found)}", size(total), who.chain or ABSENT)
    notes = [f"ε is that of the photos so far, with δ = {delta:g}." for delta in deltas if len(deltas) == 1]
    return [releases, *notes, totals, recipients]


def _others(folders: list[Path]) -> list["str | Table"]:
    from fedshelf.reporting.formatting import ABSENT, number, size

    if not folders:
        return []
    table = Table(columns=[
        Column(name="state directory"), Column(name="releases", is_figure=True), Column(name="size", is_figure=True),
        Column(name="ε", is_figure=True), Column(name="δ", is_figure=True),
    ])  # fmt: skip
    for folder, found, last, problem in _read_others(folders):
        table.add(
            str(folder), f"{len(found)}", size(sum(release.num_bytes for release in found)),
            number(last.epsilon if last else None), f"{last.delta:g}" if last and last.delta else ABSENT,
            notes=[problem] if problem else [],
        )  # fmt: skip
    return ["Other state directories of the same photos, which count for the same budget:", table]


def _read_others(folders: list[Path]) -> Iterator[tuple[Path, tuple["Release", ...], "Release | None", str]]:
    """Each folder, its releases, the newest one that has an ε, and why it cannot be read."""
    from fedshelf.privacy.ledger_content import read

    for folder in folders:
        try:
            found, problem = read(folder).releases, ""
        except RunError as error:
            found, problem = (), str(error)
        yield folder, found, next((one for one in reversed(found) if one.epsilon is not None), None), problem


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
            "--data-dir", metavar="DIR", help="With --config: the store's photos, on which ε and seconds depend."
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
    configuration to a store that has not joined: give it with --config, or see what any run could ask for. With
    --config, all of it is about that run under this policy.

    Example: fedshelf privacy explain --policy strict
    """
    from fedshelf.app.privacy_explanation import explain as explained
    from fedshelf.config import files
    from fedshelf.config.schema import RunConfig
    from fedshelf.data.folder import scan
    from fedshelf.deploy.allowed_server import look_at_server
    from fedshelf.privacy import policy as policies

    if data_dir is not None and config is None:
        raise UsageError("--data-dir needs --config: ε and the seconds of a round depend on the run")
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
    from fedshelf.reporting.formatting import duration, size

    fields = Table(columns=[Column(name=name) for name in ("message", "field", "leaves", "decided by")])
    for field in found.fields:
        fields.add(field.message.lower(), field.field, field.state, field.key)
    period = "in this run" if found.is_of_a_run and not found.refusals else "in 365 days"
    epsilon = "no bound is known" if found.epsilon is None else "no bound, because there is next to no noise"
    if found.epsilon is not None and math.isfinite(found.epsilon):
        epsilon = f"at most {found.epsilon:.4g} {period} (δ = {found.delta:g})"
    allows = "the policy sets none" if found.budget is None else f"at most {found.budget:g} in 365 days, over all runs"
    most = "" if found.is_of_a_run else "at most "
    each = "unlimited" if found.bytes_up is None else most + size(found.bytes_up)
    daily = "unlimited" if found.bytes_per_day is None else f"at most {size(found.bytes_per_day)}"
    upload = "an encrypted upload" if found.is_encrypted else "an upload before compression"
    sentences = (
        *found.learns,
        f"ε: {epsilon}. {found.protection}",
        f"Budget of ε: {allows}.",
        f"Bytes of {upload}: {each}. In 24 hours: {daily}.",
        f"Seconds: unknown without {'--data-dir' if found.is_of_a_run else '--config and --data-dir'}."
        if found.seconds_per_round is None
        else f"Seconds: about {duration(found.seconds_per_round)} of training a round on this machine, and up to twice "
        "as long with noise.",
    )
    echo(
        f"policy {policy}{': it refuses this run' * bool(found.refusals)}",
        *(f"  refused: {reason}" for reason in found.refusals),
        *told,
        fields,
        *(line for text in sentences for line in wrapped(text, make_console().width)),
    )


app.command()(audit)
