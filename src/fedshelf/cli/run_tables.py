"""The tables and sentences of `fedshelf runs`. Imported only when a command needs them."""

import datetime

from fedshelf.cli.tables import Column, Table
from fedshelf.core.choices import Candidate
from fedshelf.core.events import NOT_TOLD, Participation, RoundVoid
from fedshelf.core.text import counted, some
from fedshelf.reporting import gain_report, stragglers
from fedshelf.reporting.formatting import ABSENT, caveats, duration, number, percent, size, sparkline
from fedshelf.reporting.privacy_report import PrivacyReport
from fedshelf.storage.run_directory import differences
from fedshelf.tracking.product_results import TEST, VALIDATION
from fedshelf.tracking.queries import LOST, RunSummary
from fedshelf.tracking.terminal import make_console, wrapped

MOST_PRODUCTS = 5  # in a table of products
WITHOUT_GLOBAL_MODEL = ("fedbn", "fedper", "fedrep", "ditto")  # stores evaluate a model with their own tensors
METRICS = {"accuracy": max, "central_accuracy": max, "train_loss": min}


def list_table(summaries: list[RunSummary]) -> Table:
    """Create a table with one row per run."""
    table = _table(
        "run", "status", "rounds>", "accuracy>", "central>", "best round>", "parameters>?", "accuracy so far?"
    )
    for summary in summaries:
        accuracies = series_of(summary, "accuracy")
        table.add(
            summary.run_id,
            summary.status.value,
            _progress(summary),
            percent(last_of(accuracies)),
            percent(last_of(series_of(summary, "central_accuracy"))),
            _or_dash(summary.best_round),
            _or_dash(summary.num_parameters),
            sparkline(accuracies),
            notes=[summary.reason] * (summary.reason in LOST),
        )
    return table


def heading(summary: RunSummary, config_toml: str, *, width: int) -> list[str]:
    """Return the lines before a run's rounds; `width` limits the curve's length."""
    bound = {d.key: d.new for d in differences("", config_toml)}.get("norm-bound", "auto")
    reason = f" ({summary.reason})" if summary.reason else ""
    facts = {
        "rounds": _progress(summary), "best round": _or_dash(summary.best_round),
        "parameters": _or_dash(summary.num_parameters), "norm bound": str(bound),
        "started": utc(summary.started) or ABSENT,
    }  # fmt: skip
    lines = [
        f"run {summary.run_id}: {summary.status.value}{reason}",
        ", ".join(f"{name} {fact}" for name, fact in facts.items() if fact != ABSENT),
    ]
    if curve := sparkline(series_of(summary, "accuracy"), width=min(60, width - len("accuracy "))):
        lines.append(f"accuracy {curve}")
    return lines


def rounds_table(summary: RunSummary) -> Table:
    """Create a table with one row per round, with notes on clients that were not counted."""
    table = _table(
        "round>", "stores>", "loss>", "accuracy>", "central>", "time>?", "virtual time>", "up>", "down>"
    )  # fmt: skip
    for round_ in summary.rounds:
        missing = [client for client in round_.clients if client.status != "counted"]
        table.add(
            f"{round_.round}{'*' * (round_.round == summary.best_round)}",
            f"{len(round_.clients) - len(missing)}/{len(round_.clients)}",
            number(round_.train_loss),
            percent(round_.accuracy),
            percent(round_.central_accuracy),
            duration(round_.seconds),
            duration(round_.virtual_seconds),
            size(round_.bytes_up),
            size(round_.bytes_down),
            notes=list(map(_missing, missing)),
        )
    return table


def remarks_on(summary: RunSummary) -> list[str]:
    """Return the lines after a run's rounds."""
    remarks = [_void(void) for void in summary.voids]
    in_a_row = stragglers.StragglerTracker()
    for round_ in summary.rounds:
        in_a_row.add(round_.clients)
    if sentence := stragglers.advice(in_a_row.habits()):
        remarks.append(sentence)
    remarks += [f"refused {client}: {reason}" for client, reason in sorted(summary.refused.items())]
    remarks += caveats(summary.num_classes, summary.num_test, summary.num_test_left_out)
    return ["* best round"] * (summary.best_round is not None) + remarks


def privacy_lines(report: PrivacyReport | None) -> list[str]:
    """Return the lines that say what a run's noise guarantees."""
    if report is None:
        return []
    found, whose = report.guarantee, report.client
    what = f"each photo of {whose}, the least protected store," if whose else "each store"
    count = report.num_releases[whose]
    sentence = (
        f"privacy: ε = {found.epsilon:.3g} for {what} at δ = {found.delta:g}, after {counted(count, 'release')}, "
        "under the assumptions that 'fedshelf runs show --json' lists"
    )
    return [*wrapped(sentence, make_console().width)]


def _void(void: RoundVoid) -> str:
    missing = "; ".join(_missing(client) for client in void.clients if client.status != "counted")
    said = f"round {void.round}, attempt {void.attempt + 1} was void: {void.reason}"
    return f"{said} ({missing})" if missing else said


def _missing(client: Participation) -> str:
    return f"{client.client} {client.status.value}{': ' * bool(client.reason)}{client.reason}"


