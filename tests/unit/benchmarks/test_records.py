"""The records of studies: one file, whole after every crash, and the source of the tables in RESULTS.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.__main__ import STUDIES
from benchmarks.records import RecordFile
from benchmarks.studies import study
from benchmarks.studies.study import RECORDS, Experiment, Result, Study
from fedshelf.core.errors import RunError


def test_every_record_of_the_studies_is_a_result_under_its_own_key() -> None:
    lines = [json.loads(line) for line in RECORDS.path.read_text(encoding="utf-8").splitlines()]
    keys = [line["key"] for line in lines]
    assert keys == sorted(set(keys))
    assert len(keys) >= 158
    for key, record in RECORDS.load().items():
        result = Result(**record)
        assert key.endswith(f"_seed_{result.seed}")
        assert len(result.accuracies) == len(result.validation) == len(result.num_bytes)
        assert len(result.num_bytes) == len(result.virtual_seconds)


def test_every_record_belongs_to_an_experiment() -> None:
    known = {experiment.key(seed) for one in STUDIES for experiment in one.experiments for seed in study.SEEDS}
    assert sorted(RECORDS.load().keys() - known) == []


@pytest.mark.parametrize("one", [one for one in STUDIES if one.name != "bytes"], ids=lambda one: one.name)
def test_the_tables_in_the_results_are_those_of_the_records(one: Study, tmp_path: Path) -> None:
    text = results.PATH.read_text(encoding="utf-8")
    section = text[text.index(f"<!-- {one.name} -->") : text.index(f"<!-- end of {one.name} -->")]
    assert one.report(study.results_of(one, tmp_path, tmp_path, recorded=True)) in section


def test_a_recorded_experiment_is_read_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RECORDS", RecordFile(tmp_path / "studies.jsonl"))
    known, unknown = Experiment(name="new name", flags=("--mu", "0.1")), Experiment(name="never run")
    record = {"name": "old name", "seed": 3, "accuracies": [0.5], "validation": [None], "num_bytes": [1]}
    study.RECORDS.add("dirichlet_eight_mu_0.1_seed_3", {**record, "virtual_seconds": [0.0]})
    one = Study(name="x", help="", experiments=(known, unknown), report=lambda found: "")
    (found,) = study.results_of(one, tmp_path, tmp_path, seeds=(3,), recorded=True)
    assert (found.name, found.final_accuracy) == ("new name", 0.5)
    assert study.run(tmp_path, tmp_path, known, 3, 1) == found


def test_records_are_sorted_by_key_and_replaced_by_key(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "folder" / "records.jsonl")
    assert file.load() == {}
    for key, value in (("b", 0.1), ("a", 1 / 3), ("b", 0.3)):
        file.add(key, {"value": value, "name": "5 × slower\u2028"})
    assert file.load() == {
        key: {"value": value, "name": "5 × slower\u2028"} for key, value in (("a", 1 / 3), ("b", 0.3))
    }
    assert [json.loads(line)["key"] for line in file.path.read_text().splitlines()] == ["a", "b"]


def test_processes_that_add_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.records import RecordFile\n"
        "for number in range(20): RecordFile(Path(sys.argv[1])).add(f'{sys.argv[2]}-{number:02}', {})"
    )
    path = tmp_path / "records.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert list(RecordFile(path).load()) == [f"{name}-{number:02}" for name in "ab" for number in range(20)]


def test_a_record_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.add("a", {})
    with pytest.raises(TypeError):
        file.add("b", {"value": object()})
    (tmp_path / "folder").write_text("")
    with pytest.raises(RunError, match="cannot make folder"):
        RecordFile(tmp_path / "folder" / "records.jsonl").add("a", {})
    assert list(file.load()) == ["a"]
