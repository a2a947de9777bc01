"""Settings that components declare beside their code, as keys of a run."""

import logging
import tomllib
from collections.abc import Iterator
from inspect import Parameter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedshelf.algorithms.fedasync import FedAsync
from fedshelf.algorithms.fedavgm import FedAvgM
from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.app.components import algorithm_of, component_of, uploads_of
from fedshelf.cli.app import app
from fedshelf.compression.codec_stage import Encode
from fedshelf.config import files, schema
from fedshelf.config.families import FAMILIES, OPTIONAL, component_settings
from fedshelf.config.schema import RunConfig, Settings
from fedshelf.core.errors import UsageError
from fedshelf.core.settings import load, settings_of
from fedshelf.privacy.clipping import Clip
from fedshelf.storage.run_directory import differences

TEXTS = Path(__file__).parent / "texts"
"""What version 0.1 wrote: the defaults, and values that differ from them for every key."""
EVERY_COMPONENT = [(family, name) for family, registry in FAMILIES.items() for name in registry]
EVERY_LINE = [(key, line) for key, lines in {**FAMILIES, **OPTIONAL}.items() for line in lines.values()]


def text(name: str) -> str:
    return (TEXTS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "ridge"])  # which implies --train head
def test_a_runs_text_and_digest_are_those_of_version_0_1(algorithm: str) -> None:
    config = RunConfig(algorithm=algorithm)
    for written, name in ((files.effective(config), "effective"), (files.for_clients(config), "clients")):
        assert written == text(f"{name}-defaults.toml").replace("fedavg", algorithm)


def test_the_order_of_keys_is_that_of_version_0_1_whatever_is_set() -> None:
    values = tomllib.loads(text("effective-all.toml"))
    config = RunConfig.model_validate({**values, "pretrained": False})  # which now implies more
    assert files.effective(config) == text("effective-all.toml").replace("pretrained = true", "pretrained = false")
    assert files.for_clients(config) == text("clients-all.toml")
    assert set(tomllib.loads(text("effective-defaults.toml"))) < set(values)


@pytest.mark.parametrize(("family", "name"), EVERY_COMPONENT)
def test_every_component_can_be_chosen_and_its_settings_are_keys_of_every_run(family: str, name: str) -> None:
    config = RunConfig.model_validate({family: name})
    assert (component_of(config, family) is None) == (name == "cross-entropy")
    for setting in settings_of(load(FAMILIES[family][name])).values():
        assert setting.key in RunConfig.flags()


def test_components_that_share_a_key_declare_it_alike_and_none_takes_a_key_of_the_runs_own() -> None:
    """Two families, or a component and the run, with one key would be two settings of one name."""
    own = set(RunConfig.order) - {key for keys in component_settings().values() for key in keys}
    shared: dict[str, set[Any]] = {}
    for family, line in EVERY_LINE:
        for setting in settings_of(load(line)).values():
            told = (family, setting.help, setting.type, setting.scope, setting.panel, *setting.bounds.items())
            shared.setdefault(setting.key, set()).add(told)
    assert {key: told for key, told in shared.items() if len(told) > 1} == {}
    assert not own & shared.keys()
    assert own == set(schema.RunConfig.__base__.model_fields)  # type: ignore[union-attr]
    assert len(RunConfig.order) == len(set(RunConfig.order)) == len(RunConfig.model_fields)


def test_a_key_whose_components_have_different_defaults_has_none_and_its_help_tells_theirs() -> None:
    flag = RunConfig.flags()["server_lr"]
    assert "server-lr" not in files.effective(RunConfig(algorithm="fedavgm"))
    assert algorithm_of(RunConfig(algorithm="fedavgm")) == FedAvgM(server_lr=1.0)
    assert algorithm_of(RunConfig(algorithm="fedasync")) == FedAsync(alpha=0.6)
    for told in ("1.0 for fedavgm", "0.1 for fedadagrad, fedadam, fedyogi", "0.6 for fedasync"):
        assert told in flag.help


