"""*guard*: tells whether FedShelf has become slower, or a limit slower than it should be.

It compares the last record of every benchmark in `results.json` with the one before, as ratios to the limit in the same
runs: a slower machine slows both. It guards the limits as well, since a slow limit flatters FedShelf: the time of two
processes over that of one must stay inside a band, and on the same machine a limit must take as long as before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import results
from benchmarks.measure import MeasurementError
from benchmarks.results import FEDSHELF, LIMIT, ONE_PROCESS

TOLERANCE = 0.10  # of a ratio: on a busy machine, medians of five runs differ by 5 %
LIMIT_TOLERANCE = 0.50  # of a limit's seconds: the same machine varies, too
BANDS = {"pilot": (0.70, 0.90), "chain": (0.45, 0.70)}
"""Two processes over one: 0.82 and 0.63 when the limits were written, 0.77 and 0.48 to 0.59 on another day."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison.

    Attributes:
        text: The comparison in a sentence.
        bad: Whether it is out of bounds.
    """

    text: str
    bad: bool


def judge(benchmark: str, records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Return all findings about one benchmark.

    Args:
        benchmark: Its name.
        records: Its entries in `results.json`, oldest first.
    """
    last, earlier = records[-1], records[:-1]
    found = [_band(benchmark, last)] if benchmark in BANDS else []
    if not earlier:
        return [*found, Finding(text=f"{benchmark}: first record, nothing to compare it with", bad=False)]
    for name in last["figures"]:
        if name not in earlier[-1]["figures"]:
            continue
        if name.partition(",")[0] == FEDSHELF:
            found.append(_ratio(benchmark, name, last, earlier[-1]))
        elif name.partition(",")[0] == LIMIT:
            found.append(_seconds(benchmark, name, last, earlier[-1]))
    return found


def _ratio(benchmark: str, name: str, last: Mapping[str, Any], before: Mapping[str, Any]) -> Finding:
    now, then = (float(record["figures"][name]["ratio"]) for record in (last, before))
    change = now / then - 1
    text = f"{benchmark}: {name} takes {now:.2f} × the limit, {then:.2f} on {before['date']} ({change:+.0%})"
    if change <= TOLERANCE:
        return Finding(text=text, bad=False)
    return Finding(text=f"{text}; at most {TOLERANCE:+.0%} is allowed: find out what has become slower", bad=True)


def _seconds(benchmark: str, name: str, last: Mapping[str, Any], before: Mapping[str, Any]) -> Finding:
    now, then = (float(record["figures"][name]["seconds"]) for record in (last, before))
    text = f"{benchmark}: the {name} takes {now:.3g} s, {then:.3g} s on {before['date']}"
    if last["machine"] != before["machine"]:
        return Finding(text=f"{text}, on another machine", bad=False)
    if now <= then * (1 + LIMIT_TOLERANCE):
        return Finding(text=text, bad=False)
    return Finding(
        text=f"{text}; at most {LIMIT_TOLERANCE:+.0%} is allowed on the same machine: the limit has become slower, or "
        "something else was using the machine",
        bad=True,
    )


def _band(benchmark: str, record: Mapping[str, Any]) -> Finding:
    figures = record["figures"]
    if ONE_PROCESS not in figures:
        return Finding(text=f"{benchmark}: the limit was not checked: measure with --one-process", bad=False)
    low, high = BANDS[benchmark]
    found = float(figures[LIMIT]["seconds"]) / float(figures[ONE_PROCESS]["seconds"])
    text = f"{benchmark}: two processes take {found:.2f} × one process ({low:.2f} to {high:.2f} is right)"
    if found > high:
        return Finding(text=f"{text}: the limit has become slower, or something else was using the machine", bad=True)
    if found < low:
        reason = "the plain loop in one process has become slower, or the limit faster (then move the band and say why)"
        return Finding(text=f"{text}: {reason}", bad=True)
    return Finding(text=text, bad=False)


def findings() -> list[Finding]:
    """Return the findings about all benchmarks.

    Raises:
        MeasurementError: There are no records.
    """
    if not (records := results.load()):
        raise MeasurementError(f"'{results.RECORDS}' holds no records: run `make bench` first")
    return [finding for name in sorted(records) for finding in judge(name, records[name])]
