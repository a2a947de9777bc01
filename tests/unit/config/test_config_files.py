"""The configuration: one schema for flags and files, strict keys, and everything wrong said at once."""

import re
import threading
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from fedshelf.algorithms.fedprox import FedProx
from fedshelf.app.components import algorithm_of
from fedshelf.config import files
from fedshelf.config.schema import NEWER, ClientConfig, RunConfig, Settings, select
from fedshelf.core.errors import UsageError
from fedshelf.core.settings import Scope

RECIPE: dict[str, Any] = {
    "image_size": 48, "val_fraction": 0.1, "augment": True, "model": "resnet10", "width": 16, "norm": "batch",
    "optimizer": "sgd", "client_lr": 0.05, "lr_schedule": "cosine", "warmup_rounds": 2, "local_epochs": 2,
    "batch_size": 16, "momentum": 0.9, "weight_decay": 5e-4, "label_smoothing": 0.1, "gradient_clip": 5.0,
    "threads": 1, "algorithm": "fedavg", "rounds": 30, "fraction": 1.0, "seed": 0, "quorum": None, "workers": 0,
    "extend": 0, "insecure": False,
}  # fmt: skip
CONTRACT = {
    "simulate": "data-dir test-dir rounds model image-size algorithm norm client-lr local-epochs batch-size fraction "
    "seed val-fraction momentum weight-decay label-smoothing lr-schedule warmup-rounds mu threads workers run-dir",
    "server": "test-dir rounds model image-size algorithm norm client-lr local-epochs batch-size fraction seed "
    "val-fraction momentum weight-decay label-smoothing lr-schedule warmup-rounds mu threads run-dir min-clients "
    "quorum address round-timeout extend insecure",
}


def load(tmp_path: Path, text: str, **flags: Any) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return files.load(RunConfig, path, flags)


def test_the_defaults_are_the_recipe_of_the_benchmark() -> None:
    config = RunConfig()
    assert {name: getattr(config, name) for name in RECIPE} == RECIPE


@pytest.mark.parametrize("command", CONTRACT)
def test_every_promised_flag_is_on_its_command(command: str) -> None:
    offered = {name.replace("_", "-") for name, flag in RunConfig.flags().items() if command in flag.commands}
    assert set(CONTRACT[command].split()) <= offered
    assert {"data-dir", "server-address", "name", "state-dir"} <= {n.replace("_", "-") for n in ClientConfig.flags()}


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    config = load(tmp_path, 'client-lr = 0.5\nmodel = "resnet18"\naugment = false\nquorum = 3\n')
    assert (config.client_lr, config.model, config.augment, config.quorum) == (0.5, "resnet18", False, 3)
    assert config == files.load(RunConfig, None, {"client_lr": 0.5, "model": "resnet18", "augment": False, "quorum": 3})


def test_a_list_in_a_file_is_a_flag_that_is_repeated(tmp_path: Path) -> None:
    config = load(tmp_path, 'advertise = ["shop.example", "10.0.0.1:443"]\n')
    assert config.advertise == ("shop.example", "10.0.0.1:443")
    assert load(tmp_path, 'advertise = ["shop.example"]\n', advertise=["other.example"]).advertise == ("other.example",)
    with pytest.raises(UsageError, match=r'advertise = "shop\.example" in .*run\.toml'):
        load(tmp_path, 'advertise = "shop.example"\n')


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, "rounds = 7\nseed = 3\n", rounds=9)
    assert (config.rounds, config.seed) == (9, 3)


@pytest.mark.parametrize(
    ("key", "near"), [("client_lr", "client-lr"), ("epochs", "local-epochs"), ("roundz", "rounds"), ("lr", None)]
)
def test_an_unknown_key_names_the_nearest_right_one(tmp_path: Path, key: str, near: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, f"{key} = 1\n")
    suggestion = f": did you mean '{near}'?" if near else ""
    assert str(caught.value) == f"unknown key '{key}' in {tmp_path / 'run.toml'}{suggestion}"


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, 'batch-sise = 3\nmomentum = 1.5\nnorm = "bach"\nrounds = "ten"\n', seed="-1", device="tpu")
    file = tmp_path / "run.toml"
    assert sorted(caught.value.args) == [
        "--device tpu: must be one of auto, cpu, cuda, mps: did you mean 'cpu'?",
        "--seed -1: must be at least 0",
        f"momentum = 1.5 in {file}: must be less than 1",
        f"norm = \"bach\" in {file}: must be one of batch, group: did you mean 'batch'?",
        f'rounds = "ten" in {file}: not a whole number',
        f"unknown key 'batch-sise' in {file}: did you mean 'batch-size'?",
    ]


