"""The `fedshelf runs` commands: list, show, compare and stop runs."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo, print_json
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.text import did_you_mean
from fedshelf.tracking.terminal import make_console

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    import psutil

    from fedshelf.storage.run_directory import RunDirectory
    from fedshelf.tracking.queries import RunSummary

app = Commands(help="List, show and compare runs.")

Root = Annotated[Path, typer.Option("--root", help="Folder of all runs.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, its id, or the beginning of its id.")]
Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Two or more runs, each a folder, an id, or the beginning of an id."),
]
Metric = Annotated[str, typer.Option("--metric", help="Figure to compare: accuracy, central_accuracy or train_loss.")]

DEFAULT_ROOT = Path("runs")
PATIENCE = 10.0  # seconds until a wait is explained


@app.command("list")
def list_runs(root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """List all runs, newest first.

    Example: fedshelf runs list --root runs
    """
    from fedshelf.cli.run_tables import list_table
    from fedshelf.tracking.runs import find_runs, summaries_of

    runs = summaries_of(reversed(find_runs(root)))
    if as_json:
        print_json([_overview(summary, run.path) for run, summary in runs], indent=1)
    elif not runs:
        echo(f"There are no runs in '{root}' yet: 'fedshelf simulate' and 'fedshelf server' start one.")
    else:
        echo(list_table([summary for _, summary in runs]))


@app.command()
def show(run: Run, root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Show one run round by round.

    For each round: the figures, how many stores took part, and who did not and why. After the last round: accuracy by
    product and by level of folders, and the products most often mixed up.

    Example: fedshelf runs show 20261121-0835
    """
    from fedshelf.cli.run_tables import (
        gain_table,
        heading,
        own_batches,
        privacy_lines,
        product_tables,
        remarks_on,
        rounds_table,
    )
    from fedshelf.privacy.base import DEFAULT_DELTA
    from fedshelf.reporting.privacy_report import privacy_report
    from fedshelf.reporting.receipt import protections_of
    from fedshelf.storage.run_directory import differences
    from fedshelf.tracking.queries import run_summary
    from fedshelf.tracking.runs import resolve_run

    directory = resolve_run(run, root)
    summary = run_summary(directory.path)
    settings = {d.key: d.new for d in differences("", directory.config_toml)}
    report = None
    if summary.noise:
        report = privacy_report(
            summary.noise, summary.rounds, summary.voids, delta=float(settings.get("delta", DEFAULT_DELTA))
        )
    if as_json:
        print_json(
            {
                **summary.to_record(), "privacy": report.to_record() if report else None,
                "protections": protections_of(settings), "codec_up": settings.get("codec-up", "none"),
                "teacher": _teacher(settings),
            },
            indent=1,
        )  # fmt: skip
        return
    remarks = [*remarks_on(summary), *own_batches(summary, directory.config_toml)]
    width = make_console().width
    personalize = settings.get("personalize")
    echo(
        *heading(summary, directory.config_toml, width=width), rounds_table(summary), *remarks, *privacy_lines(report),
        *product_tables(summary, personalize=personalize), *gain_table(summary),
    )  # fmt: skip


def _teacher(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the run has learned from besides labels."""
    if "teacher-digest" not in settings:
        return None
    fields = RunConfig.model_fields
    return {
        "model": settings.get("teacher"), "digest": settings["teacher-digest"],
        "weight": settings.get("distill-weight", fields["distill_weight"].default),
        "temperature": settings.get("temperature", fields["temperature"].default),
    }  # fmt: skip


@app.command()
def compare(runs: Runs, root: Root = DEFAULT_ROOT, metric: Metric = "accuracy", as_json: AsJson = False) -> None:
    """Compare runs: figures, and the settings that differ.

    Example: fedshelf runs compare 20261121-0835 20261121-0912 --metric central_accuracy
    """
    from fedshelf.cli.run_tables import METRICS, compare_tables, series_of
    from fedshelf.tracking.queries import run_summary
    from fedshelf.tracking.runs import resolve_run

    if metric not in METRICS:
        raise UsageError(f"--metric {metric}: must be one of {', '.join(METRICS)}{did_you_mean(metric, METRICS)}")
    directories = [resolve_run(run, root) for run in runs]
    if len({directory.path.resolve() for directory in directories}) < 2:
        raise UsageError("compare needs two or more different runs: 'fedshelf runs list' shows all")
    summaries = [run_summary(directory.path) for directory in directories]
    settings = _differing_settings([directory.config_toml for directory in directories])
    if as_json:
        figures = [
            {**_overview(summary, directory.path), "metric": metric, "values": series_of(summary, metric)}
            for summary, directory in zip(summaries, directories, strict=True)
        ]
        print_json({"runs": figures, "settings": settings}, indent=1)
    else:
        echo(*compare_tables(summaries, metric, settings, width=make_console().width))


@app.command()
def stop(run: Run, root: Root = DEFAULT_ROOT) -> None:
    """Stop a run on this machine.

    It ends after its current step, and this command says how. The command that started the run resumes it.

    RUN is a run's folder, its id, or the beginning of its id below --root.

    Example: fedshelf runs stop 20261121-0835
    """
    from fedshelf.core.events import RunStatus
    from fedshelf.tracking.queries import UNEXPLAINED, run_summary
    from fedshelf.tracking.runs import resolve_run

    directory = resolve_run(run, root)
    process = directory.process()
    if process is not None:
        typer.echo(f"asked process {process.pid} to stop; waiting until it has", err=True)
        _terminate(process, directory)
    summary = run_summary(directory.path)
    said = f"run {summary.run_id} {'is not running: it ' * (process is None)}{summary.status.value}"
    because = f" ({summary.reason})" if summary.reason else ""
    echo(f"{said}{because}, rounds done: {summary.num_done} of {summary.num_rounds or '?'}")
    if process is not None and (summary.status is RunStatus.FAILED or summary.reason == UNEXPLAINED):
        raise typer.Exit(1)


def _terminate(process: "psutil.Process", directory: "RunDirectory") -> None:
    """Terminate a run's process and wait until it ends."""
    import time

    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):  # already ended
        process.terminate()
    began, said = time.monotonic(), False
    while directory.owner() == process.pid:
        time.sleep(0.1)
        if not said and time.monotonic() - began > PATIENCE:
            said = True
            typer.echo(
                f"process {process.pid} is still at its current step, such as training one store; Ctrl-C ends this "
                f"wait, and 'kill -9 {process.pid}' ends the run at once, at the cost of that step",
                err=True,
            )


def _overview(summary: "RunSummary", path: Path) -> dict[str, object]:
    """Return one run's entry in JSON output."""
    from fedshelf.cli.run_tables import last_of, series_of, utc

    return {
        "run_id": summary.run_id,
        "path": str(path),
        "status": summary.status.value,
        "started": utc(summary.started),
        "rounds": summary.num_done,
        "num_rounds": summary.num_rounds,
        "best_round": summary.best_round,
        "accuracy": last_of(series_of(summary, "accuracy")),
        "central_accuracy": last_of(series_of(summary, "central_accuracy")),
        "num_parameters": summary.num_parameters,
        "void_rounds": len(summary.voids),
    }


def _differing_settings(configs: list[str]) -> "dict[str, list[object]]":
    """Return, by key, each run's value (None if not set) for keys on which any two runs differ."""
    from fedshelf.storage.run_directory import differences

    against_nothing = [{d.key: d.new for d in differences("", config)} for config in configs]
    keys = sorted({d.key for config in configs[1:] for d in differences(configs[0], config)})
    return {key: [settings.get(key) for settings in against_nothing] for key in keys}
