"""The command line as people and scripts meet it: help, exit codes, no traceback for a mistake."""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from click import Group
from typer.testing import CliRunner

from fedshelf.cli.app import app, main
from tests.unit.data.samples import write_pack
from tests.users import ordinary_user

COMMANDS = [
    "demo", "server", "client", "enroll add", "enroll rotate", "enroll revoke", "enroll list", "enroll import",
    "enroll key", "enroll tokens", "enroll cancel", "enroll renumber",
    "audit-log", "privacy audit", "privacy explain", "privacy ledger", "privacy receipt", "simulate", "predict",
    "distill", "evaluate", "export", "runs list", "runs show",
    "edge quantize", "edge serve", "edge corrections list", "edge corrections undo", "edge corrections review",
    "runs compare", "runs stop", "data partition", "data make-demo", "data fetch", "data synthetic-sales", "data check",
    "privacy epsilon", "catalogue add", "catalogue alias", "catalogue list",
]  # fmt: skip
TINY = ["--image-size", "16", "--width", "8", "--batch-size", "4", "--device", "cpu", "--rounds", "1"]


def fedshelf(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    try:
        main(list(arguments))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


class AnyWith(str):
    """Equal to any text that has this in it."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) in other


@pytest.fixture
def stores(home: Path) -> Path:
    for name in ("lyon", "oslo"):
        write_pack(Path("stores") / name, {"apple": 5, "Milk [organic]": 4})
    write_pack(Path("test"), {"apple": 2, "Milk [organic]": 2})
    return Path("stores")


@pytest.mark.parametrize(
    "command",
    [
        ["runs", "show", "closed/run"], ["runs", "stop", "closed/run"], ["runs", "list", "--root", "closed/runs"],
        ["predict", "photo.jpg", "--run", "closed/run"], ["evaluate", "photos", "--run", "closed/run"],
        ["data", "check", "closed/photos"], ["data", "partition", "photos", "--out", "closed/out", "--stores", "2"],
        ["data", "make-demo", "closed/demo"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_folder_that_is_closed_to_the_user_is_a_sentence(
    home: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    for module in ("app.predictor", "cli.run_tables", "data.demo", "data.health", "data.partition"):
        importlib.import_module(f"fedshelf.{module}")  # they may be closed to the other user
    write_pack(Path("photos"), {"apple": 9, "milk": 9})
    Path("photo.jpg").touch()
    Path("closed").mkdir()
    Path("closed").chmod(0)
    with ordinary_user():
        code, _, error = fedshelf(capsys, *command)
    assert code == 1
    assert re.match(r"error: .*closed.*[Pp]ermission denied", error), error


def test_the_list_of_commands_is_whole() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, Group)

    def names(group: Group, above: str = "") -> Iterator[str]:
        for name, command in group.commands.items():
            if isinstance(command, Group):
                yield from names(command, f"{above}{name} ")
            else:
                yield f"{above}{name}"

    found = list(names(group))
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_s_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    assert f"Example: fedshelf {command}" in " ".join(result.output.split())


def test_help_tells_defaults_also_of_zero_and_one() -> None:
    text = " ".join(CliRunner().invoke(app, ["simulate", "--help-all"]).output.split())
    defaults = {"--threads": "1", "--seed": "0", "--fraction": "1.0", "--client-lr": "0.05", "--extend": "0"}
    for flag, default in defaults.items():
        described = text[text.index(f"{flag} ") + len(flag) :].split(" --")[0]
        assert f"[default: {default}]" in described, flag


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys\nfrom fedshelf.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'flwr', 'timm', 'numpy', 'cv2', 'sqlite3') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "simulate" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulate"], "--data-dir is missing"),
        (["simulate", "--rounds", "0"], "--rounds 0: must be at least 1"),
        (["simulate", "--config", "absent.toml"], "absent.toml"),
        (["simulate", "--data-dir", "stores", "--extend", "3"], "--run-dir"),
        (["client", "--data-dir", "absent"], "no such folder"),
        (["client", "--data-dir", "stores", "--server-address", "0.0.0.0:8080"], "is what a server listens on"),
        (["client", "--data-dir", "stores", "--server-address", "a..b:8080"], "between two of its dots"),
        (["client", "--data-dir", "stores", "--ca", "~nobody-of-that-name/ca.pem"], "no home directory for"),
        (["server", "--advertise", "shop.example", "--advertise", "0.0.0.0"], "--advertise 0.0.0.0 is not an address"),
        (["server", "--address", f"{'a' * 70}:8080"], "more than 63 characters"),
        (["client", "--data-dir", "stores", "--active-hours", "22-6"], "'22-6' is no window"),
        (["client", "--data-dir", "stores", "--time-zone", "UTC"], "--active-hours"),
        (["predict", "x.jpg", "--run", "absent"], "absent"),
        (["predict", "x.jpg"], "no client on this machine keeps a model yet"),
        (["evaluate", "test"], "no client on this machine keeps a model yet"),
        (["nonsense"], "unknown command 'nonsense': the commands are demo, server, client"),
    ],
)
def test_a_wrong_call_is_exit_code_2_with_a_reason(
    stores: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, _, error = fedshelf(capsys, *arguments)
    assert code == 2
    assert said in error


def test_a_server_whose_file_names_attackers_does_not_start(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text('attack = "scale"\nattackers = 2\n')
    code, _, error = fedshelf(capsys, "server", "--config", "run.toml", "--address", "127.0.0.1:1")
    assert code == 2
    assert "attack = 'scale': only a simulation has attackers" in error
    assert [path.name for path in Path().iterdir()] == ["run.toml"], "there is no run of it"


def test_what_fails_is_exit_code_1_with_a_reason(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = fedshelf(capsys, "simulate", "--data-dir", "stores", "--model", "resnet_18", *TINY)
    assert code == 2, "a name that is wrong is wrong usage"
    assert error.strip() == "error: unknown model 'resnet_18': did you mean 'resnet18'?"
    Path("empty").mkdir()
    code, _, error = fedshelf(capsys, "simulate", "--data-dir", "empty")
    assert code == 1
    assert "contains no folders" in error


def test_a_start_that_is_refused_leaves_no_run_behind(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("twice.txt").write_text("apple\napple\n")
    Path("mine").mkdir()
    Path("mine/.note").touch()
    simulate = ["simulate", "--data-dir", "stores", *TINY]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = [
            (1, ["server", "--address", f"127.0.0.1:{taken.getsockname()[1]}"], "listens there"),
            (1, [*simulate, "--catalogue", "twice.txt"], "'apple' is there twice"),
            (2, [*simulate, "--byte-budget", "0.0001"], "--byte-budget"),
            (2, [*simulate, "--byte-budget", "0.0001", "--run-dir", "mine"], "--byte-budget"),
        ]
        for code, arguments, said in refused:
            assert fedshelf(capsys, *arguments)[::2] == (code, AnyWith(said))
    assert json.loads(fedshelf(capsys, "runs", "list", "--json")[1]) == []
    assert [path.name for path in Path("mine").iterdir()] == [".note"]
    assert not any(Path("runs").iterdir())


def test_a_run_from_start_to_prediction(
    stores: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Path("run.toml").write_text('data-dir = "stores"\nrounds = 9\nval-fraction = 0.3\n')
    code, out, _ = fedshelf(
        capsys, "simulate", "--config", "run.toml", "--test-dir", "test", "--run-dir", "r", "--json", *TINY
    )  # fmt: skip
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert len(events) >= 5, "one JSON object a line and nothing else"

    code, out, _ = fedshelf(capsys, "runs", "show", "r", "--json")
    shown = json.loads(out)
    assert code == 0
    assert set(shown) >= {"run_id", "status", "rounds", "best_round", "num_parameters", "void_rounds"}
    assert shown["status"] == "finished"
    (record,) = shown["rounds"]
    assert set(record) >= {"round", "train_loss", "accuracy", "central_accuracy", "seconds", "bytes_up", "bytes_down",
                           "clients"}  # fmt: skip
    assert [(c["client"], c["status"], c["reason"]) for c in record["clients"]] == [
        ("lyon", "counted", ""), ("oslo", "counted", ""),
    ]  # fmt: skip
    assert 0 <= record["central_accuracy"] <= 1
    assert record["accuracy"] is not None

    good = sorted(Path("test").rglob("*.png"))[0]
    code, out, _ = fedshelf(capsys, "predict", str(good), "--run", "r", "--json", "--top", "1")
    (answer,) = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert answer["photo"] == str(good)
    (guess,) = answer["predictions"]
    assert guess["class"] in ("apple", "Milk [organic]")
    assert 0.5 <= guess["probability"] <= 1

    code, out, _ = fedshelf(capsys, "evaluate", "test", "--run", "r", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["num_photos"], found["accuracy"]) == (4, pytest.approx(record["central_accuracy"]))
    assert [(p["label"], p["num_photos"]) for p in found["products"]] == [("Milk [organic]", 2), ("apple", 2)]
    assert sum(p["num_correct"] for p in found["products"]) == 4 * found["accuracy"]
    write_pack(Path("more"), {"apple": 2, "durian": 3})
    Path("more/apple/broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    found = json.loads(fedshelf(capsys, "evaluate", "more", "--run", "r", "--json")[1])
    assert (found["num_photos"], found["left_out"], found["num_unusable"]) == (2, {"durian": 3}, 1)
    caplog.clear()
    out = fedshelf(capsys, "evaluate", "more", "--run", "r")[1]
    assert "more: left out: 3 photos of classes that are not in the catalogue: durian (3)" in caplog.messages
    assert "more/apple/broken.jpg" in caplog.text
    assert [line.split()[0] for line in out.splitlines() if line] == ["product", "apple", "accuracy"]
    assert fedshelf(capsys, "evaluate", "more/durian", "--run", "r")[0] == 1

    Path("corrupt.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    code, out, error = fedshelf(capsys, "predict", "corrupt.jpg", "absent.jpg", str(good), "--run", "r", "--best")
    assert code == 1, "some photos could not be used"
    assert [line.count("corrupt.jpg") + line.count("absent.jpg") for line in error.splitlines()] == [1, 1]
    assert " %  Milk [organic]\n" in out, "the others are named all the same, and nothing in a name is markup"
    code, out, _ = fedshelf(capsys, "predict", "corrupt.jpg", "--run", "r/model", "--json")
    assert code == 1
    assert "error" in json.loads(out)


def test_a_run_directory_of_another_configuration_is_exit_code_1(
    stores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", "--data-dir", "stores", "--run-dir", "r", *TINY]
    assert fedshelf(capsys, *arguments)[0] == 0
    code, _, error = fedshelf(capsys, *arguments, "--seed", "3")
    assert code == 1
    assert "seed: 0 → 3" in error


def test_a_simulation_with_workers_stops_cleanly_however_it_is_asked_to(
    stores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes, since signals are their matter."""
    command = [sys.executable, "-m", "fedshelf", "simulate", "--data-dir", "stores", "--run-dir", "r", "--json", *TINY]
    command[command.index("--rounds") + 1] = "500"
    done = 0
    for ask in ("to all processes, as a service manager does", "by 'runs stop'"):
        with subprocess.Popen(
            [*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                if json.loads(line).get("round") == done + 2:
                    break
            if ask == "by 'runs stop'":
                code, out, error = fedshelf(capsys, "runs", "stop", "r")
                assert code == 0
                assert f"asked process {process.pid} to stop" in error
                assert "stopped (stopped on request)" in out
            else:
                os.killpg(process.pid, signal.SIGTERM)
            rest, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert error == "stopping after the current step\n"  # Ctrl-C is mentioned only to those who pressed it
        assert json.loads(rest.splitlines()[-1]) == {
            "event": "run_ended", "status": "stopped", "reason": "stopped on request",
        }  # fmt: skip
        shown = json.loads(fedshelf(capsys, "runs", "show", "r", "--json")[1])
        assert (shown["status"], shown["reason"]) == ("stopped", "stopped on request")
        assert len(shown["rounds"]) > done
        done = len(shown["rounds"])
    code, out, _ = fedshelf(capsys, "runs", "stop", "r")
    assert code == 0
    assert "is not running: it stopped (stopped on request)" in out


@pytest.mark.parametrize("program", [["-m", "fedshelf", "predict", "x.jpg"], ["server.py"], ["client.py"]], ids=str)
def test_ctrl_c_during_the_imports_is_quiet(program: list[str], tmp_path: Path) -> None:
    """The interrupt is raised by the import of click, so that it comes at the same place on any machine."""
    root = Path(__file__).parents[3]
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, *program], capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", ["runs list", "runs list --json", "--help", "server --help-all"])
def test_output_that_cannot_be_written_is_one_sentence(home: Path, arguments: str) -> None:
    for redirection, said in (
        (">/dev/full", "cannot be written: no space left on device"),
        (">&-", "is closed: redirect it to /dev/null, for example, to discard it"),
    ):
        ended = subprocess.run(
            f"'{sys.executable}' -m fedshelf {arguments} {redirection}", shell=True, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stderr) == (1, f"error: the standard output of this command {said}\n")


STOPPABLE = """
import signal, sys
from fedshelf.core.stopping import stop_on_signals
with stop_on_signals() as stop:
    signal.raise_signal(signal.Signals[sys.argv[1]])
    assert stop.is_set()
"""


@pytest.mark.parametrize(
    ("signal_name", "said"),
    [
        ("SIGINT", "stopping after the current step; press Ctrl-C again to exit at once\n"),
        ("SIGTERM", "stopping after the current step\n"),
    ],
)
def test_only_who_pressed_ctrl_c_is_told_to_press_it_again(signal_name: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", STOPPABLE, signal_name], capture_output=True, text=True, check=True)
    assert done.stderr == said


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from fedshelf import __version__

    assert fedshelf(capsys, "--version")[:2] == (0, f"fedshelf {__version__}\n")


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_the_scripts_of_the_first_text_are_the_commands(script: str) -> None:
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, root / script, "--help"], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert f"Example: fedshelf {script.removesuffix('.py')}" in " ".join(result.stdout.split())


def test_products_and_photos_are_shown_by_their_names_whatever_these_hold(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    products = ("Milk [organic]", "Milk [vegan]", "Tea :apple:", "Jam\x1b[2J\u202e")
    for store in ("lyon", "oslo"):
        write_pack(Path("stores") / store, dict.fromkeys(products, 3))
    assert fedshelf(capsys, "simulate", "--data-dir", "stores", "--run-dir", "r", *TINY)[0] == 0
    photo = Path(os.fsdecode(b"caf\xe9.png"))
    photo.write_bytes(next(Path("stores").rglob("*.png")).read_bytes())
    code, out, _ = fedshelf(capsys, "predict", str(photo), "--run", "r")
    assert code == 0
    assert out.startswith("caf\\xe9.png\n")
    for shown in ("Milk [organic]", "Milk [vegan]", "Tea :apple:", r"Jam\x1b[2J\u202e"):
        assert shown in out
    code, out, _ = fedshelf(capsys, "predict", str(photo), "--run", "r", "--json")
    assert {guess["class"] for guess in json.loads(out)["predictions"]} == set(products)
    assert out.isascii()
    code, _, error = fedshelf(capsys, "predict", "no\udce9[red].jpg", "--run", "r")
    assert code == 1
    assert r"no\xe9[red].jpg" in error


def test_a_terminal_that_lacks_the_characters_of_a_name_gets_escapes(home: Path) -> None:
    """A real process, since the encoding of its output is its own."""
    write_pack(Path("photos"), {"柠檬": 2, "Tea": 2})
    (Path("photos/Tea") / os.fsdecode(b"caf\xe8.jpg")).touch()
    check = [sys.executable, "-m", "fedshelf", "data", "check", "photos"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(check, env=environment, capture_output=True, text=True, check=True).stdout
    assert r"\u67e0\u6aac" in shown
    assert r"unusable 'Tea/caf\xe8.jpg': the file is empty" in shown
    text = subprocess.run([*check, "--json"], env=environment, capture_output=True, text=True, check=True).stdout
    found = json.loads(text)
    assert {entry["path"] for entry in found["classes"]} == {"柠檬", "Tea"}
    assert found["unusable"] == {r"Tea/caf\xe8.jpg": "the file is empty"}
