"""What a client is called, and where it keeps its state."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from fedshelf.app.client import ClientPlace, join_of
from fedshelf.core.errors import RunError
from tests.unit.data.samples import write_pack

HOST = socket.gethostname().partition(".")[0]


def place(data: Path, **values: Any) -> ClientPlace:
    """As a client that has started once."""
    made = ClientPlace.of(data, **{"name": None, "state_dir": None, "device": "cpu", **values})
    made.make_state_dir()
    return made


def folder(path: str) -> Path:
    return write_pack(Path(path), {"apple": 2})


@pytest.mark.parametrize("name", ["local_data", "data", "photos", "train", "Photos"])
def test_a_folder_that_is_called_as_in_every_store_is_told_apart_by_its_machine(home: Path, name: str) -> None:
    assert place(folder(name)).name == f"{name}-{HOST}"


def test_any_other_folder_gives_its_own_name(home: Path) -> None:
    assert place(folder("lyon-03")).name == "lyon-03"
    assert place(folder("photos-of-lyon")).name == "photos-of-lyon"


def test_a_second_store_of_the_same_machine_has_another_name_and_state(home: Path) -> None:
    first, second = place(folder("a/local_data")), place(folder("b/local_data"))
    assert (first.name, second.name) == (f"local_data-{HOST}", f"local_data-{HOST}-2")
    assert first.state_dir != second.state_dir
    assert join_of(first).identity != join_of(second).identity
    assert [place(Path(path)).name for path in ("b/local_data", "a/local_data")] == [second.name, first.name]


def test_the_name_is_kept_when_the_machine_is_called_otherwise(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = place(folder("photos"))
    monkeypatch.setattr(socket, "gethostname", lambda: "b7d1c0ffee42")  # as a container is, at each start
    assert place(Path("photos")) == before


def test_a_name_that_was_given_once_is_kept(home: Path) -> None:
    given = place(folder("photos"), name="lyon")
    assert place(Path("photos")) == given
    for name in ("nice", "amiens", "nice", "lyon"):
        assert place(Path("photos"), name=name).name == name
        for record in home.glob("clients/*/client.json"):  # time passes, on a coarse clock too
            os.utime(record, ns=(0, record.stat().st_mtime_ns - 10**9))
        assert place(Path("photos")).name == name, "the last one"


def test_a_state_directory_knows_whose_it_is(home: Path) -> None:
    given = place(folder("photos"), name="lyon", state_dir=Path("state"))
    Path("photos").rename("moved")
    assert place(Path("moved"), state_dir=Path("state")).name == given.name


def test_photos_that_were_moved_keep_their_name(home: Path) -> None:
    before = place(folder("old/photos"))
    Path("new").mkdir()
    Path("old/photos").rename("new/photos")
    assert place(Path("new/photos")).name == before.name


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "x"}', "\x00"])
def test_a_damaged_record_is_as_if_there_were_none(home: Path, content: str) -> None:
    made = place(folder("lyon"))
    (made.state_dir / "client.json").write_text(content)
    assert place(Path("lyon")) == made


def test_a_home_that_cannot_be_written_is_refused_before_the_client_joins(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder("lyon")
    monkeypatch.setenv("FEDSHELF_HOME", "/proc/fedshelf")  # where not even root can make a folder
    for values in ({}, {"state_dir": Path("state")}):
        with pytest.raises(RunError, match=r"cannot write to '/proc/fedshelf/cache' .*set FEDSHELF_HOME"):
            place(Path("lyon"), **values)