def test_a_component_of_a_run_can_be_made_with_the_runs_settings_though_another_is_chosen() -> None:
    config = RunConfig.model_validate({"algorithm": "fedavg", "server-lr": 0.3, "mu": 0.7})
    assert config.settings_of(FedAsync) == FedAsync(alpha=0.3, rho=0.7)


@pytest.mark.parametrize("line", [line for registry in OPTIONAL.values() for line in registry.values()])
def test_only_the_setting_that_switches_an_optional_component_on_has_no_default(line: str) -> None:
    switch, *others = settings_of(load(line)).values()
    assert switch.default is Parameter.empty
    assert all(setting.default is not Parameter.empty for setting in others)
    assert RunConfig.model_fields[switch.key].default is None


def test_the_clip_is_a_stage_if_its_norm_is_set_and_comes_before_the_codec() -> None:
    values = {"clip-norm": 2.5, "codec-up": "int8"}
    clip, codec = uploads_of(RunConfig.model_validate(values)).stages
    assert clip == Clip(max_norm=2.5)
    assert isinstance(codec, Encode)
    assert uploads_of(RunConfig()).stages == ()


@pytest.fixture
def _untold() -> Iterator[None]:
    """A process that has not met an old name yet."""
    files._warn_of_former_name.cache_clear()
    yield
    files._warn_of_former_name.cache_clear()


@pytest.mark.usefixtures("_untold")
def test_a_former_key_works_and_its_new_name_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.toml").write_text('speeds = "1,1,5"\n', encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            config = files.load(RunConfig, tmp_path / "run.toml", {})
            assert config == RunConfig(slowdowns="1,1,5")
    assert [record.getMessage() for record in caplog.records] == [
        "speeds is now called slowdowns: use the new name, the old one will go"
    ]
    assert 'slowdowns = "1,1,5"' in files.effective(config)


@pytest.mark.usefixtures("_untold")
@pytest.mark.parametrize("name", ["speeds", "slowdowns"])
def test_a_flag_by_either_name_wins_over_a_file_by_either_name(tmp_path: Path, name: str) -> None:
    for key in ("speeds", "slowdowns"):
        (tmp_path / "run.toml").write_text(f'{key} = "1,1,5"\n', encoding="utf-8")
        assert files.load(RunConfig, tmp_path / "run.toml", {name: "1,2"}).slowdowns == "1,2"


def test_a_former_key_beside_the_present_one_is_an_error_that_names_the_present_one() -> None:
    with pytest.raises(UsageError, match=r"'speeds'.*did you mean 'slowdowns'"):
        files.parse(RunConfig, {"speeds": "1", "slowdowns": "2"}, where="run.toml")


@pytest.mark.usefixtures("_untold", "home")
def test_a_former_flag_works_and_help_does_not_show_it() -> None:
    shown = CliRunner().invoke(app, ["simulate", "--help-all"], env={"COLUMNS": "200"}).output
    assert "--slowdowns" in shown
    assert "--speeds" not in shown
    with pytest.raises(UsageError, match="slowdowns"):
        CliRunner().invoke(app, ["simulate", "--speeds", "never"], catch_exceptions=False)


def test_a_run_that_was_made_under_a_former_name_is_of_the_same_configuration() -> None:
    old = files.effective(RunConfig(slowdowns="1,5")).replace("slowdowns", "speeds")
    assert differences(files.with_new_names(old), files.effective(RunConfig(slowdowns="1,5"))) == ()
    (changed,) = differences(files.with_new_names(old), files.effective(RunConfig(slowdowns="1,6")))
    assert (changed.key, changed.old, changed.new) == ("slowdowns", "1,5", "1,6")


def test_every_former_name_leads_to_a_present_one() -> None:
    fields = {name for kind in Settings.__subclasses__() for name in kind.model_fields}
    for old, new in schema.RENAMED.items():
        assert old not in fields
        assert new in fields
