"""An interrupted measurement resumes, and a peer that fails stops no other program."""

from pathlib import Path

import pytest

from benchmarks import samples
from benchmarks.measure import MeasurementError, Program, Sample
from benchmarks.samples import SampleLog, run_in_turn
from fedshelf.core.errors import RunError


class Programs:
    """Programs that record in `ran` when they ran; each fails while it is broken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"

    def make(self, name: str, *, is_peer: bool = False) -> Program:
        command = ("tests.unit.benchmarks.run_or_fail", str(self.runs), name)
        return Program(name=name, command=command, is_peer=is_peer, log=self.folder / f"{name}.log")

    def break_(self, name: str) -> None:
        (self.folder / f"{name}.broken").touch()

    def mend(self, name: str) -> None:
        (self.folder / f"{name}.broken").unlink()

    @property
    def ran(self) -> list[str]:
        return self.runs.read_text().split() if self.runs.exists() else []

    def log(self, *, fresh: bool = False) -> SampleLog:
        return SampleLog(self.folder / "samples" / "x.jsonl", fresh=fresh)


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


def sample(seconds: float) -> Sample:
    return Sample(seconds=seconds, cpu_seconds=1.0, peak_mb=1.0, processes=1, first_step=None, figures={"a": [1]})


def test_programs_run_in_turn(programs: Programs) -> None:
    with programs.log() as log:
        found = run_in_turn([programs.make("a"), programs.make("b")], 2, log)
    assert programs.ran == ["a", "b", "a", "b"]
    assert [each.figures["name"] for each in found["b"]] == ["b", "b"]


def test_an_interrupted_measurement_resumes(programs: Programs) -> None:
    both = [programs.make("a"), programs.make("b")]
    programs.break_("b")
    with programs.log() as log, pytest.raises(MeasurementError, match="b is broken"):
        run_in_turn(both, 2, log)
    programs.mend("b")
    with programs.log() as log:
        assert len(log) == 1
        run_in_turn(both, 2, log)
    assert programs.ran == ["a", "b", "a", "b"]


def test_a_peer_that_fails_is_not_tried_again_and_the_others_are_measured(programs: Programs) -> None:
    both = [programs.make("a"), programs.make("b", is_peer=True)]
    programs.break_("b")
    with programs.log() as log:
        assert list(run_in_turn(both, 2, log)) == ["a"]
    programs.mend("b")
    with programs.log() as log:
        run_in_turn(both, 3, log)
        assert "b is broken" in log.failures["b"]
    assert programs.ran == ["a", "a", "a"]


def test_a_fresh_measurement_starts_anew(programs: Programs) -> None:
    for fresh in (False, True):
        with programs.log(fresh=fresh) as log:
            assert len(log) == 0
            log.add("a", 1, sample(1.0))


def test_a_finished_measurement_is_kept_and_not_resumed(programs: Programs) -> None:
    with programs.log() as log:
        log.add("a", 1, sample(1.0))
        log.archive()
    with programs.log() as log:
        assert len(log) == 0
    assert len(list((programs.folder / "samples").glob("*.jsonl"))) == 1


def test_samples_and_failures_are_read_as_they_were_written(programs: Programs) -> None:
    with programs.log() as log:
        log.add("a", 1, sample(1.5))
        log.fail("b", "why")
    with programs.log() as log:
        assert (log.samples, log.failures) == ({("a", 1): sample(1.5)}, {"b": "why"})


def test_two_measurements_cannot_share_a_file(programs: Programs) -> None:
    with programs.log(), pytest.raises(RunError, match=r"x\.jsonl' is in use by process .* or give another --work"):
        programs.log()


def test_samples_of_another_day_are_not_mixed_in(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    with programs.log() as log:
        log.add("a", 1, sample(1.0))
    monkeypatch.setattr(samples, "MAX_AGE_SECONDS", -1.0)
    with programs.log() as log:
        assert len(log) == 0


def test_other_code_has_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ROOT", tmp_path)
    for folder in ("src", "benchmarks"):
        (tmp_path / folder).mkdir()
    module, pins = tmp_path / "src" / "a.py", tmp_path / "benchmarks" / "peers.txt"
    digests = set()
    for path, text in ((module, "1"), (module, "2"), (pins, "x==1"), (pins, "x==2")):
        path.write_text(text)
        digests.add(samples.code_digest())
    assert len(digests) == 4
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("results are not code")
    (tmp_path / "benchmarks" / "plots.py").write_text("a module that only reports")
    assert samples.code_digest() in digests


def test_every_module_that_only_reports_exists() -> None:
    assert [name for name in samples.REPORTING if not (samples.ROOT / "benchmarks" / name).is_file()] == []
