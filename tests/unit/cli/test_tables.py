"""Tables on narrow and wide terminals, with the names and numbers that stores really have."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fedshelf.cli.tables import Column, Table
from fedshelf.core.choices import Candidate
from fedshelf.core.events import (
    ClientStatus,
    Participation,
    RoundFinished,
    RoundVoid,
    RunEnded,
    RunStarted,
    RunStatus,
    StoreComparison,
    StoresCompared,
)
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.database import RunDatabase
from tests.unit.cli.screen import ESCAPES, cells, run, run_on_terminal, too_wide
from tests.unit.data.samples import write_pack

WIDTHS = [60, 80, 120]
LONG = "20261121-083512-a1b2-" + "the-autumn-campaign-in-all-stores-of-the-north-" * 2 + "end"
RUN_IDS = ["20261121-083512-a1b2", "20261122-070000-c3d4", "20261123-235959-ffff", LONG]
ODD_STORES = [
    "北京王府井大街第一分店",
    "🍎 fruit & more",
    "[bold]Lyon[/bold]",
    "magasin-de-la-place-de-la-République-à-côté-de-la-gare",
]
STORES = sorted([f"store-{number:02}" for number in range(36)] + ODD_STORES)
PRODUCTS = [
    "Arla-Ko-Ekologisk-Mellanmjölk-1,5%-färskmjölk-1500-ml-återförslutningsbar", "苹果/红富士", "🥑", "Milk [organic]",
    "Dairy/Milk/Garant-Ecological-Standard-Milk", "Apple",
]  # fmt: skip
REASONS = {
    ClientStatus.LATE: "no answer within 1800 s: after 312.4 s a quorum is enough, and 27 of 40 stores had answered",
    ClientStatus.OFFLINE: "the process of store-07 was ended by SIGSEGV (a crash in native code)",
    ClientStatus.FAILED: "cannot read /srv/photos/0123456789/0123456789/0123456789/0123456789/0123456789/train",
}


def make_run(root: Path, run_id: str, *, num_rounds: int = 12, has_tests: bool = True, seed: int = 0) -> RunDirectory:
    """A run of 40 stores with misses, a void attempt and a comparison."""
    rng = random.Random(seed)
    config = f'client-lr = {0.01 * (seed + 1)}\nmodel = "resnet10"\ndata-dir = "/srv/{run_id}/stores"\n'
    directory = RunDirectory.create(root / run_id, run_id=run_id, config_toml=config, config_digest=str(seed))
    database = RunDatabase(directory.database, now=lambda: 1_795_250_112.0)
    database.emit(
        RunStarted(
            run_id=run_id, num_rounds=num_rounds, first_round=1, num_parameters=11_689_512, num_classes=81,
            min_clients=40,
        )
    )  # fmt: skip
    database.emit(RoundVoid(round=1, attempt=0, reason="counted 12 of 40, the quorum is 27", clients=()))
    for number in range(1, num_rounds + 1):
        clients = []
        for store in STORES:
            status = rng.choice([*[ClientStatus.COUNTED] * 9, *REASONS])
            clients.append(Participation(client=store, status=status, reason=REASONS.get(status, "")))
        database.emit(
            RoundFinished(
                round=number, attempt=1, clients=tuple(clients), train_loss=12.345 / number, accuracy=number / 20,
                central_accuracy=number / 21 if has_tests else None, central_loss=None, seconds=59 * 60 + 59.0,
                bytes_up=345_600_000, bytes_down=1_234_500_000, best_round=number,
                virtual_seconds=86_399.0 if has_tests else None,
            )
        )  # fmt: skip
    accuracies = {candidate: rng.random() for candidate in Candidate}
    compared = [
        StoreComparison(client=s, best=Candidate.PERSONALIZED, accuracies=accuracies, on_test=True) for s in STORES[:-1]
    ]
    compared.append(
        StoreComparison(client=STORES[-1], best=None, accuracies={}, on_test=False, reason="the store left early")
    )
    database.emit(StoresCompared(round=num_rounds, stores=tuple(compared)))
    database.emit(RunEnded(status=RunStatus.FINISHED))
    database.close()
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed, run_id in enumerate(RUN_IDS):
        make_run(folder, run_id, seed=seed, has_tests=seed != 1)
    return folder


@pytest.fixture
def photos(home: Path) -> Path:
    write_pack(Path("photos"), dict.fromkeys(PRODUCTS, 4))
    return Path("photos")


Show = Callable[..., tuple[int, str]]


def shown(show: Show, *arguments: str) -> str:
    """What a command shows, without escape sequences."""
    code, text = show(*arguments)
    assert code == 0
    return ESCAPES.sub("", text)


@pytest.mark.parametrize("show", [run, run_on_terminal])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_list_of_runs_fits_with_whole_ids(
    root: Path, width: int, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown(show, "runs", "list", "--root", str(root))
    assert too_wide(text, width) == []
    assert set(RUN_IDS) <= set(text.split())
    assert text.count("12/12") == 4
    if width != 60:  # the rows are lists there
        assert ("▁" in text) == (width == 120), "the curve goes first where there is no place for it"
        assert all(line.split()[1] == "finished" for line in text.splitlines()[3:]), "short ids keep their place"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("run_id", RUN_IDS)
def test_a_run_round_by_round_fits_with_whole_names_and_paths(
    root: Path, run_id: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown(run_on_terminal, "runs", "show", run_id, "--root", str(root))
    assert too_wide(text, width) == []
    assert run_id in text
    for whole in (*STORES, "/srv/photos/0123456789/0123456789/0123456789/0123456789/0123456789/train", "1.2 GB"):
        assert whole in text
    has_tests = run_id != RUN_IDS[1]
    assert ("central" in text) == ("virtual time" in text) == has_tests, "a column without values is left out"
    assert "mean of 40 stores" in text
    assert "\n    the store left early\n" in text
    *_, sentence = text.strip().split("\n\n")
    assert "of 39 stores" in " ".join(sentence.split())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("number", [2, 3, 4])
def test_any_number_of_runs_is_compared_with_whole_ids_and_paths(
    root: Path, number: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown(run_on_terminal, "runs", "compare", *RUN_IDS[:number], "--root", str(root))
    assert too_wide(text, width) == []
    for run_id in RUN_IDS[:number]:
        assert run_id in text
        assert f"/srv/{run_id}/stores" in text
    assert text.count("60.0 %") == 2 * number, "last and best accuracy of each"
    assert all(text.count(f"0.0{seed + 1}") >= 1 for seed in range(number)), "the settings that differ"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_check_of_photos_fits_with_whole_class_names(
    photos: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown(run_on_terminal, "data", "check", str(photos))
    assert too_wide(text, width) == []
    for name in PRODUCTS:
        assert name in text
    heading = next(line.split() for line in text.splitlines() if line.startswith("class "))
    assert heading[:2] == ["class", "train"]
    assert "unusable" not in heading, "nothing is unusable: the column is left out"


def test_in_a_pipe_every_run_and_every_reason_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = shown(run, "runs", "list", "--root", str(root)).splitlines()
    assert [line.split()[0] for line in lines] == ["run", *reversed(RUN_IDS)]
    lines = shown(run, "runs", "show", RUN_IDS[0], "--root", str(root)).splitlines()
    assert any(line.strip() == f"store-08 late: {REASONS[ClientStatus.LATE]}" for line in lines)


def test_a_terminal_s_own_width_counts_where_columns_is_not_set(root: Path) -> None:
    """A process of its own, on a terminal of 60 columns."""
    import fcntl
    import os
    import pty
    import struct
    import subprocess
    import sys
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environment = {**{k: v for k, v in os.environ.items() if k != "COLUMNS"}, "TERM": "xterm", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "fedshelf", "runs", "list", "--root", str(root)]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        assert process.wait(60) == 0
    os.close(slave)
    text = os.read(master, 65536).decode()
    os.close(master)
    assert "\x1b" not in text, "NO_COLOR"
    assert too_wide(text, 60) == []
    assert max(cells(line) for line in text.split("\r\n") if LONG not in line) > 45, "the width is used"


def test_cells_stand_below_each_other_whatever_their_script() -> None:
    table = Table(columns=[Column(name="store"), Column(name="gain", is_figure=True)])
    table.add("北京店", "+1.0")
    table.add("oslo", "-12.5")
    assert list(table.lines(80)) == ["store    gain", "北京店   +1.0", "oslo    -12.5"]


def test_a_name_that_is_too_long_stands_above_its_figures() -> None:
    table = Table(columns=[Column(name="class"), Column(name="train", is_figure=True)])
    table.add("a-very-long-class-name", "12")
    table.add("milk", "7", notes=["3 copies of the same photo"])
    assert list(table.lines(20)) == [
        "class  train", "a-very-long-class-name", "          12", "milk       7", "    3 copies of the",
        "    same photo",
    ]  # fmt: skip


def test_where_no_columns_fit_rows_become_lists() -> None:
    table = Table(columns=[Column(name="run"), Column(name="status"), Column(name="data-dir"), Column(name="rounds")])
    table.add("20261121-083512-a1b2", "finished", "/srv/stores-of-the-north", "12/12")
    assert list(table.lines(40)) == [
        "20261121-083512-a1b2", "    status finished,", "    data-dir /srv/stores-of-the-north,", "    rounds 12/12",
    ]  # fmt: skip
