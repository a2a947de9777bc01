"""Did FedShelf become slower than it was, or a limit slower than it should be?

    python -m benchmarks.guard

Compares the last record of every benchmark in `results.json` with the one before it, as ratios to the limit taken in
the same runs: a slower machine slows both. And it guards the limits themselves, since a slow limit flatters FedShelf:
two processes over one process must stay inside a band, and on one machine a limit's seconds must stay what they were.
Exit code 1 and a text where something is out of bounds.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import results
from benchmarks.results import LIMIT, ONE_PROCESS, OURS

TOLERANCE = 0.10  # of a ratio: medians of five runs on a busy machine differ by 5 %
LIMIT_TOLERANCE = 0.50  # of a limit's seconds on the same machine, which has its moods
BANDS = {"pilot": (0.70, 0.90), "chain": (0.45, 0.70)}
"""Two processes over one process: 0.82 and 0.63 when the limits were frozen; 0.77, and 0.48 to 0.59, on another day."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison, in a sentence."""

    text: str
    bad: bool


def judge(benchmark: str, records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """All findings about one benchmark.

    Args:
        benchmark: its name.
        records: its entries in `results.json`, oldest first.
    """
    last, earlier = records[-1], records[:-1]
    findings = [_band(benchmark, last)] if benchmark in BANDS else []
    if not earlier:
        return [*findings, Finding(text=f"{benchmark}: the first record, nothing to compare with", bad=False)]
    for name in last["figures"]:
        if name not in earlier[-1]["figures"]:
            continue
        if name.partition(",")[0] == OURS:
            findings.append(_ratio(benchmark, name, last, earlier[-1]))
        elif name.partition(",")[0] == LIMIT:
            findings.append(_seconds(benchmark, name, last, earlier[-1]))
    return findings


def _ratio(benchmark: str, name: str, last: Mapping[str, Any], before: Mapping[str, Any]) -> Finding:
    now, then = (float(record["figures"][name]["ratio"]) for record in (last, before))
    change = now / then - 1
    text = f"{benchmark}: {name} takes {now:.2f} × the limit, {then:.2f} on {before['date']} ({change:+.0%})"
    if change <= TOLERANCE:
        return Finding(text=text, bad=False)
    return Finding(text=f"{text}; at most {TOLERANCE:+.0%} is allowed: find out what became slower", bad=True)


def _seconds(benchmark: str, name: str, last: Mapping[str, Any], before: Mapping[str, Any]) -> Finding:
    now, then = (float(record["figures"][name]["seconds"]) for record in (last, before))
    text = f"{benchmark}: the {name} takes {now:.3g} s, {then:.3g} s on {before['date']}"
    if last["machine"] != before["machine"]:
        return Finding(text=f"{text}, on another machine", bad=False)
    if now <= then * (1 + LIMIT_TOLERANCE):
        return Finding(text=text, bad=False)
    return Finding(
        text=f"{text}; at most {LIMIT_TOLERANCE:+.0%} is allowed on the same machine: the limit was made slow, or "
        "something else used the machine",
        bad=True,
    )


def _band(benchmark: str, record: Mapping[str, Any]) -> Finding:
    figures = record["figures"]
    if ONE_PROCESS not in figures:
        return Finding(text=f"{benchmark}: the limit was not checked (measure with --one-process)", bad=False)
    low, high = BANDS[benchmark]
    found = float(figures[LIMIT]["seconds"]) / float(figures[ONE_PROCESS]["seconds"])
    text = f"{benchmark}: two processes take {found:.2f} × one process ({low:.2f} to {high:.2f} is right)"
    if found > high:
        return Finding(text=f"{text}: the limit was made slow, or something else used the machine", bad=True)
    if found < low:
        why = "the plain loop in one process was made slow, or the limit faster (then move the band, and say why)"
        return Finding(text=f"{text}: {why}", bad=True)
    return Finding(text=text, bad=False)


def main() -> int:
    """The exit code: 0 all in bounds, 1 something is not, or there is nothing to judge."""
    records = results.load()
    if not records:
        print(f"{results.RECORDS} holds no records: run `make bench` first", file=sys.stderr)
        return 1
    findings = [finding for name in sorted(records) for finding in judge(name, records[name])]
    for finding in findings:
        print(f"{'BAD ' if finding.bad else 'ok  '} {finding.text}")
    return int(any(finding.bad for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
