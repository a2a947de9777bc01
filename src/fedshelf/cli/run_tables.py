"""What `fedshelf runs` shows, as tables and sentences. Imported when a command has something to show."""

import datetime

from rich import box
from rich.table import Table

from fedshelf.core.choices import Candidate
from fedshelf.reporting import formatting as words
from fedshelf.reporting import gain_report as worth
from fedshelf.reporting import stragglers as late
from fedshelf.storage.run_directory import differences
from fedshelf.tracking.queries import RunSummary

METRICS = {"accuracy": max, "central_accuracy": max, "train_loss": min}
MOST_NAMES = 8  # in one remark


def list_table(summaries: list[RunSummary]) -> Table:
    """One line per run."""
    table = _table("run", "status", "rounds>", "accuracy>", "central>", "best round>", "parameters>", "accuracy so far")
    for summary in summaries:
        accuracies = series_of(summary, "accuracy")
        table.add_row(
            summary.run_id,
            summary.status.value,
            _progress(summary),
            words.percent(last_of(accuracies)),
            words.percent(last_of(series_of(summary, "central_accuracy"))),
            _or_dash(summary.best_round),
            _or_dash(summary.num_parameters),
            words.sparkline(accuracies),
        )
    return table


def heading(summary: RunSummary) -> list[str]:
    """What is to be said of a run before its rounds."""
    reason = f" ({words.printable(summary.reason)})" if summary.reason else ""
    lines = [
        f"run {summary.run_id}: {summary.status.value}{reason}",
        f"rounds {_progress(summary)}, best round {_or_dash(summary.best_round)}, "
        f"parameters {_or_dash(summary.num_parameters)}, started {utc(summary.started) or words.ABSENT}",
    ]
    if curve := words.sparkline(series_of(summary, "accuracy"), width=60):
        lines.append(f"accuracy {curve}")
    return lines


def rounds_table(summary: RunSummary) -> Table:
    """One line per round."""
    virtual = any(round_.virtual_seconds is not None for round_ in summary.rounds)
    table = _table(
        "round>", "clients>", "train loss>", "accuracy>", "central>", "time>", *["virtual time>"] * virtual, "up>",
        "down>", "not counted",
    )  # fmt: skip
    for round_ in summary.rounds:
        counted = [client for client in round_.clients if client.status == "counted"]
        missing = [
            words.printable(f"{client.client} ({client.status.value}{': ' * bool(client.reason)}{client.reason})")
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


def remarks_on(summary: RunSummary) -> list[str]:
    """What is to be said of a run after its rounds."""
    remarks = [f"round {v.round}, attempt {v.attempt + 1} was void: {words.printable(v.reason)}" for v in summary.voids]
    in_a_row = late.StragglerTracker()
    for round_ in summary.rounds:
        in_a_row.add(round_.clients)
    if sentence := late.advice(in_a_row.habits()):
        remarks.append(sentence)
    return remarks + ["* best round"] * (summary.best_round is not None)


def worth_it(summary: RunSummary) -> list[Table | str]:
    """What the run has brought each store, once they have compared."""
    if not summary.stores:
        return []
    table = _table("store", "local only>", "global>", "personalized>", "gain>", "keeps")
    for store in summary.stores:
        accuracies = (words.percent(store.accuracies.get(candidate)) for candidate in Candidate)
        keeps = store.best.value if store.best else words.printable(store.reason)
        table.add_row(words.printable(store.client), *accuracies, worth.points(worth.gain(store)), keeps)
    means = [worth.mean(store.accuracies.get(candidate) for store in summary.stores) for candidate in Candidate]
    difference = worth.mean(worth.gain(store) for store in summary.stores)
    table.add_section()
    table.add_row("mean", *(words.percent(value) for value in means), worth.points(difference), "")
    sentence = worth.verdict(summary.stores)
    return [table, *([sentence] if sentence else [])]


def own_batches(summary: RunSummary, config_toml: str) -> list[str]:
    """Who trained in the last round with another batch size than the configured one, and at which rate."""
    configured = {d.key: d.new for d in differences("", config_toml)}.get("batch-size")
    own: dict[tuple[int, float], list[str]] = {}
    for client in summary.rounds[-1].clients if summary.rounds else ():
        if client.batch_size not in (None, configured):
            own.setdefault((client.batch_size or 0, client.client_lr or 0.0), []).append(words.printable(client.client))
    return [
        f"round {summary.rounds[-1].round}: batches of {size} (configured: {configured}) at the rate {rate:.3g}: "
        + ", ".join(names[:MOST_NAMES])
        + f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)
        for (size, rate), names in sorted(own.items())
    ]


def compare_table(summaries: list[RunSummary], metric: str, settings: dict[str, list[object]]) -> Table:
    """Runs side by side."""

    def figure(value: float | None) -> str:
        return words.number(value) if metric == "train_loss" else words.percent(value)

    series = [series_of(summary, metric) for summary in summaries]
    table = _table("", *(summary.run_id for summary in summaries))
    table.add_row("status", *(summary.status.value for summary in summaries))
    table.add_row("rounds", *(_progress(summary) for summary in summaries))
    table.add_row(f"{metric}, last", *(figure(last_of(values)) for values in series))
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


def series_of(summary: RunSummary, metric: str) -> list[float | None]:
    """The values of a metric, round by round."""
    return [getattr(round_, metric) for round_ in summary.rounds]


def last_of(values: list[float | None]) -> float | None:
    """The newest value."""
    return values[-1] if values else None


def _best(values: list[float | None], metric: str) -> float | None:
    return METRICS[metric]((value for value in values if value is not None), default=None)


def _progress(summary: RunSummary) -> str:
    return f"{len(summary.rounds)}/{_or_dash(summary.num_rounds)}"


def _or_dash(value: int | None) -> str:
    return words.ABSENT if value is None else f"{value:,}"


def utc(seconds: float | None) -> str | None:
    """Seconds since 1970 as a moment."""
    return None if seconds is None else f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _table(*columns: str) -> Table:
    """A table whose columns named with a trailing '>' are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return table
