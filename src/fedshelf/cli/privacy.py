"""The `fedshelf privacy` commands."""

import csv
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo, print_json
from fedshelf.cli.enroll import AsJson
from fedshelf.cli.tables import Column, Table
from fedshelf.core.errors import UsageError
from fedshelf.core.settings import MAX_INTEGER
from fedshelf.core.text import counted
from fedshelf.tracking.terminal import make_console, wrapped

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.app.privacy_explanation import Explanation
    from fedshelf.privacy.audit.findings import AuditReport
    from fedshelf.privacy.ledger import Content

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


@app.command()
def audit(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A simulated run: its folder or id.", show_default=False)
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="Audit at a store: its photo folder or state directory."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The report, which shows photos: it stays at the store.")
    ] = Path("report.html"),
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="With RUN: folder of the stores (default: the run's)."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="With RUN: the store to audit (default: the first by name).")
    ] = None,
    photos: Annotated[int, typer.Option("--photos", min=1, max=64, help="Photos of the step to invert.")] = 1,
    inversion_steps: Annotated[
        int, typer.Option("--inversion-steps", min=1, max=MAX_INTEGER, help="Iterations of each gradient inversion.")
    ] = 2000,
    canaries: Annotated[
        int, typer.Option("--canaries", min=8, max=5000, help="Canaries; more can show a larger ε.")
    ] = 200,
    summed_stores: Annotated[
        int, typer.Option("--summed-stores", min=2, max=64, help="Stores whose sum is attacked.")
    ] = 8,
    min_stores: Annotated[
        int, typer.Option("--min-stores", min=1, max=MAX_INTEGER, help="Report products that fewer stores sell.")
    ] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MAX_INTEGER, help="Seed of the attacks.")] = 0,
    model_path: Annotated[
        Path | None,
        typer.Option("--model-path", metavar="DIR", help="Folder of the module of a model of your own."),
    ] = None,
    as_json: AsJson = False,
    home: Annotated[
        Path | None, typer.Option("--home", metavar="DIR", help="The store's home (default: $FEDSHELF_HOME).")
    ] = None,
) -> None:
    """Attack a store's own updates, and report what they give away.

    Tries to reconstruct photos, to infer their products, and to tell which photos were trained on: without protection
    and with it. An attack that fails proves nothing.

    Example: fedshelf privacy audit runs/20261121-083512-a1b2 --out report.html
    """
    from fedshelf.app.audit_subject import subject_of_run, subject_of_store
    from fedshelf.app.privacy_audit import AuditOptions
    from fedshelf.app.privacy_audit import audit as audited
    from fedshelf.config import places
    from fedshelf.reporting.audit_page import audit_page
    from fedshelf.storage.atomic_files import write_atomically

    if home is not None:
        places.use_home(home)
    if (run is None) == (store is None):
        raise UsageError("give either RUN, for a simulated run, or --store DIR, at a store")
    if run is None and (data_dir is not None or name is not None):
        raise UsageError("--data-dir and --name belong to a simulated run. With --store, the store says where they are")
    subject = (
        subject_of_run(run, data_dir=data_dir, store=name, model_path=model_path)
        if store is None and run is not None
        else subject_of_store(store or Path(), model_path=model_path)
    )
    options = AuditOptions(
        num_photos=photos, inversion_steps=inversion_steps, num_canaries=canaries, num_stores=summed_stores,
        least_stores=min_stores, seed=seed,
    )  # fmt: skip
    report = audited(subject, options)
    write_atomically(places.absolute(out), audit_page(report))
    if as_json:
        print_json(report.to_record(), indent=1)
        return
    _show_audit(report, out)


def _few_stores(report: "AuditReport") -> list[str]:
    if report.rare_products is None:
        return []
    found = counted(len(report.rare_products), "product")
    return [f"Products that fewer than {counted(report.least_stores, 'store')} sell: {found}, listed in the report."]


def _show_audit(report: "AuditReport", out: Path) -> None:
    from fedshelf.reporting import audit_page as page

    def table(names: str, rows: list[tuple[str, ...]]) -> Table:
        columns = [each.strip() for each in names.split(",")]
        made = Table(columns=[Column(name=each.rstrip(">"), is_figure=each.endswith(">")) for each in columns])
        for row in rows:
            made.add(*row)
        return made

    echo(
        f"Audit of {report.store}, run {report.run_id}: {report.model}.",
        "Gradient inversion (SSIM of 1 is the photo itself, "
        f"{report.chance_ssim:.2f} is what another photo of this store reaches):",
        table("model, protection, SSIM>, PSNR>, seconds>", page.rows_of_inversions(report)),
        "Labels inferred:",
        table("model, protection, photos>, right>, by chance>, error of features>", page.rows_of_labels(report)),
        "Canaries found:",
        table("model, protection, right>, ε found>, ceiling>, ε accounted>", page.rows_of_canaries(report)),
        table("protection, LiRA AUC>, found>, 95 % interval>", page.rows_of_membership(report)),
        *_few_stores(report),
        *(f"Not attacked: {sentence}" for sentence in report.left_out),
        "Assumptions, what no protection covers, and pictures are in the report. An attack that fails proves nothing.",
        f"The report shows photos of the store, and stays there: {out}",
    )
