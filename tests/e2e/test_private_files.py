"""Real servers and clients in a folder that others can write to, with a umask that protects nothing."""

import os
import stat
import sys
from pathlib import Path

import pytest

from tests.processes import Process, Site

pytestmark = pytest.mark.e2e


def too_open(root: Path) -> dict[str, str]:
    """Paths below `root` that others may read, with their modes; the certificates are public, in a private folder."""
    found = {}
    for path in root.rglob("*"):
        mode = path.lstat().st_mode
        if mode & 0o077 and not stat.S_ISLNK(mode) and path.suffix != ".pem":
            found[str(path.relative_to(root))] = oct(mode & 0o777)
    return found


def without_umask(site: Site, *arguments: str) -> Process:
    """A command of FedShelf with umask 0, as a shell starts it."""
    return site.start("/bin/sh", "-c", 'umask 000; exec "$@"', "sh", sys.executable, "-m", *arguments)


def test_what_a_server_and_its_clients_write_is_private_whatever_the_umask(pair: Site) -> None:
    run = pair.root / "run"
    common = ("--address", pair.address, "--min-clients", "2", "--rounds", "2", "--run-dir", str(run), "--json")
    server = without_umask(
        pair, "fedshelf", "server", "--width", "8", "--image-size", "16", "--batch-size", "8", *common
    )
    orders = ("--do", "hold@2", "--until", str(pair.root))
    first, second = pair.names
    connect = ("--server-address", pair.address)
    held = without_umask(pair, "tests.odd_client", "--data-dir", str(pair.stores / first), *connect, *orders)
    client = without_umask(pair, "fedshelf", "client", "--data-dir", str(pair.stores / second), *connect)
    server.wait_for("upload_received", round=2)
    assert too_open(run) == {}, "with an upload in the spool, and the database open"
    assert [path.name for path in (run / "spool").rglob("*.json")] != []
    pair.release(2)
    assert [process.end() for process in (server, held, client)] == [0, 0, 0], server.text()
    assert (run / "model" / "model.safetensors").is_file()
    assert too_open(run) == {}
    assert too_open(pair.root / "home") == {}


@pytest.mark.parametrize("name", ["incoming", "lock"])
def test_a_server_does_not_follow_a_link_that_somebody_put_into_its_run(pair: Site, name: str) -> None:
    run, victim = pair.root / "run", pair.root / "victim"
    (victim / "letters").mkdir(parents=True)
    letter = victim / "letters" / "old"
    letter.write_text("precious")
    os.utime(letter, (0, 0))
    server = pair.server("--rounds", "2", "--run-dir", str(run))
    server.wait_for_text("listening on")
    server.kill()
    (run / "lock").unlink()
    (run / name).symlink_to(victim if name == "incoming" else letter)
    again = pair.server("--rounds", "2", "--run-dir", str(run))
    assert again.end() == 1
    assert f"'{run / name}': it is a symbolic link" in again.text()
    assert "Traceback" not in again.text()
    assert letter.read_text() == "precious"
