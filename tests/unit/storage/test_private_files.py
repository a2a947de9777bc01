"""Files and folders that FedShelf makes: private whatever the umask, and never reached through a symbolic link."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fedshelf.app.client_place import ClientPlace
from fedshelf.config import places
from fedshelf.core.errors import DataError, FedShelfError, RunError
from fedshelf.core.messages import TaskKey
from fedshelf.data.cache import PhotoCache
from fedshelf.data.folder import scan
from fedshelf.deploy.blobs import Incoming
from fedshelf.serialization.blob import Blob
from fedshelf.storage.atomic_files import make_folder, write_atomically
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.client_states import FileClientStates
from fedshelf.storage.held_model import FileHeldModel
from fedshelf.storage.lock import RunLock, owner
from fedshelf.storage.model_files import save_model
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.storage.spool import FileSpool
from fedshelf.tracking.database import RunDatabase
from tests.unit.data.samples import write_pack
from tests.unit.storage.test_spools import upload

KEY = TaskKey(run_id="run", round=1, attempt=0)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def too_open(root: Path) -> dict[str, str]:
    """Paths below `root` that others than the owner may read or write, with their modes."""
    return {
        str(path.relative_to(root)): oct(mode & 0o777)
        for path in root.rglob("*")
        if (mode := path.lstat().st_mode) & 0o077 and not stat.S_ISLNK(mode)
    }


def create(root: Path) -> RunDirectory:
    return RunDirectory.create(root / "runs" / "r", run_id="r", config_toml="rounds = 3\n", config_digest="d")


def receive(directory: Path, start: int = 0) -> None:
    """An upload that has arrived in part, of which `start` bytes were there before."""
    incoming = Incoming(directory)
    incoming.expect(7, "lyon", 1000)
    transfer = incoming.open(7, Blob(pieces=(memoryview(b"x" * 100),)).digest, start=start, size=100)
    transfer.append([b"x" * (50 - start)])


@pytest.mark.usefixtures("open_umask", "home")
def test_all_that_is_written_is_private_whatever_the_umask(home: Path) -> None:
    root = Path.cwd()
    run = create(root)
    photos = write_pack(root.parent / "photos", {"A": 2})
    with run.lock(), closing(RunDatabase(run.database)):
        FileCheckpoints(run.checkpoints)
        receive(run.incoming)
        FileSpool(run.spool).put(KEY, "lyon", upload(1.0))
        save_model(run.best_model, {"w": torch.zeros(2)}, ["a"], {})
        assert {"run.db", "run.db-wal", "run.db-shm", "lock"} <= {path.name for path in run.path.iterdir()}
        assert too_open(root) == {}
    place = ClientPlace.of(photos, name="lyon", state_dir=None, device="cpu")
    with place.lock():
        FileHeldModel(place.state_dir / "model.safetensors").save("m", torch.zeros(3))
        FileClientStates(place.state_dir / "rounds")
        PhotoCache(root=places.photo_cache()).open(scan(photos, val_fraction=0, seed=0).train, 8)
    assert home.stat().st_mode & 0o777 == 0o700
    assert {"index.sqlite", "client.json", "lock", "model.safetensors"} <= {path.name for path in home.rglob("*")}
    assert too_open(home) == {}


def test_a_folder_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o750)
    make_folder(folder / "inner")
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "inner").stat().st_mode & 0o777 == 0o700


def write_pid(path: Path) -> None:
    RunLock(path).release()


FILES: dict[str, Callable[[Path], object]] = {
    "a lock": write_pid,
    "a run database": lambda path: RunDatabase(path).close(),
    "a photo cache": lambda path: PhotoCache(root=path.parent).open(
        scan(write_pack(path.parent.parent / "photos", {"A": 2}), val_fraction=0, seed=0).train, 8
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_link_where_a_file_is_written_is_refused_and_its_target_stays(what: str, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_bytes(b"precious")
    folder.mkdir()
    link = folder / ("index.sqlite" if "cache" in what else "file")
    link.symlink_to(victim)
    with pytest.raises((RunError, DataError), match="symbolic link"):
        FILES[what](link)
    assert victim.read_bytes() == b"precious"
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FedShelfError, match="symbolic link"):
        FILES[what](link)
    assert not (tmp_path / "nowhere").exists()


def test_an_atomic_write_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize(
    "name",
    [
        "lock", "incoming", "spool", "checkpoints", "clients", "stores", "model", "run.db", "config.toml", "run.json",
        "catalogue.json", "engine.json",
    ],
)  # fmt: skip
def test_a_run_with_a_link_in_place_of_its_own_is_not_written_to(name: str, tmp_path: Path) -> None:
    run = create(tmp_path)
    (tmp_path / "victim").mkdir()
    target = tmp_path / "victim" / "it"
    if name in {"config.toml", "run.json"}:
        (run.path / name).rename(target)
    (run.path / name).symlink_to(target)
    with pytest.raises(RunError, match=rf"'.*{name}'.*symbolic link.*remove it"):
        run.lock()


FOLDERS: dict[str, Callable[[Path], object]] = {
    "incoming": receive,
    "spool": lambda path: FileSpool(path).put(KEY, "lyon", upload(1.0)),
    "checkpoints": FileCheckpoints,
    "rounds": FileClientStates,
    "model": lambda path: save_model(path, {"w": torch.zeros(2)}, ["a"], {}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_where_a_folder_is_used_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim" / "inner").mkdir(parents=True)
    old = tmp_path / "victim" / "inner" / "letter"
    old.write_text("precious")
    os.utime(old, (0, 0))
    (tmp_path / name).symlink_to(tmp_path / "victim")
    with pytest.raises(RunError, match="symbolic link"):
        FOLDERS[name](tmp_path / name)
    assert [path.name for path in (tmp_path / "victim").rglob("*")] == ["inner", "letter"]


def test_a_link_among_the_uploads_is_not_followed(tmp_path: Path) -> None:
    receive(tmp_path / "incoming")
    (client,) = (tmp_path / "incoming").iterdir()
    (upload_file,) = client.iterdir()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "letter").write_text("x" * 10)
    os.utime(victim / "letter", (0, 0))
    (tmp_path / "fresh").write_text("x" * 10)
    (tmp_path / "incoming" / "other").symlink_to(victim)
    Incoming(tmp_path / "incoming")
    assert (victim / "letter").exists(), "an old file, but not an upload"
    upload_file.unlink()
    upload_file.symlink_to(tmp_path / "fresh")
    with pytest.raises(FedShelfError, match="symbolic link"):
        receive(tmp_path / "incoming", start=10)
    assert (tmp_path / "fresh").read_text() == "x" * 10


def test_the_owner_of_a_lock_that_is_a_pipe_or_a_link_is_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert owner(tmp_path / "pipe") is None
    with RunLock(tmp_path / "lock"):
        (tmp_path / "link").symlink_to(tmp_path / "lock")
        assert owner(tmp_path / "link") is None
        assert owner(tmp_path / "lock") == os.getpid()


def test_a_run_that_is_removed_leaves_what_its_links_lead_to(tmp_path: Path) -> None:
    run = create(tmp_path)
    (tmp_path / "victim").mkdir()
    (run.path / "extra").symlink_to(tmp_path / "victim")
    run.remove()
    assert not run.path.exists()
    assert (tmp_path / "victim").is_dir()
