"""Files are the old or the new."""

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedshelf.core.errors import RunError
from fedshelf.storage.atomic_files import (
    LEFTOVER,
    Data,
    make_folder,
    remove_leftovers,
    temporary_folder,
    translating_os_errors,
    write_atomically,
    write_together,
)


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """A disk that is full, as far as the kernel lets a test have one without being root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_bytes_and_pieces_are_written_whole(tmp_path: Path) -> None:
    pieces: list[bytes | memoryview] = [b"a", memoryview(b"bc")]
    cases: list[tuple[Data, bytes]] = [
        ("für", "für".encode()),
        (b"abc", b"abc"),
        (iter(pieces), b"abc"),
    ]
    for data, expected in cases:
        write_atomically(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == expected


def test_a_write_that_finds_no_room_leaves_the_old_file_whole_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with no_file_above(1 << 16), pytest.raises(RunError, match="lift it"):
        write_atomically(path, b"x" * (1 << 20))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_of_files_written_together_none_is_replaced_if_one_cannot_be(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_together({first: b"old", second: b"old"})
    with no_file_above(1 << 16), pytest.raises(RunError, match="second"):
        write_together({first: b"new", second: b"x" * (1 << 20)})
    assert (first.read_bytes(), second.read_bytes()) == (b"old", b"old")
    assert names(tmp_path) == ["first", "second"]


def test_a_producer_that_fails_midway_leaves_the_old_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("no more")

    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(ValueError, match="no more"):
        write_atomically(tmp_path / "file", pieces())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "Free some space"), (errno.EROFS, "read-only"), (errno.EACCES, "the right to write")],
)
def test_errors_of_the_system_say_where_why_and_what_to_do(number: int, advice: str) -> None:
    with pytest.raises(RunError, match=advice) as raised, translating_os_errors("write", Path("/some/file")):
        raise OSError(number, os.strerror(number))
    assert "cannot write '/some/file'" in str(raised.value)
    assert os.strerror(number) in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="the right to write"):
        write_atomically(tmp_path / "file", b"new")


def test_a_system_without_a_folder_for_temporary_files_is_told_which_variable_names_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with temporary_folder("fedshelf-") as folder:
        assert Path(folder).is_dir()
    assert not Path(folder).exists()
    monkeypatch.setattr(tempfile, "tempdir", "/proc/absent")  # where nobody can write
    with pytest.raises(RunError, match=r"cannot make a temporary folder \(no such file or directory\): set .*TMPDIR"):
        temporary_folder("fedshelf-")


def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="A file stands where a folder is needed"):
        make_folder(tmp_path / "runs" / "one")


def test_only_what_was_never_finished_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / f".round.safetensors.ab12{LEFTOVER}").write_text("half")
    (tmp_path / "round.safetensors").write_text("whole")
    (tmp_path / ".hidden").write_text("somebody's")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "round.safetensors"]