BAD: dict[str, Any] = {
    "image_size": 4, "val_fraction": 1.0, "width": 0, "client_lr": 0.0, "local_epochs": 0, "batch_size": 0,
    "momentum": 1.0, "weight_decay": -1e-9, "label_smoothing": 1.0, "gradient_clip": -1.0, "threads": -1, "mu": -0.1,
    "rounds": 0, "min_clients": 0, "fraction": 0.0, "quorum": 0, "round_timeout": 0.0, "patience": -1, "seed": 2**63,
    "workers": -1, "extend": -1, "optimizer": "adam", "lr_schedule": "linear", "algorithm": "fedsgd", "norm": "layer",
    "max_examples": 0, "heartbeat_timeout": 1.0, "warmup_rounds": -1, "device": "tpu", "best_metric": "loss",
}  # fmt: skip


def complaint(kind: type[Settings], values: dict[str, Any], flags: tuple[str, ...]) -> str:
    try:
        files.parse(kind, values, where="run.toml", flags=flags)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", [RunConfig, ClientConfig])
def test_no_message_is_that_of_a_library(kind: type[Settings]) -> None:
    for key in (name.replace("_", "-") for name in kind.model_fields):
        for value in (3, -1.5, True, "x", "", [1], ["a"], 10**30):
            for flags in ((), (key,)):
                assert not re.search(r"Input|class '|valid", complaint(kind, {key: value}, flags))


@pytest.mark.parametrize("name", BAD)
def test_a_value_out_of_range_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        files.load(RunConfig, None, {name: BAD[name]})


NUMBERS = {
    name: int in kinds
    for kind in (RunConfig, ClientConfig)
    for name, field in kind.model_fields.items()
    if {int, float} & (kinds := {field.annotation, *get_args(field.annotation)})
}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_without_end(name: str, tmp_path: Path) -> None:
    kind = RunConfig if name in RunConfig.model_fields else ClientConfig
    for value in ("9" * 30,) if NUMBERS[name] else ("inf", "nan"):
        said = (
            "must be at most"
            if NUMBERS[name]
            else "must be a finite number|must be (auto, off|adaptive), or a number above 0"
        )
        with pytest.raises(UsageError, match=said):
            files.load(kind, None, {name: value})
        (tmp_path / "run.toml").write_text(f"{name.replace('_', '-')} = {value}")
        with pytest.raises(UsageError, match=said):
            files.load(kind, tmp_path / "run.toml", {})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rounds = true", "rounds = true in {}: not a whole number"),
        ('rounds = "3"', 'rounds = "3" in {}: not a whole number'),
        ("rounds = 3.0", "rounds = 3.0 in {}: not a whole number"),
        ('client-lr = "0.1"', 'client-lr = "0.1" in {}: not a number'),
        ("client-lr = false", "client-lr = false in {}: not a number"),
        ("augment = 1", "augment = 1 in {}: not true or false"),
        ('augment = "yes"', 'augment = "yes" in {}: not true or false'),
        ("model = 18", "model = 18 in {}: not a text in quotes"),
        ("run-dir = 2026-11-30", "run-dir = 2026-11-30 in {}: not a text in quotes"),
        ('advertise = "x"', 'advertise = "x" in {}: not a list of texts in quotes, such as ["a", "b"]'),
        ("rounds = " + "9" * 5000, "cannot read --config {}: it is not valid TOML"),
        ("[server]\nrounds = 3", "[server] in {}: sections are not used. Write its keys above any section, or without"),
        ("[rounds]\nrounds = 3", "[rounds] in {}: sections are not used. Write its keys above any section, or without"),
    ],
)
def test_a_value_of_another_type_is_an_error(line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, line)
    assert str(caught.value).startswith(said.format(tmp_path / "run.toml"))


@pytest.mark.parametrize(
    ("kind", "name"), [(ClientConfig, "max_wait"), (RunConfig, "round_timeout"), (RunConfig, "heartbeat_timeout")]
)
def test_no_time_is_longer_than_the_system_can_wait(kind: type[Settings], name: str) -> None:
    with pytest.raises(UsageError, match=r"must be at most 1,000,000,000"):
        files.load(kind, None, {name: "1e300"})
    assert getattr(files.load(kind, None, {name: "1e9"}), name) < threading.TIMEOUT_MAX


