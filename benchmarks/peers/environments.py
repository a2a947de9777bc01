"""The peers' environments: one for each file in `requirements/`, made once, repaired when the making broke off."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements")
MARK = ".complete"


class NoEnvironmentError(Exception):
    """A peer's environment could not be made."""


def python_of(name: str, work: Path, *, requirements: Path = REQUIREMENTS) -> Path:
    """The interpreter of environment `name`, which is made now if it is not complete.

    The mark holds the requirements and the Python that it was made from; it is written last, and nothing without the
    right mark is used. A second process that asks for the same environment waits for the first.

    Raises:
        NoEnvironmentError: making it failed; the text names the log.
    """
    folder = work / "environments" / name
    file = requirements / f"{name}.txt"
    wanted = f"{sys.version}\n{file.read_text(encoding='utf-8')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_complete(folder, wanted):
            print(f"making the environment {folder} (minutes, once)", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, file)
            (folder / MARK).write_text(wanted, encoding="utf-8")
    return folder / "bin" / "python"


def is_complete(folder: Path, wanted: str) -> bool:
    """Whether the environment was made to its end, from these requirements."""
    mark = folder / MARK
    return mark.is_file() and mark.read_text(encoding="utf-8") == wanted


def _make(folder: Path, requirements: Path) -> None:
    log = folder.with_suffix(".log")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    with log.open("w", encoding="utf-8") as output:
        for command in ([sys.executable, "-m", "venv", str(folder)], [*install, "--requirement", str(requirements)]):
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                raise NoEnvironmentError(f"the peers' environment {folder.name} could not be made: see {log}")
