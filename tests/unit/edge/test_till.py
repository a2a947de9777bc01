"""The command `fedshelf-edge`: the flags of `fedshelf edge`, and little memory."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from fedshelf.cli.edge import app
from fedshelf.edge.serving.corrections import Corrections
from fedshelf.edge.till import main
from tests.edge_models import photo


def flags_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")}


@pytest.mark.parametrize(
    "path", [("serve",), ("quantize",), ("corrections", "list"), ("corrections", "undo"), ("corrections", "review")]
)
def test_it_has_the_flags_of_fedshelf_edge(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    command: click.Command = typer.main.get_command(app)
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    with pytest.raises(SystemExit, match="0"):
        main([*path, "--help"])
    shown = capsys.readouterr().out
    assert {word.rstrip(",") for word in shown.replace("[", " ").replace("]", " ").split() if word[:2] == "--"} - {
        "--help"
    } == flags_of(command) - {"--help", "--help-all"}


def test_the_command_line_loads_nothing_that_only_training_needs() -> None:
    code = """
import sys
from fedshelf.edge.till import main
try:
    main(["serve", "missing.onnx", "--port", "0"])
except SystemExit as end:
    print(end.code, sorted({"torch", "typer", "rich", "pydantic", "flwr", "cryptography"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "1 []"
    assert done.stderr.startswith("error: model file '")


def test_corrections_are_listed_reviewed_and_undone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Gala").mkdir()
    store = Corrections(tmp_path, labels=("Gala",), paths=("Gala",))
    gala, kiwi = (store.file(photo((9, 9, n)), name, source=name) for n, name in enumerate(("Gala", "Kiwi")))

    def said(*arguments: str) -> str:
        main(["corrections", *arguments])
        return capsys.readouterr().out

    listed = json.loads(said("list", str(tmp_path), "--json"))
    assert [(record["id"], record["status"]) for record in listed] == [(gala.id, "training"), (kiwi.id, "inbox")]
    assert kiwi.id in said("review", str(tmp_path))
    assert gala.id not in said("review", str(tmp_path))
    assert "Accepted" in said("review", str(tmp_path), "--accept", kiwi.id)
    assert (tmp_path / "Kiwi").is_dir()
    assert said("undo", str(tmp_path), gala.id).startswith(f"Took back {gala.id}, Gala.")
    with pytest.raises(SystemExit, match="2"):
        main(["corrections", "undo", str(tmp_path), "unknown"])
    assert capsys.readouterr().err.startswith("error: ")


def test_a_wrong_flag_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "m.onnx", "--port", "70000"])
    assert "70000 is not between 0 and 65535" in capsys.readouterr().err
