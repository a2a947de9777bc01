"""The `fedshelf privacy audit` command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.display import echo, print_json
from fedshelf.cli.enroll import AsJson
from fedshelf.cli.tables import Column, Table
from fedshelf.core.errors import UsageError
from fedshelf.core.settings import MAX_INTEGER
from fedshelf.core.text import counted
from fedshelf.tracking.terminal import make_console, wrapped

if TYPE_CHECKING:  # imported inside the command, so that the command line starts fast
    from fedshelf.privacy.audit.findings import AuditReport


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
    from fedshelf.app.audit.attacks import AuditOptions
    from fedshelf.app.audit.attacks import audit as audited
    from fedshelf.app.audit.subject import subject_of_run, subject_of_store
    from fedshelf.config import places
    from fedshelf.reporting.audit_page import audit_page
    from fedshelf.storage.atomic_files import write_atomically

    if home is not None:
        places.use_home(home)
    if (run is None) == (store is None):
        raise UsageError("give either RUN, for a simulated run, or --store DIR, at a store")
    if out.is_dir():
        raise UsageError(f"--out {out}: that is a folder. Name a file in it, such as {out / 'report.html'}")
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

    sentences = [*_few_stores(report), *(f"Not attacked: {sentence}" for sentence in report.left_out)]
    sentences.append(
        "Assumptions, what no protection covers, and pictures are in the report. An attack that fails proves nothing."
    )
    canaries = page.rows_of_canaries([*report.canaries, *report.store_canaries])
    echo(
        f"Audit of {report.store}, run {report.run_id}: {report.model}.",
        "Gradient inversion (SSIM of 1 is the photo itself, "
        f"{report.chance_ssim:.2f} is what another photo of this store reaches):",
        table("model, protection, SSIM>, PSNR>, seconds>", page.rows_of_inversions(report)),
        "Labels inferred:",
        table("model, protection, photos>, right>, by chance>, error of features>", page.rows_of_labels(report)),
        "Canaries found:",
        table("model, protection, right>, ε found>, ceiling>, ε accounted>", canaries),
        table("protection, LiRA AUC>, found>, 95 % interval>", page.rows_of_membership(report)),
        *(line for text in sentences for line in wrapped(text, make_console().width)),
        f"The report shows photos of the store, and stays there: {out}",
    )
