"""The peers' environments: one for each file in `requirements/`, made once, and again after an interruption."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

from fedshelf.core.errors import FedShelfError

REQUIREMENTS = Path(__file__).with_name("requirements")
MARKER = ".complete"


class PeerEnvironmentError(FedShelfError):
    """A peer's environment could not be made."""


def python_of(name: str, work: Path, *, requirements: Path = REQUIREMENTS) -> Path:
    """Return the interpreter of an environment, which is made now if it is not complete.

    A marker holds the requirements and the version of Python that it was made from. It is written last, and an
    environment without the right marker is made again. A second process that asks for the same environment waits.

    Args:
        name: The name of its file of requirements.
        work: The folder for environments.
        requirements: The folder of that file.

    Raises:
        PeerEnvironmentError: Making it failed; the message names the log.
    """
    folder = work / "environments" / name
    file = requirements / f"{name}.txt"
    wanted = f"{sys.version}\n{file.read_text(encoding='utf-8')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = folder / MARKER
        if not (marker.is_file() and marker.read_text(encoding="utf-8") == wanted):
            print(f"making the environment {folder} (takes minutes, once)", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, file)
            marker.write_text(wanted, encoding="utf-8")
    return folder / "bin" / "python"


def _make(folder: Path, requirements: Path) -> None:
    log = folder.with_suffix(".log")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    with log.open("w", encoding="utf-8") as output:
        for command in ([sys.executable, "-m", "venv", str(folder)], [*install, "--requirement", str(requirements)]):
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                raise PeerEnvironmentError(f"the peers' environment {folder.name} could not be made: see {log}")
