"""The mistakes that people make most: each is told as what happened, to what, why, and what to do."""

import socket
from pathlib import Path

import pytest

from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.storage.run_directory import RunDirectory
from tests.unit.cli.screen import run, run_on_terminal, too_wide, write_file
from tests.unit.data.samples import write_pack

TINY = ["--image-size", "16", "--width", "8", "--batch-size", "4", "--device", "cpu", "--rounds", "1"]
RUN_ID = "20261121-083512-a1b2"


@pytest.fixture
def stores(home: Path) -> Path:
    for name in ("lyon", "oslo"):
        write_pack(Path("stores") / name, {"apple": 5, "milk": 4})
    RunDirectory.create(Path("runs") / RUN_ID, run_id=RUN_ID, config_toml="", config_digest="")
    return Path("stores")


USAGE = {
    "missing flag": (
        "client",
        "error: --data-dir is missing: the folder of the store's photos, with one folder per product",
    ),
    "missing argument": (
        "runs show",
        "error: missing argument RUN: a run's folder, its id, or the beginning of its id\n"
        "Try 'fedshelf runs show --help'.",
    ),
    "unknown flag": (
        "simulate --data-dir stores --roundz 3",
        "error: unknown flag '--roundz': did you mean '--rounds'?\nTry 'fedshelf simulate --help'.",
    ),
    "flag of another command": (
        "server --workers 2",
        "error: unknown flag '--workers' for 'fedshelf server': it belongs to 'fedshelf simulate' and "
        "'fedshelf distill'\nTry 'fedshelf server --help'.",
    ),
    "flag without its value": (
        "server --rounds",
        "error: --rounds needs a value",
    ),
    "unknown command": (
        "simulat",
        "error: unknown command 'simulat': did you mean 'simulate'?\nTry 'fedshelf --help'.",
    ),
    "unknown key": (
        "simulate --config run.toml",
        "error: unknown key 'client-lrr' in run.toml: did you mean 'client-lr'?\n"
        "error: rounds = 0 in run.toml: must be at least 1",
    ),
    "wrong type": (
        "simulate --rounds many --client-lr 0 --augment --algorithm fedavgg",
        "error: --client-lr 0: must be more than 0\n"
        f"error: --algorithm fedavgg: must be one of {', '.join(ALGORITHMS)}: did you mean 'fedavg'?\n"
        "error: --rounds many: not a whole number",
    ),
    "number too large": (
        "simulate --rounds 9223372036854775808 --seed 9223372036854775808",
        "error: --rounds 9223372036854775808: must be at most 1,000,000\n"
        "error: --seed 9223372036854775808: must be at most 9,223,372,036,854,775,807",
    ),
    "number out of range": (
        "predict x.jpg --top 0",
        "error: --top 0: must be at least 1\nTry 'fedshelf predict --help'.",
    ),
    "two wrong values": (
        "privacy audit run --photos 0 --canaries many",
        "error: --photos 0: must be at least 1\nerror: --canaries many: not a whole number\n"
        "Try 'fedshelf privacy audit --help'.",
    ),
    "large number": (
        "data partition photos --out stores --stores 9999999999999999999999",
        "error: --stores 9999999999999999999999: must be at most 1,000,000\nTry 'fedshelf data partition --help'.",
    ),
    "not a number": (
        "data partition photos --out stores --alpha even",
        "error: --alpha even: not a number\nTry 'fedshelf data partition --help'.",
    ),
    "not a date": (
        "audit-log --prune-before 2099-99-99",
        "error: --prune-before 2099-99-99: not a date. Write it as YYYY-MM-DD, such as 2026-11-30\n"
        "Try 'fedshelf audit-log --help'.",
    ),
    "not a choice": (
        "data partition photos --out stores --mode idd",
        "error: --mode idd: must be one of iid, dirichlet, assortment, feature: did you mean 'iid'?\n"
        "Try 'fedshelf data partition --help'.",
    ),
    "missing photo": (
        "predict",
        "error: missing argument PATH...: photos to name, or folders of photos\nTry 'fedshelf predict --help'.",
    ),
    "missing flag of a command with arguments": (
        "data partition photos",
        "error: missing flag --out PATH: folder to create, with one folder per store\n"
        "Try 'fedshelf data partition --help'.",
    ),
    "unknown module": (
        "simulate --data-dir stores --model nowhere:make",
        "error: --model nowhere:make: there is no module 'nowhere' here, except perhaps in Python itself. Give the "
        "folder that it lies in with --model-path DIR",
    ),
    "missing folder": ("simulate --data-dir store", "error: --data-dir {cwd}/store: no such folder"),
    "unknown run": (
        "runs show 20261121-0836",
        f"error: unknown run '20261121-0836' in 'runs': did you mean '{RUN_ID}'? 'fedshelf runs list' shows all",
    ),
    "unknown model": (
        "simulate --data-dir stores --model resnet_18",
        "error: unknown model 'resnet_18': did you mean 'resnet18'?",
    ),
    "unknown codec": (
        "simulate --data-dir stores --codec-up topk:0.1+int9 --codec-down zsdt",
        "error: --codec-up topk:0.1+int9: unknown codec 'int9': did you mean 'int8'?\n"
        "error: --codec-down zsdt: unknown codec 'zsdt': did you mean 'zstd[:LEVEL]'?",
    ),
}