def gain_table(summary: RunSummary) -> list[Table | str]:
    """Return the table of each store's gain, if the stores have compared models."""
    if not summary.stores:
        return []
    table = _table("store", "local only>", "global>", "personalized>", "gain>", "keeps")
    for store in summary.stores:
        accuracies = (percent(store.accuracies.get(candidate)) for candidate in Candidate)
        gain = gain_report.points(gain_report.gain(store))
        is_told = store.reason != NOT_TOLD
        keeps = store.best.value if store.best else "nothing" if is_told else "not told"
        table.add(store.client, *accuracies, gain, keeps, notes=[store.reason] * bool(store.reason and is_told))
    means = [gain_report.mean(store.accuracies.get(candidate) for store in summary.stores) for candidate in Candidate]
    difference = gain_report.points(gain_report.mean(gain_report.gain(store) for store in summary.stores))
    table.add(f"mean of {counted(len(summary.stores), 'store')}", *map(percent, means), difference, "")
    sentence = gain_report.verdict(summary.stores)
    return [table, *([sentence] if sentence else [])]


def product_tables(summary: RunSummary, *, personalize: object) -> list[Table | str]:
    """Return accuracy by level of the product tree, the weakest products, and those most often mixed up.

    Args:
        summary: the run.
        personalize: the run's way of personalization.
    """
    results, lines = summary.results, list[Table | str]()
    on = {TEST: TEST, VALIDATION: f"the {VALIDATION} of {counted(results.num_stores, 'store')}"}
    if personalize in WITHOUT_GLOBAL_MODEL:
        on[VALIDATION] += ", each with its own model"
    if len(results.levels) > 1:
        levels = ", ".join(f"{level.depth}: {percent(level.accuracy)}" for level in results.levels)
        lines.append(f"accuracy by level of folders, on {on[results.levels_on]}: {levels}")
    if results.products:
        table = _table("product", "photos>", "right>", "accuracy>")
        for found in sorted(results.products, key=lambda p: (p.correct / p.total, -p.total, p.product))[:MOST_PRODUCTS]:
            table.add(found.product, f"{found.total:,}", f"{found.correct:,}", percent(found.correct / found.total))
        without = (summary.num_classes or 0) - len(results.products)
        has = "has" if without == 1 else "have"
        others = f" ({without:,} more {has} no {results.products_on})" if without > 0 else ""
        known = counted(len(results.products), "product")
        lines += [f"weakest of {known}{others}, on {on[results.products_on]}:", table]
    if results.confusion:
        table = _table("product", "taken for", "photos>")
        for wrong in results.confusion[:MOST_PRODUCTS]:
            table.add(wrong.product, wrong.taken_for, f"{wrong.photos:,}")
        lines += [f"most often mixed up, on {TEST}:", table]
    if results.num_withheld:
        lines.append(f"{counted(results.num_withheld, 'store')} withheld the results by product (--policy)")
    return lines


def own_batches(summary: RunSummary, config_toml: str) -> list[str]:
    """List the clients with their own batch size in the last round, and their learning rates."""
    configured = {d.key: d.new for d in differences("", config_toml)}.get("batch-size")
    own: dict[tuple[int, float], list[str]] = {}
    for client in summary.rounds[-1].clients if summary.rounds else ():
        if client.batch_size not in (None, configured):
            own.setdefault((client.batch_size or 0, client.client_lr or 0.0), []).append(client.client)
    return [
        f"round {summary.rounds[-1].round}: batches of {batch_size} (configured: {configured}) at the rate {rate:.3g}: "
        + some(names)
        for (batch_size, rate), names in sorted(own.items())
    ]


def compare_tables(
    summaries: list[RunSummary], metric: str, settings: dict[str, list[object]], *, width: int
) -> list[Table]:  # fmt: skip
    """Create the tables that compare runs.

    Args:
        summaries: the runs.
        metric: the metric to compare round by round.
        settings: by key, the values that differ.
        width: the available width.

    Returns:
        The metrics, side by side if that fits, and the differing settings.
    """

    def figure(value: float | None) -> str:
        return number(value) if metric == "train_loss" else percent(value)

    table = _table(
        "run", "rounds>", f"{metric}>", "best>", "time>", "up>", "down>", "status?", "parameters>?", "curve?"
    )  # fmt: skip
    for summary in summaries:
        values = series_of(summary, metric)
        table.add(
            summary.run_id,
            _progress(summary),
            figure(last_of(values)),
            figure(_best(values, metric)),
            duration(sum(round_.seconds or 0.0 for round_ in summary.rounds)),
            size(sum(round_.bytes_up for round_ in summary.rounds)),
            size(sum(round_.bytes_down for round_ in summary.rounds)),
            summary.status.value,
            _or_dash(summary.num_parameters),
            sparkline(values),
        )
    differing = _table("setting", *(summary.run_id for summary in summaries))
    for key, of_runs in settings.items():
        differing.add(key, *(ABSENT if value is None else str(value) for value in of_runs))
    transposed = table.transposed()
    return [transposed if transposed.fits(width) else table, differing]


def series_of(summary: RunSummary, metric: str) -> list[float | None]:
    """Return the values of a metric, round by round."""
    return [getattr(round_, metric) for round_ in summary.rounds]


def last_of(values: list[float | None]) -> float | None:
    """Return the last value."""
    return values[-1] if values else None


def _best(values: list[float | None], metric: str) -> float | None:
    return METRICS[metric]((value for value in values if value is not None), default=None)


def _progress(summary: RunSummary) -> str:
    return f"{summary.num_done}/{_or_dash(summary.num_rounds)}"


def _or_dash(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def utc(seconds: float | None) -> str | None:
    """Format seconds since 1970 as UTC time."""
    return None if seconds is None else f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _table(*columns: str) -> Table:
    """Create a table; `name>` is a numeric column, `name?` an optional one."""
    return Table(
        columns=[Column(name=c.rstrip(">?"), is_figure=">" in c, is_optional=c.endswith("?")) for c in columns]
    )
