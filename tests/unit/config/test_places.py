"""Where FedShelf keeps what is its user's, and what it says where there is no such place."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedshelf.config import files, places
from fedshelf.config.schema import ClientConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.system_errors import current_user
from tests.other_user import UID, error_as_other_user
from tests.unit.data.samples import write_pack


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that belongs to somebody else, in effect."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


def test_the_home_is_where_the_variable_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.home_directory() == home
    assert {path.parent for path in (places.tls_directory(), places.photo_cache())} == {home}
    assert places.photo_cache().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("FEDSHELF_HOME", "below")
    assert places.home_directory() == Path.cwd() / "below"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a home")
def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "FEDSHELF_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for action in (places.home_directory, places.photo_cache, places.tls_directory):
        text = error_as_other_user(action)
        assert text.startswith(f"user id {UID} has no home directory")
        assert "set FEDSHELF_HOME to a folder" in text


def test_a_home_that_cannot_be_written_is_named_with_its_user(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSHELF_HOME", str(closed / "home"))
    for action in (places.photo_cache, lambda: places.make_home_folder(places.client_directory("lyon"))):
        text = error_as_other_user(action)
        who = f"user id {UID}" if os.geteuid() == 0 else current_user()
        assert text.startswith(f"{who} cannot write to '{closed}/home/c")
        assert text.endswith("(permission denied): set FEDSHELF_HOME to a folder that this user can write to")


@pytest.mark.parametrize("key", ["data-dir", "state-dir", "ca"])
@pytest.mark.parametrize(
    ("path", "said"),
    [("~nobody-of-that-name/photos", "the system knows no home directory for ~nobody-of-that-name"),
     ("a\\u0000b", "holds a null character")],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_one_clear_error(tmp_path: Path, key: str, path: str, said: str) -> None:
    (tmp_path / "client.toml").write_text(f'{key} = "{path}"\n')
    with pytest.raises(UsageError, match=said):
        files.load(ClientConfig, tmp_path / "client.toml", {})


def test_a_working_folder_that_is_gone_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Path(tempfile.mkdtemp(dir=tmp_path))
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match="'photos' is relative to the working folder, which is gone"):
        files.load(ClientConfig, None, {"data_dir": Path("photos")})
    assert files.load(ClientConfig, None, {"data_dir": Path("/photos")}).data_dir == Path("/photos")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("nr_inodes=1", ("no space left on device", "Free some space on that disk")),
        ("ro", ("read-only file system", "That disk is mounted read-only: choose a folder that can be written to")),
    ],
)
@pytest.mark.parametrize("command", ["server", "client --data-dir photos"])
def test_a_home_on_a_disk_that_is_full_or_read_only_is_not_a_matter_of_users(
    home: Path, command: str, options: str, said: tuple[str, str]
) -> None:
    home.mkdir()
    write_pack(Path("photos"), {"apple": 1})
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o {options} none '{home}' || exit 77; "
    done = subprocess.run(
        [*namespace, f"{mount} '{sys.executable}' -m fedshelf {command}"], capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this system lets nobody mount a disk")
    for words in (f"cannot write to '{home}/", *said):
        assert words in done.stderr
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "--insecure" not in done.stderr
