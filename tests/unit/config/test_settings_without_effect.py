"""Settings that are given although they have no effect: what is wrong with them is said in one place."""

import logging
from pathlib import Path
from typing import Any, get_args

import pytest

from fedshelf.algorithms.registry import ALGORITHMS
from fedshelf.config import files
from fedshelf.config.families import FAMILIES
from fedshelf.config.schema import ClientConfig, RunConfig
from fedshelf.config.without_effect import without_effect_on
from fedshelf.core.errors import UsageError
from fedshelf.core.settings import load, settings_of

LITE0 = {"pretrained": True, "model": "tf_efficientnet_lite0"}


@pytest.fixture(autouse=True)
def _warnings_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize(("given", "sentence"), [
    ({"mu": 0.1}, "--mu has no effect with --algorithm fedavg. Use --algorithm fedprox or fedasync, or leave --mu out"),
    ({"server_beta2": 0.9}, "--server-beta2 has no effect with --algorithm fedavg. Use --algorithm fedadam or fedyogi"),
    ({"server_momentum": 0.9}, "--server-momentum has no effect with --algorithm fedavg. Use --algorithm fedavgm, "
     "fedadagrad, fedadam, or fedyogi, or leave"),
    ({"ridge_lambda": 1.0}, "--ridge-lambda has no effect with --algorithm fedavg. Use --algorithm ridge, or leave"),
    ({"trim": 0.2}, "--trim has no effect with --aggregator mean. Use --aggregator trimmed-mean or multi-krum, or"),
    ({"buffer_size": 3}, "--buffer-size has no effect with --algorithm fedavg. Use --algorithm fedbuff or fedasync,"),
    ({"finetune_epochs": 3}, "--finetune-epochs has no effect with --personalize none. Use --personalize finetune, or"),
    ({"fedrs_alpha": 0.3}, "--fedrs-alpha has no effect with --loss cross-entropy. Use --loss fedrs, or"),
    ({"noise_at": "stores"}, "--noise-at has no effect with --dp none. Use --dp client, or"),
    ({"he_scope": "head"}, "--he-scope has no effect without --he. Add that, or leave --he-scope out"),
    ({"secagg_threshold": 3}, "--secagg-threshold has no effect without --secagg. Add that, or leave"),
])  # fmt: skip
def test_a_flag_of_a_component_that_is_not_used_is_an_error_that_names_what_uses_it(
    given: dict[str, Any], sentence: str
) -> None:  # fmt: skip
    with pytest.raises(UsageError) as caught:
        files.load(RunConfig, None, given)
    assert [message[: len(sentence)] for message in caught.value.args] == [sentence]


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        files.load(RunConfig, None, {"mu": 0.1, "trim": 0.2, "pretrained": True, "init": "weights.pt"})
    assert [message.split()[0] for message in caught.value.args] == ["--init", "--mu", "--trim"]


