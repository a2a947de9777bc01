"""What was measured so far, so that an interrupted measurement goes on where it was."""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.measure import MeasurementError, Sample, measure

ROOT = Path(__file__).resolve().parents[1]
STALE_SECONDS = 24 * 3600.0  # a machine has another mood tomorrow: what is older is not gone on with

REPORTING = {f"{name}.py" for name in ("__main__", "compare", "guard", "plots", "results", "training", "transport")}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One side of a comparison: a program, and the environment it runs in.

    Attributes:
        name: as in tables.
        command: the module and its arguments.
        peer: whether others go on when it fails.
        log: where its standard error goes; None is ours.
    """

    name: str
    command: Sequence[str]
    python: Path = Path(sys.executable)
    environment: Mapping[str, str] = field(default_factory=dict)
    patience: float = 3600.0
    peer: bool = False
    log: Path | None = None


def code_digest() -> str:
    """Names the code that is measured: samples of other code are not gone on with. What only reports is left out."""
    digest = hashlib.sha256(sys.version.encode())
    files = [path for folder in ("src", "benchmarks") for path in (ROOT / folder).rglob("*")]
    reporting = {ROOT / "benchmarks" / name for name in REPORTING}
    for path in sorted(path for path in files if path.suffix in (".py", ".txt") and path not in reporting):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Journal:
    """A file with one line of JSON per run of a contender; only one process at a time may hold it.

    A line that was torn by a crash is dropped. `finish` puts the file aside, so that the next measurement is a new one.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Open or make it.

        Args:
            path: the file.
            fresh: begin anew, whatever is there.

        Raises:
            MeasurementError: another process holds it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise MeasurementError(
                f"{path} is in use: the same measurement runs already. Wait for it, or give another --work"
            ) from error
        if fresh or time.time() - path.stat().st_mtime > STALE_SECONDS:
            self._file.truncate(0)
        self.samples: dict[tuple[str, int], Sample] = {}
        self.failures: dict[str, str] = {}
        self._read(self._file)

    def _read(self, file: IO[str]) -> None:
        file.seek(0)
        whole = 0
        for line in file:
            if not line.endswith("\n"):
                break
            whole += len(line.encode())
            entry = json.loads(line)
            if "failure" in entry:
                self.failures[entry["contender"]] = entry["failure"]
            else:
                self.samples[entry["contender"], entry["run"]] = Sample(**entry["sample"])
        file.truncate(whole)

    def __len__(self) -> int:
        return len(self.samples) + len(self.failures)

    def add(self, contender: str, run: int, sample: Sample) -> None:
        self.samples[contender, run] = sample
        self._append({"contender": contender, "run": run, "sample": asdict(sample)})

    def fail(self, contender: str, reason: str) -> None:
        self.failures[contender] = reason
        self._append({"contender": contender, "failure": reason})

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Keep the file under another name."""
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self.path.rename(self.path.with_name(f"{self.path.stem}-{stamp}{self.path.suffix}"))
        self.close()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def alternate(contenders: Sequence[Contender], runs: int, journal: Journal) -> dict[str, list[Sample]]:
    """Run all contenders in turn, `runs` times over, so that a change of the machine's mood meets all alike.

    What the journal has is not run again. A peer that fails is left out from then on; the journal says why.

    Raises:
        MeasurementError: a contender failed that is no peer.
    """
    for run in range(1, runs + 1):
        for contender in contenders:
            name = contender.name
            if name in journal.failures or (name, run) in journal.samples:
                continue
            try:
                sample = measure(
                    contender.command, python=contender.python, environment=contender.environment,
                    patience=contender.patience, log=contender.log,
                )  # fmt: skip
            except MeasurementError as error:
                if not contender.peer:
                    raise
                journal.fail(name, str(error))
                print(f"run {run}/{runs}  {name:<30} failed: {error}", file=sys.stderr, flush=True)
                continue
            journal.add(name, run, sample)
            print(
                f"run {run}/{runs}  {name:<30} {sample.seconds:7.2f} s  {sample.cpu_seconds:7.2f} CPU s  "
                f"{sample.peak_mb:7.0f} MB",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return {
        contender.name: [journal.samples[contender.name, run] for run in range(1, runs + 1)]
        for contender in contenders
        if contender.name not in journal.failures
    }
