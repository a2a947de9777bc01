"""An interrupted measurement goes on where it was, and a failing peer stops nobody."""

from pathlib import Path

import pytest

from benchmarks import journal
from benchmarks.journal import Contender, Journal, alternate
from benchmarks.measure import MeasurementError, Sample


class Bench:
    """Contenders that note in `ran` when they ran; each fails while it is broken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.progress = folder, folder / "tally"

    def contender(self, name: str, *, peer: bool = False) -> Contender:
        command = ("tests.unit.benchmarks.tally", str(self.progress), name)
        return Contender(name=name, command=command, peer=peer, log=self.folder / f"{name}.log")

    def break_(self, name: str) -> None:
        (self.folder / f"{name}.broken").touch()

    def mend(self, name: str) -> None:
        (self.folder / f"{name}.broken").unlink()

    @property
    def ran(self) -> list[str]:
        return self.progress.read_text().split() if self.progress.exists() else []

    def journal(self, *, fresh: bool = False) -> Journal:
        return Journal(self.folder / "samples" / "x.jsonl", fresh=fresh)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def sample(seconds: float) -> Sample:
    return Sample(seconds=seconds, cpu_seconds=1.0, peak_mb=1.0, processes=1, first_step=None, figures={"a": [1]})


def test_contenders_run_in_turn(bench: Bench) -> None:
    with bench.journal() as book:
        samples = alternate([bench.contender("a"), bench.contender("b")], 2, book)
    assert bench.ran == ["a", "b", "a", "b"]
    assert [each.figures["name"] for each in samples["b"]] == ["b", "b"]


def test_an_interrupted_measurement_goes_on_where_it_was(bench: Bench) -> None:
    entrants = [bench.contender("a"), bench.contender("b")]
    bench.break_("b")
    with bench.journal() as book, pytest.raises(MeasurementError, match="b is broken"):
        alternate(entrants, 2, book)
    bench.mend("b")
    with bench.journal() as book:
        assert len(book) == 1
        alternate(entrants, 2, book)
    assert bench.ran == ["a", "b", "a", "b"]


def test_a_peer_that_fails_stops_nobody_and_is_not_tried_again(bench: Bench) -> None:
    entrants = [bench.contender("a"), bench.contender("b", peer=True)]
    bench.break_("b")
    with bench.journal() as book:
        assert list(alternate(entrants, 2, book)) == ["a"]
    bench.mend("b")
    with bench.journal() as book:
        alternate(entrants, 3, book)
        assert "b is broken" in book.failures["b"]
    assert bench.ran == ["a", "a", "a"]


def test_a_fresh_measurement_begins_anew(bench: Bench) -> None:
    for fresh in (False, True):
        with bench.journal(fresh=fresh) as book:
            assert len(book) == 0
            book.add("a", 1, sample(1.0))


def test_a_finished_measurement_is_kept_and_not_gone_on_with(bench: Bench) -> None:
    with bench.journal() as book:
        book.add("a", 1, sample(1.0))
        book.finish()
    with bench.journal() as book:
        assert len(book) == 0
    assert len(list((bench.folder / "samples").iterdir())) == 2


def test_a_line_that_a_crash_tore_is_dropped(bench: Bench) -> None:
    with bench.journal() as book:
        book.add("a", 1, sample(1.5))
        path = book.path
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    with bench.journal() as book:
        assert book.samples == {("a", 1): sample(1.5)}
        book.fail("b", "why")
    with bench.journal() as book:
        assert (list(book.samples), book.failures) == ([("a", 1)], {"b": "why"})


def test_two_measurements_cannot_share_a_journal(bench: Bench) -> None:
    with bench.journal(), pytest.raises(MeasurementError, match="in use: the same measurement runs already"):
        bench.journal()


def test_what_is_a_day_old_is_not_gone_on_with(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with bench.journal() as book:
        book.add("a", 1, sample(1.0))
    monkeypatch.setattr(journal, "STALE_SECONDS", -1.0)
    with bench.journal() as book:
        assert len(book) == 0


def test_other_code_has_another_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "ROOT", tmp_path)
    for folder in ("src", "benchmarks"):
        (tmp_path / folder).mkdir()
    module, pins = tmp_path / "src" / "a.py", tmp_path / "benchmarks" / "peers.txt"
    digests = set()
    for path, text in ((module, "1"), (module, "2"), (pins, "x==1"), (pins, "x==2")):
        path.write_text(text)
        digests.add(journal.code_digest())
    assert len(digests) == 4
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("results are not code")
    (tmp_path / "benchmarks" / "plots.py").write_text("what reports is not measured")
    assert journal.code_digest() in digests
