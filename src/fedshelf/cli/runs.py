"""`fedshelf runs`: what has been trained here, and how it went."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # the command line must start fast: what is needed is imported inside the commands
    from rich.table import Table

    from fedshelf.tracking.queries import RunSummary

app = typer.Typer(help="List, show and compare runs.", no_args_is_help=True)

Root = Annotated[Path, typer.Option("--root", help="The folder that holds the runs.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs to read.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, its id, or the beginning of its id.")]
Runs = Annotated[list[str], typer.Argument(metavar="RUN...", help="Two or more runs, each as for 'runs show'.")]
Metric = Annotated[str, typer.Option("--metric", help="accuracy, central_accuracy or train_loss.")]

DEFAULT_ROOT = Path("runs")
METRICS = {"accuracy": max, "central_accuracy": max, "train_loss": min}
MOST_NAMES = 8  # in one remark


@app.command("list")
def list_runs(root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """List all runs, newest first.

    Example: fedshelf runs list --root runs
    """
    from fedshelf.tracking.queries import run_summary
    from fedshelf.tracking.runs import find_runs

    runs = list(reversed(find_runs(root)))
    summaries = [run_summary(run.path) for run in runs]
    if as_json:
        _print_json([_overview(summary, run.path) for summary, run in zip(summaries, runs, strict=True)])
    elif not runs:
        typer.echo(f"No runs in '{root}' yet. 'fedshelf simulate --help' and 'fedshelf server --help' start one.")
    else:
        _print(_list_table(summaries))


@app.command()
def show(run: Run, root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Show one run round by round: figures, who took part, and who did not and why.

    RUN is a run's folder, its id, or the beginning of its id below --root.

    Example: fedshelf runs show 20261121-0835
    """
    from fedshelf.tracking.queries import run_summary
    from fedshelf.tracking.runs import resolve_run

    directory = resolve_run(run, root)
    summary = run_summary(directory.path)
    if as_json:
        _print_json(summary.to_record())
        return
    remarks = [*_remarks(summary), *_own_batches(summary, directory.config_toml)]
    _print(*_heading(summary), _rounds_table(summary), *remarks, *_worth_it(summary))


@app.command()
def compare(runs: Runs, root: Root = DEFAULT_ROOT, metric: Metric = "accuracy", as_json: AsJson = False) -> None:
    """Set runs side by side: figures, and the configuration keys on which they differ.

    Each RUN is a run's folder, its id, or the beginning of its id below --root.

    Example: fedshelf runs compare 20261121-0835 20261121-0912 --metric central_accuracy
    """
    from fedshelf.core.errors import UsageError
    from fedshelf.tracking.queries import run_summary
    from fedshelf.tracking.runs import resolve_run

    if metric not in METRICS:
        raise UsageError(f"--metric '{metric}' is unknown. Choose one of: {', '.join(METRICS)}.")
    directories = [resolve_run(run, root) for run in runs]
    if len({directory.path.resolve() for directory in directories}) < 2:
        raise UsageError("compare takes two runs or more. 'fedshelf runs list' shows what there is.")
    summaries = [run_summary(directory.path) for directory in directories]
    settings = _differing_settings([directory.config_toml for directory in directories])
    if as_json:
        figures = [
            {**_overview(summary, directory.path), "metric": metric, "values": _series(summary, metric)}
            for summary, directory in zip(summaries, directories, strict=True)
        ]
        _print_json({"runs": figures, "settings": settings})
    else:
        _print(_compare_table(summaries, metric, settings))


def _overview(summary: "RunSummary", path: Path) -> dict[str, object]:
    """One run's line, for programs."""
    return {
        "run_id": summary.run_id,
        "path": str(path),
        "status": summary.status.value,
        "started": _utc(summary.started),
        "rounds": len(summary.rounds),
        "num_rounds": summary.num_rounds,
        "best_round": summary.best_round,
        "accuracy": _last(_series(summary, "accuracy")),
        "central_accuracy": _last(_series(summary, "central_accuracy")),
        "num_parameters": summary.num_parameters,
        "void_rounds": len(summary.voids),
    }


