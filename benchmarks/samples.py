"""Runs programs in turn, and keeps every sample, so that an interrupted measurement resumes."""

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import MeasurementError, Program, Sample, measure
from benchmarks.records import RecordFile
from fedshelf.storage.lock import RunLock

ROOT = Path(__file__).resolve().parents[1]
MAX_AGE_SECONDS = 24 * 3600.0  # machines vary from day to day: older samples are not mixed with new ones
REPORTING = {f"{name}.py" for name in ("__main__", "guard", "plots", "results", "training", "wire")}
"""Modules that decide how results look, not what they are."""


def code_digest() -> str:
    """Return a digest of the code that is measured: samples of other code are not mixed in."""
    digest = hashlib.sha256(sys.version.encode())
    files = [path for folder in ("src", "benchmarks") for path in (ROOT / folder).rglob("*")]
    reporting = {ROOT / "benchmarks" / name for name in REPORTING}
    for path in sorted(path for path in files if path.suffix in (".py", ".txt") and path not in reporting):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class SampleLog:
    """The samples of one measurement, kept in a file that only one process at a time may use.

    Args:
        path: The file.
        fresh: Discard the samples that it holds.

    Attributes:
        samples: By program and run.
        failures: Why peers failed, by program.

    Raises:
        RunError: Another process uses the file.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = RunLock(
            path.with_suffix(".lock"), what=f"the measurement in '{path}'", instead="give another --work"
        )
        if path.exists() and (fresh or time.time() - path.stat().st_mtime > MAX_AGE_SECONDS):
            path.unlink()
        self._records = RecordFile(path)
        self.samples: dict[tuple[str, int], Sample] = {}
        self.failures: dict[str, str] = {}
        for record in self._records.load().values():
            if "failure" in record:
                self.failures[record["program"]] = record["failure"]
            else:
                self.samples[record["program"], record["run"]] = Sample(**record["sample"])

    def __len__(self) -> int:
        return len(self.samples) + len(self.failures)

    def add(self, program: str, run: int, sample: Sample) -> None:
        """Keep the sample of a program's run."""
        self.samples[program, run] = sample
        self._records.add(f"{program}, run {run}", {"program": program, "run": run, "sample": asdict(sample)})

    def fail(self, program: str, reason: str) -> None:
        """Keep why a peer failed; it is not run again."""
        self.failures[program] = reason
        self._records.add(f"{program}, failure", {"program": program, "failure": reason})

    def archive(self) -> None:
        """Rename the file, so that the next measurement starts anew."""
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self.path.rename(self.path.with_name(f"{self.path.stem}-{stamp}{self.path.suffix}"))

    def __enter__(self) -> "SampleLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def run_in_turn(programs: Sequence[Program], runs: int, log: SampleLog) -> dict[str, list[Sample]]:
    """Run all programs in turn, `runs` times, so that changes of the machine's load affect all of them alike.

    Runs that the log holds are not repeated. A peer that fails is left out from then on.

    Args:
        programs: What to run.
        runs: Runs of each.
        log: Where samples and failures are kept.

    Returns:
        The samples by program, without the programs that failed.

    Raises:
        MeasurementError: A program failed that is not a peer.
    """
    for run in range(1, runs + 1):
        for program in programs:
            name = program.name
            if name in log.failures or (name, run) in log.samples:
                continue
            try:
                sample = measure(program)
            except MeasurementError as error:
                if not program.is_peer:
                    raise
                log.fail(name, str(error))
                print(f"run {run}/{runs}  {name:<30} failed: {error}", file=sys.stderr, flush=True)
                continue
            log.add(name, run, sample)
            print(
                f"run {run}/{runs}  {name:<30} {sample.seconds:7.2f} s  {sample.cpu_seconds:7.2f} CPU s  "
                f"{sample.peak_mb:7.0f} MB",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return {
        program.name: [log.samples[program.name, run] for run in range(1, runs + 1)]
        for program in programs
        if program.name not in log.failures
    }
