"""Where FedShelf keeps what is its user's, and what it says where there is no such place."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedshelf.config import files, places
from fedshelf.config.schema import ClientConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.system_errors import current_user
from tests.other_user import UID, error_as_other_user


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
