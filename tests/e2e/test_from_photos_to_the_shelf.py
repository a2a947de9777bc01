"""The how-to page of the whole way, run as it stands: only its ports and the length of its training are the test's."""

import re
import shlex
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port
from tests.processes import Process, Site

pytestmark = pytest.mark.e2e

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "from-photos-to-the-shelf.md"


def commands() -> list[str]:
    """The page's commands, in order."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def ask(command: list[str]) -> dict[str, object]:
    """Do what `curl` would do, and return the server's JSON."""
    fields = dict(command[i + 1].split("=", 1) for i, word in enumerate(command) if word == "-F")
    file = Path(fields.pop("file").removeprefix("@"))
    answer = httpx.post(command[-1], files={"file": file.read_bytes()}, data=fields, timeout=120)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


def text_of(process: Process) -> str:
    return "\n".join(str(event["text"]) for event in process.events if event["event"] == "text")


def test_the_whole_way_of_the_page_works_from_the_first_command_to_the_last(
    tmp_path: Path, pair: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ports = {"8080": str(free_port()), "8765": str(free_port())}
    background: list[Process] = []
    answers: list[dict[str, object]] = []
    said = ""
    for published in commands():
        command = published
        for port, free in ports.items():
            command = command.replace(f":{port}", f":{free}").replace(f"--port {port}", f"--port {free}")
        words = shlex.split(command.removesuffix("&"))
        if words[0] == "curl":
            answers.append(ask(words))
        elif words[0] == "fedshelf":
            process = pair.fedshelf(*words[1:])
            if not command.endswith("&"):
                assert process.end() == 0, f"{command}\n{text_of(process)}\n{process.text()}"
                said = text_of(process)
                continue
            background.append(process)
            if words[1] == "edge":
                process.wait_for("text")  # it says its address once it serves
        else:
            assert words[:2] == ["pip", "install"], command
    served, server, other = background
    assert server.end() == 0, server.text()
    assert other.end() == 0, other.text()
    assert served.running()
    named, filed = answers
    assert len(named["predictions"]) == 5  # type: ignore[arg-type]
    assert filed["status"] == "training", filed
    run = pair.show(tmp_path / "runs" / "next")["run_id"]
    assert f"1 correction was first in round 1 of {run}" in said