def _list_table(summaries: "list[RunSummary]") -> "Table":
    from fedshelf.tracking import words

    table = _table("run", "status", "rounds>", "accuracy>", "central>", "best round>", "parameters>", "accuracy so far")
    for summary in summaries:
        accuracies = _series(summary, "accuracy")
        table.add_row(
            summary.run_id,
            summary.status.value,
            _progress(summary),
            words.percent(_last(accuracies)),
            words.percent(_last(_series(summary, "central_accuracy"))),
            _or_dash(summary.best_round),
            _or_dash(summary.num_parameters),
            words.sparkline(accuracies),
        )
    return table


def _heading(summary: "RunSummary") -> list[str]:
    from fedshelf.tracking import words

    reason = f" ({words.foreign(summary.reason)})" if summary.reason else ""
    lines = [
        f"run {summary.run_id}: {summary.status.value}{reason}",
        f"rounds {_progress(summary)}, best round {_or_dash(summary.best_round)}, "
        f"parameters {_or_dash(summary.num_parameters)}, started {_utc(summary.started) or words.ABSENT}",
    ]
    if curve := words.sparkline(_series(summary, "accuracy"), width=60):
        lines.append(f"accuracy {curve}")
    return lines


def _rounds_table(summary: "RunSummary") -> "Table":
    from fedshelf.tracking import words

    virtual = any(round_.virtual_seconds is not None for round_ in summary.rounds)
    table = _table(
        "round>", "clients>", "train loss>", "accuracy>", "central>", "time>", *["virtual time>"] * virtual, "up>",
        "down>", "not counted",
    )  # fmt: skip
    for round_ in summary.rounds:
        counted = [client for client in round_.clients if client.status == "counted"]
        missing = [
            words.foreign(f"{client.client} ({client.status.value}{': ' * bool(client.reason)}{client.reason})")
            for client in round_.clients
            if client.status != "counted"
        ]
        table.add_row(
            f"{round_.round}{'*' * (round_.round == summary.best_round)}",
            f"{len(counted)}/{len(round_.clients)}",
            words.number(round_.train_loss),
            words.percent(round_.accuracy),
            words.percent(round_.central_accuracy),
            words.duration(round_.seconds),
            *[words.duration(round_.virtual_seconds)] * virtual,
            words.size(round_.bytes_up),
            words.size(round_.bytes_down),
            "\n".join(missing),
        )
    return table


def _remarks(summary: "RunSummary") -> list[str]:
    from fedshelf.tracking import words

    remarks = [f"round {v.round}, attempt {v.attempt + 1} was void: {words.foreign(v.reason)}" for v in summary.voids]
    return remarks + ["* best round"] * (summary.best_round is not None)


def _worth_it(summary: "RunSummary") -> "list[Table | str]":
    """What the run has brought each store, once they have compared."""
    from fedshelf.core.choices import Candidate
    from fedshelf.tracking import words, worth

    if not summary.stores:
        return []
    table = _table("store", "local only>", "global>", "personalized>", "gain>", "keeps")
    for store in summary.stores:
        accuracies = (words.percent(store.accuracies.get(candidate)) for candidate in Candidate)
        keeps = store.best.value if store.best else words.foreign(store.reason)
        table.add_row(words.foreign(store.client), *accuracies, worth.points(worth.gain(store)), keeps)
    means = [worth.mean(store.accuracies.get(candidate) for store in summary.stores) for candidate in Candidate]
    difference = worth.mean(worth.gain(store) for store in summary.stores)
    table.add_section()
    table.add_row("mean", *(words.percent(value) for value in means), worth.points(difference), "")
    sentence = worth.verdict(summary.stores)
    return [table, *([sentence] if sentence else [])]


