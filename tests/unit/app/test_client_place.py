"""What a client is called, and where it keeps its state."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from fedshelf.app.client_place import ClientPlace, join_of
from fedshelf.core import class_folder
from fedshelf.core.errors import DataError, RunError
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
    first.make_state_dir()
    second.make_state_dir()
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


def test_a_folder_of_more_products_than_a_store_can_have_is_refused_before_it_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_folder, "MAX_DEPTH", 1)
    data = write_pack(tmp_path / "lyon", {"fruit/apple": 2})
    made = ClientPlace.of(data, name="lyon", state_dir=tmp_path / "state", device="cpu")
    with pytest.raises(
        DataError, match="cannot be a store's folder: a class folder lies 2 folders deep, 1 is the most"
    ):
        join_of(made)


def test_another_name_is_advised_for_other_photos_only(home: Path) -> None:
    first = place(folder("a/photos"), name="lyon")
    with first.lock():
        for data, advice in (("a/photos", "or wait for it: it uses the same photos"), ("b/photos", "another --name")):
            with pytest.raises(RunError, match=advice):
                ClientPlace.of(folder(data), name="lyon", state_dir=None, device="cpu").lock()
