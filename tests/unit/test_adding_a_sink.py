"""The sink of the how-to page, added to a copy of the project as the page says."""

import csv
from pathlib import Path

from tests.howto import run_with
from tests.unit.data.samples import write_pack

PROGRAM = """
run = ["--run-dir", "run"]
wrong = simulate(*run, "--csv", "missing/rounds.csv")
right = simulate(*run, "--csv", "rounds.csv")
more = simulate(*run, "--extend", "1", "--csv", "more.csv")
without = simulate("--run-dir", "other")

from pathlib import Path

sent = "csv" in Path("run/config.toml").read_text()
print(json.dumps([wrong, right, more, without, sent]))
"""


def test_the_sink_of_the_page_writes_its_file_if_its_flag_is_given(tmp_path: Path) -> None:
    write_pack(tmp_path / "stores" / "lyon", {"apple": 4, "milk": 4})
    ended = run_with("add-a-sink.md", PROGRAM, tmp_path)
    assert "--csv" in ended.stderr
    assert "there is no such folder. Create it first" in ended.stderr
    assert ended.result == [2, 0, 0, 0, False], "another file is not another run"
    for name, expected in (("rounds.csv", "1"), ("more.csv", "2")):
        ((number, _, loss, seconds),) = csv.reader((tmp_path / name).read_text(encoding="utf-8").splitlines())
        assert number == expected
        assert float(loss) > 0
        assert float(seconds) > 0
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["more.csv", "rounds.csv"]