@pytest.mark.parametrize("mistake", USAGE)
def test_a_wrong_call_is_exit_code_2_and_says_what_to_do(
    stores: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(Path("run.toml"), "client-lrr = 0.1\nrounds = 0\n")
    call, said = USAGE[mistake]
    expected = said.format(cwd=Path.cwd())
    assert run(*call.split()) == (2, expected + "\n")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "dumb")
    code, shown = run_on_terminal(*call.split())
    assert code == 2
    assert too_wide(shown, 60) == []
    assert shown.split() == expected.split(), "a terminal breaks lines between words"


def test_a_port_in_use_is_told_with_its_address(stores: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        code, shown = run("server", "--address", address, "--insecure", *TINY)
    assert code == 1
    assert f"error: the server cannot listen on {address}: another program" in shown
    assert "--address" in shown
    assert "Traceback" not in shown


def test_a_run_that_another_process_runs_is_told_with_its_process(stores: Path) -> None:
    command = ["simulate", "--data-dir", "stores", "--run-dir", "r", *TINY]
    assert run(*command)[0] == 0
    with RunDirectory.open(Path("r")).lock():
        code, shown = run(*command)
    assert code == 1
    assert shown.splitlines()[-1].startswith("error: the run in ")
    assert "is in use by process" in shown
    assert "choose another --run-dir" in shown


def test_a_run_with_other_settings_is_told_with_both_values(stores: Path) -> None:
    command = ["simulate", "--data-dir", "stores", "--run-dir", "r", *TINY]
    assert run(*command)[0] == 0
    code, shown = run(*command, "--seed", "3", "--norm", "group")
    assert code == 1
    assert shown == (
        f"error: run {RunDirectory.open(Path('r')).run_id} in {Path.cwd()}/r was started with other settings (norm: "
        "'batch' → 'group', seed: 0 → 3). Start it with the old ones, or choose another --run-dir\n"
    )


def test_names_in_an_error_cannot_control_the_terminal(home: Path) -> None:
    code, shown = run("simulate", "--data-dir", "st\x1b[2Jore\n")
    assert code == 2
    assert shown == f"error: --data-dir {Path.cwd()}/st\\x1b[2Jore\\x0a: no such folder\n"


def test_what_the_output_cannot_encode_is_escaped(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    from fedshelf.cli.app import main

    for encoding in ("ascii", "latin-1"):
        with io.TextIOWrapper(io.BytesIO(), encoding=encoding) as stream, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            with pytest.raises(SystemExit):
                main(["predict", "x.jpg", "--run", "店"])
            stream.flush()
            assert b"\\u5e97" in stream.buffer.getvalue()