def _own_batches(summary: "RunSummary", config_toml: str) -> list[str]:
    """Who trained in the last round with another batch size than the configured one, and at which rate."""
    from fedshelf.tracking import words
    from fedshelf.tracking.run_directory import differences

    configured = {d.key: d.new for d in differences("", config_toml)}.get("batch-size")
    own: dict[tuple[int, float], list[str]] = {}
    for client in summary.rounds[-1].clients if summary.rounds else ():
        if client.batch_size not in (None, configured):
            own.setdefault((client.batch_size or 0, client.client_lr or 0.0), []).append(words.foreign(client.client))
    return [
        f"round {summary.rounds[-1].round}: batches of {size} (configured: {configured}) at the rate {rate:.3g}: "
        + ", ".join(names[:MOST_NAMES])
        + f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)
        for (size, rate), names in sorted(own.items())
    ]


def _compare_table(summaries: "list[RunSummary]", metric: str, settings: "dict[str, list[object]]") -> "Table":
    from fedshelf.tracking import words

    def figure(value: float | None) -> str:
        return words.number(value) if metric == "train_loss" else words.percent(value)

    series = [_series(summary, metric) for summary in summaries]
    table = _table("", *(summary.run_id for summary in summaries))
    table.add_row("status", *(summary.status.value for summary in summaries))
    table.add_row("rounds", *(_progress(summary) for summary in summaries))
    table.add_row(f"{metric}, last", *(figure(_last(values)) for values in series))
    table.add_row(f"{metric}, best", *(figure(_best(values, metric)) for values in series))
    table.add_row(metric, *(words.sparkline(values) for values in series))
    table.add_row("parameters", *(_or_dash(summary.num_parameters) for summary in summaries))
    table.add_row("time", *(words.duration(sum(r.seconds or 0.0 for r in s.rounds)) for s in summaries))
    table.add_row("bytes up", *(words.size(sum(r.bytes_up for r in s.rounds)) for s in summaries))
    table.add_row("bytes down", *(words.size(sum(r.bytes_down for r in s.rounds)) for s in summaries))
    table.add_section()
    for key, values in settings.items():
        table.add_row(key, *(words.ABSENT if value is None else str(value) for value in values))
    return table


def _differing_settings(configs: list[str]) -> "dict[str, list[object]]":
    """By key, each run's value (None where it is not set); only keys on which any two runs differ."""
    from fedshelf.tracking.run_directory import differences

    against_nothing = [{d.key: d.new for d in differences("", config)} for config in configs]
    keys = sorted({d.key for config in configs[1:] for d in differences(configs[0], config)})
    return {key: [settings.get(key) for settings in against_nothing] for key in keys}


def _series(summary: "RunSummary", metric: str) -> list[float | None]:
    return [getattr(round_, metric) for round_ in summary.rounds]


def _last(values: list[float | None]) -> float | None:
    return values[-1] if values else None


def _best(values: list[float | None], metric: str) -> float | None:
    return METRICS[metric]((value for value in values if value is not None), default=None)


def _progress(summary: "RunSummary") -> str:
    return f"{len(summary.rounds)}/{_or_dash(summary.num_rounds)}"


def _or_dash(value: int | None) -> str:
    from fedshelf.tracking import words

    return words.ABSENT if value is None else f"{value:,}"


def _utc(seconds: float | None) -> str | None:
    import datetime

    return None if seconds is None else f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _table(*columns: str) -> "Table":
    """A table whose columns named with a trailing '>' are aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return table


def _print(*parts: "str | Table") -> None:
    from rich.console import Console

    console = Console(markup=False)  # a client's name may hold brackets
    if not console.is_terminal:  # a pipe has no width: cut nothing off
        console = Console(width=200, markup=False)
    for part in parts:
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))


def _print_json(value: object) -> None:
    from fedshelf.tracking.records import dump

    typer.echo(dump(value, indent=1))