@pytest.mark.parametrize(("given", "sentence"), [
    ({"adapter_rank": 4, "train": "head"}, "--adapter-rank has no effect with --train head. Use --train adapter, or"),
    ({"unfreeze_after": 2, "train": "head"}, "--unfreeze-after has no effect with --train head."),
    ({"feature_views": 4}, "--feature-views has no effect with --train all. Use --train head or sales, or leave"),
    ({"momentum": 0.8, "optimizer": "adamw"}, "--momentum has no effect with --optimizer adamw. Use --optimizer sgd,"),
    ({"test_every": 3}, "--test-every has no effect without --test-dir. Add that, or leave --test-every out"),
    ({"width": 8, "model": "resnet18"}, "--width has no effect with --model resnet18. Use --model resnet10, or"),
    ({"forecast_weight": 2.0}, "--forecast-weight has no effect without --sales. Add that, or"),
    ({"invite": 3, "admission": "open"}, "--invite has no effect with --admission open. Use --admission token, or"),
    ({"model_path": "lib"}, "--model-path has no effect with --model resnet10. Use --model MODULE:FUNCTION, or"),
    ({"average_rounds": 100, "rounds": 3}, "--average-rounds has no effect beyond the run's last round (3)."),
    ({"over_selection": 0.5}, "--over-selection has no effect with --fraction 1: no further clients are left"),
    ({**LITE0, "unfreeze_after": 3}, "--unfreeze-after has no effect but rounds without training:"),
    ({**LITE0, "algorithm": "ridge", "refit_head": True}, "--refit-head has no effect with --algorithm ridge."),
    ({**LITE0, "algorithm": "ridge", "client_lr": 0.1, "local_epochs": 3},
     "--client-lr and --local-epochs have no effect with --algorithm ridge."),
    ({**LITE0, "algorithm": "ridge", "rounds": 5}, "--rounds has no effect above 1 with --algorithm ridge, unless"),
    ({"algorithm": "ridge"}, "--algorithm ridge on random weights: the output layer is computed from features that"),
    ({"warm_start": "ridge"}, "--warm-start ridge on random weights:"),
])  # fmt: skip
def test_a_flag_that_others_leave_without_effect_is_a_warning_with_the_reason_and_what_to_do(
    given: dict[str, Any], sentence: str, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    files.load(RunConfig, None, given)
    assert [message[: len(sentence)] for message in caplog.messages] == [sentence]


@pytest.mark.parametrize("given", [
    {}, LITE0, {**LITE0, "algorithm": "ridge"}, {**LITE0, "algorithm": "ridge", "rounds": 5, "fraction": 0.5},
    {"algorithm": "fedprox", "mu": 0.1}, {**LITE0, "ridge_lambda": 1.0}, {"warm_start": "ridge", "init": "weights.pt"},
    {"algorithm": "ridge", "model": "mine:make"}, {"refit_head": False, "mu": 0.0}, {"train": "head", **LITE0},
    {**LITE0, "algorithm": "ridge", "personalize": "finetune", "optimizer": "adamw", "finetune_epochs": 2},
    {"average_rounds": 4, "rounds": 2, "extend": 2}, {"momentum": 0.9}, {"warmup_rounds": 9, "rounds": 3},
    {"test_every": 3, "test_dir": "photos"},
])  # fmt: skip
def test_flags_with_an_effect_and_those_that_turn_something_off_go_without_a_word(
    given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    files.load(RunConfig, None, given)
    assert caplog.messages == []


def test_every_setting_of_a_component_that_is_not_chosen_is_found() -> None:
    declared = {
        setting.key: (setting.type, family, name)
        for family, registry in FAMILIES.items()
        for name, line in registry.items()
        for setting in settings_of(load(line)).values()
    }
    del declared["clip_norm"]  # a stage of the upload pipeline has it, too
    for key, (kind, family, name) in declared.items():
        assert name != getattr(RunConfig(), family)  # the default components have no settings
        value = next((word for word in get_args(kind)[1:] if isinstance(word, str)), "1")
        with pytest.raises(UsageError) as caught:
            files.load(RunConfig, None, {key: "0.25" if "float" in str(kind) else value})
        assert [message.split(" has ")[0] for message in caught.value.args] == [f"--{key.replace('_', '-')}"]
    assert len(declared) > 10


def test_a_key_of_a_file_counts_as_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run.toml"
    file.write_text("mu = 0.3\n")
    with pytest.raises(UsageError, match="--mu has no effect with --algorithm fedavg"):
        files.load(RunConfig, file, {})
    assert files.load(RunConfig, file, {"algorithm": "fedprox"}).settings_of(load(ALGORITHMS["fedprox"])).mu == 0.3
    assert caplog.messages == []


def test_one_file_serves_several_algorithms_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run.toml"
    file.write_text('algorithm = "fedprox"\nmu = 0.3\n')
    files.load(RunConfig, file, {"algorithm": "fedavg"})
    assert [message.split(" has ")[0] for message in caplog.messages] == ["--mu"]
    with pytest.raises(UsageError, match="--mu has no effect"):
        files.load(RunConfig, file, {"algorithm": "fedavg", "mu": 0.3})


@pytest.mark.parametrize(("num_stores", "fraction", "reports"), [
    (1, 0.5, True), (8, 0.9, True), (8, 0.5, False), (1, 1.0, False),
])  # fmt: skip
def test_a_fraction_that_draws_all_stores_is_reported(num_stores: int, fraction: float, reports: bool) -> None:
    found = without_effect_on(RunConfig(fraction=fraction), num_stores)
    assert [sentence.split(" with ")[0] for sentence in found] == ["--fraction has no effect"] * reports


@pytest.mark.parametrize("given", [{}, {**LITE0, "algorithm": "ridge"}, LITE0, {"algorithm": "fedprox", "mu": 0.2}])
def test_a_runs_own_text_holds_all_defaults_and_says_nothing(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(files.effective(files.load(RunConfig, None, given)))
    files.load(RunConfig, file, {})
    assert caplog.messages == []


def test_a_store_is_not_warned_of_what_the_server_has_been_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"mu": 0.3, "refit_head": True, "algorithm": "ridge"}
    files.from_a_server(files.for_clients(RunConfig(**given)))
    assert caplog.messages == []


def test_ridge_regression_takes_one_round_where_that_suffices_and_no_number_is_given() -> None:
    assert files.load(RunConfig, None, {"algorithm": "ridge"}).rounds == 1
    assert files.load(RunConfig, None, {"algorithm": "ridge", "rounds": 3}).rounds == 3
    assert files.load(RunConfig, None, {"algorithm": "ridge", "fraction": 0.5}).rounds == RunConfig().rounds


@pytest.mark.parametrize(("kind", "given", "problem"), [
    (ClientConfig, {"insecure": True, "ca": "ca.pem"}, "--insecure with --ca: without TLS no certificate is checked"),
    (RunConfig, {"train": "head", "head_lr_factor": 0}, "--head-lr-factor 0 with --train head: nothing would be"),
])  # fmt: skip
def test_a_contradiction_is_a_usage_error(kind: Any, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        files.load(kind, None, given)


def test_a_server_without_tls_refuses_a_certificate() -> None:
    with pytest.raises(UsageError, match="a server without TLS has no certificate"):
        files.of_a_server(RunConfig(insecure=True, tls_cert=Path("cert.pem")))


def test_a_quorum_that_the_first_rounds_cannot_have_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    files.of_a_server(RunConfig(min_clients=3, quorum=3))
    assert caplog.messages == []
    files.of_a_server(RunConfig(min_clients=3, quorum=9))
    assert ["Set --min-clients 9" in message for message in caplog.messages] == [True]