def test_a_whole_number_is_a_number_and_a_flag_is_a_text(tmp_path: Path) -> None:
    assert load(tmp_path, "client-lr = 1\n", rounds="3").model_dump(include={"client_lr", "rounds"}) == {
        "client_lr": 1.0, "rounds": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"pretrained": True, "init": Path("w.pt")}, "exclude each other"),
        ({"best_metric": "central_accuracy"}, "needs test photos: add --test-dir"),
        ({"best_metric": "accuracy", "val_fraction": 0.0}, "needs validation photos"),
    ],
)
def test_values_that_contradict_each_other_are_an_error(flags: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        files.load(RunConfig, None, flags)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"rounds = ", "is not valid TOML: Invalid value"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[a\n", "is not valid TOML"),
        (b"a = " + b"[" * 100_000, "is not valid TOML"),
    ],
)
def test_a_file_that_is_not_toml_is_a_usage_error(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(UsageError, match=rf"cannot read --config .*run\.toml: it {said}"):
        files.load(RunConfig, tmp_path / "run.toml", {})
    with pytest.raises(UsageError, match=r"cannot read --config .*absent\.toml: No such file"):
        files.load(RunConfig, tmp_path / "absent.toml", {})


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfrounds = 7\n")
    assert files.load(RunConfig, tmp_path / "run.toml", {}).rounds == 7


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    config = load(tmp_path, 'data-dir = "stores"\ntest-dir = "~/test"\n', run_dir=Path("r"))
    assert config.data_dir == tmp_path / "stores"
    assert config.test_dir == tmp_path / "me" / "test"
    assert config.run_dir == tmp_path / "r"


def test_the_effective_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load(
        tmp_path, 'data-dir = "stores"\nquorum = 3\nmu = 0.5\nalgorithm = "fedprox"\nseed = 9223372036854775807'
    )
    text = files.effective(config)
    again = files.parse(RunConfig, tomllib.loads(text), where="itself")
    assert files.effective(again) == text
    assert (again.quorum, algorithm_of(again), again.seed) == (3, FedProx(mu=0.5), 2**63 - 1)
    assert files.digest(text) == files.digest(files.effective(again))


def test_local_values_decide_nothing_and_all_others_do() -> None:
    base = files.effective(RunConfig())
    local = {"device": "cpu", "round_timeout": 3.0, "run_dir": Path("x"), "extend": 2, "workers": 3, "insecure": True,
             "address": "h:1", "heartbeat_timeout": 60.0, "compare": True, "advertise": ["h"],
             "confirm_catalogue": True, "admission": "open", "invite": 3, "home": Path("h"),
             "tls_cert": Path("c"), "tls_key": Path("k"), "model_path": Path("m")}  # fmt: skip
    own = RunConfig.__base__.model_fields  # type: ignore[union-attr]
    assert {name for name in own if RunConfig.flags()[name].scope is Scope.LOCAL} == set(local)
    assert files.effective(files.load(RunConfig, None, local)) == base
    changed: dict[str, Any] = {"rounds": 31, "seed": 1, "client_lr": 0.06, "quorum": 2, "threads": 2, "mu": 0.2}
    for name, value in changed.items():
        assert files.effective(RunConfig(**{name: value})) != base, name


def test_clients_are_sent_no_paths_and_no_addresses() -> None:
    config = RunConfig(data_dir=Path("/secret/d"), test_dir=Path("/secret/t"), init=Path("/secret/i"),
                       run_dir=Path("/secret/r"), catalogue=Path("/secret/c"), address="secret:1")  # fmt: skip
    text = files.for_clients(config)
    assert "secret" not in text
    keys = set(tomllib.loads(text))
    assert keys == set(select(RunConfig(), Scope.RUN)) - {name.replace("_", "-") for name in NEWER}
    assert {"client-lr", "mu", "seed", "threads", "augment", "val-fraction"} <= keys
    sent = (RunConfig.model_fields[name] for name, flag in RunConfig.flags().items() if flag.scope is Scope.RUN)
    assert not [field for field in sent if Path in (field.annotation, *get_args(field.annotation))]


@pytest.mark.parametrize("attack", ["label-flip", "sign-flip", "scale"])
def test_a_server_has_no_simulated_attackers(tmp_path: Path, attack: str) -> None:
    config = load(tmp_path, f'attack = "{attack}"\nattackers = 1\n')
    with pytest.raises(UsageError, match=f"attack = '{attack}': .* stores of a server are real.* 'fedshelf simulate"):
        files.of_a_server(config)


def test_at_a_server_nothing_is_left_of_what_only_a_simulation_goes_by(tmp_path: Path) -> None:
    """Or the run's record would tell of slow stores that there never were."""
    common = "rounds = 7\nquorum = 3\n"
    simulated = 'data-dir = "d"\nengine = "vmap"\nworkers = 2\nslowdowns = "1,5"\ndropout = 0.5\nattackers = 0\n'
    here = load(tmp_path, common)
    assert files.of_a_server(here) == here
    assert files.of_a_server(load(tmp_path, common + simulated)) == here


def test_every_field_says_how_it_shows_on_the_command_line() -> None:
    for kind in (RunConfig, ClientConfig):
        for name, flag in kind.flags().items():
            assert flag.help.endswith((".", ")")), name
            assert set(flag.commands) <= {"simulate", "server", "client", "distill"}
