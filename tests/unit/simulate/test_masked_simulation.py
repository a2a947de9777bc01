"""`--secagg` in simulations: the same bits as without masks, and what it cannot be combined with."""

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.config.files import load
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.events import RunStatus
from fedshelf.privacy.secure_aggregation import client
from fedshelf.privacy.secure_aggregation.keys import advertise
from fedshelf.privacy.secure_aggregation.shares import deal
from fedshelf.simulate.engine import _check_sums, simulate
from fedshelf.tracking.queries import run_summary
from tests.unit.data.samples import write_pack
from tests.unit.simulate.test_simulation import final
from tests.unit.tracking.test_runs_commands import output

CLASSES = ("apple", "milk")
STORES = ("lyon", "oslo", "paris", "rome")


@pytest.fixture
def stores(home: Path) -> Path:
    for number, name in enumerate(STORES):
        write_pack(Path("stores") / name, dict.fromkeys(CLASSES, 3 + number))
    write_pack(Path("test"), dict.fromkeys(CLASSES, 2))
    return Path("stores")


def run(name: str, **values: Any) -> tuple[torch.Tensor, list[Any]]:
    given: dict[str, Any] = {
        "data_dir": "stores", "test_dir": "test", "image_size": 16, "width": 8, "rounds": 2, "batch_size": 4,
        "device": "cpu", "run_dir": name, "val_fraction": 0.2,
    }  # fmt: skip
    status, directory = simulate(load(RunConfig, None, {**given, **values}))
    assert status is RunStatus.FINISHED
    return final(directory), list(run_summary(directory.path).rounds)


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize(
    ("codec", "given"),
    [
        ("modular:32", {}),
        ("modular:16", {"weights": "equal"}),
        ("modular:32", {"algorithm": "fedadam"}),
        ("modular:32", {"algorithm": "fedavgm", "norm": "group"}),
        ("modular:32", {"algorithm": "scaffold"}),
        ("modular:32", {"algorithm": "fedprox", "personalize": "fedper"}),
        ("modular:32", {"workers": 2, "fraction": 0.75}),
        ("modular:32", {"codec_down": "int8", "clip_norm": 0.5}),
        ("modular:32", {"algorithm": "ridge", "rounds": 1}),
        ("modular:32", {"algorithm": "ridge", "rounds": 1, "ridge_lambda": 0.1, "workers": 2}),
        ("modular:32", {"warm_start": "ridge", "train": "head", "refit_head": True}),
        ("modular:16", {"warm_start": "ridge", "weights": "equal", "codec_down": "int8"}),
    ],
    ids=str,
)
def test_a_masked_run_has_the_bits_of_one_without_masks(codec: str, given: dict[str, Any]) -> None:
    masked, rounds = run("masked", secagg=True, compare=False, **given)
    plain, others = run("plain", codec_up=codec, compare=False, **given)
    assert torch.equal(masked, plain)
    assert [round_.train_loss for round_ in rounds] == [round_.train_loss for round_ in others]
    for member in (member for round_ in rounds for member in round_.clients):
        assert (member.num_examples, member.num_steps, member.train_loss) == (None, None, None)
    assert [round_.accuracy for round_ in rounds] == [round_.accuracy for round_ in others] != [None, None]
    told, untold = ([{m.accuracy for m in r.clients} for r in found] for found in (others, rounds))
    assert all(accuracies == {None} for accuracies in untold), "no figures of a single store are known"
    assert None not in told[0]
    assert results("masked") == results("plain")
    assert 'codec-up = "modular' in Path("masked/config.toml").read_text()
    if not given:
        without, _ = run("without", compare=False)
        assert not torch.equal(masked, without), "nothing is encoded"


def results(name: str) -> Any:
    """What is known of each product."""
    return run_summary(Path(name)).results


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize(("weights", "error"), [("equal", 1e-4), ("examples", 1e-2)])
def test_a_round_makes_the_model_of_one_without_a_codec_but_for_rounding(weights: str, error: float) -> None:
    given = {"rounds": 1, "weights": weights, "norm": "group", "compare": False, "client_lr": 0.2}
    masked, _ = run("masked", secagg=True, codec_up="modular:32", **given)
    without, _ = run("without", norm_bound="off", **given)
    unmoved, _ = run("unmoved", norm_bound="off", **{**given, "client_lr": 1e-9})
    assert float((without - unmoved).abs().max()) > 10 * error, "the round changes too little to tell"
    torch.testing.assert_close(masked, without, rtol=0, atol=error)


@pytest.mark.usefixtures("stores")
def test_a_masked_run_continues_with_the_same_bits() -> None:
    finals = []
    for name, given in (("masked", {"secagg": True}), ("plain", {"codec_up": "modular:32"})):
        run(name, rounds=2, **given)
        model, rounds = run(name, rounds=2, extend=1, **given)
        assert len(rounds) == 3
        finals.append(model)
    assert torch.equal(*finals)


@pytest.mark.usefixtures("stores")
def test_stores_that_drop_out_do_not_harm_the_others() -> None:
    given = {"slowdowns": "1,1,50,1", "straggler_factor": 2.0, "min_clients": 3, "quorum": 3}
    masked, rounds = run("masked", secagg=True, secagg_threshold=3, **given)
    counts = [sum(member.status.value == "counted" for member in round_.clients) for round_ in rounds]
    assert counts == [4, 3], "the slow store is waited for in the second round, too"
    plain, _ = run("plain", codec_up="modular:32", **given)
    assert torch.equal(masked, plain)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"aggregator": "median"}, "--aggregator median with --secagg: the server decodes the sum"),
        ({"algorithm": "fedbuff"}, "--algorithm fedbuff with --secagg"),
        ({"algorithm": "ridge"}, "2 rounds of --algorithm ridge with --secagg: in each round after the first"),
        ({"algorithm": "ridge", "rounds": 1, "codec_up": "int8"}, "--secagg masks integers: use --codec-up modular"),
        ({"algorithm": "ridge", "rounds": 1, "clip_norm": 1.0}, "--clip-norm 1 with --algorithm ridge"),
        ({"local_work": "dynamic"}, "--local-work dynamic with --secagg"),
        ({"norm_bound": 3.0}, "--norm-bound 3.0 with --secagg"),
        ({"sampling": "size"}, "--sampling size with --secagg"),
        ({"codec_up": "topk:0.1"}, "--secagg masks integers: use --codec-up modular:16 or modular:32"),
        ({"codec_up": "modular:16"}, "--codec-up modular:16 has no room for weights by photos"),
        ({"min_clients": 2}, "--min-clients 2 with --secagg: a sum of fewer than 3 stores hides nothing"),
        ({"secagg_threshold": 9}, "--secagg-threshold 9: there are only 4 stores in a round"),
        ({"fraction": 0.5}, "--secagg with --fraction 0.5: 2 stores in a round hide nothing in their sum"),
    ],
    ids=str,
)
def test_what_needs_single_uploads_is_refused(stores: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        run("run", secagg=True, **given)
    assert any(said in str(problem) for problem in raised.value.args), raised.value.args
    assert not Path("run").exists()


def test_a_threshold_of_half_of_the_stores_is_refused_at_the_start() -> None:
    config = load(RunConfig, None, {"data_dir": "stores", "secagg": True, "secagg_threshold": 3})
    with pytest.raises(UsageError, match=r"not more than half of 6 stores in a round, .* Use 4 or more"):
        _check_sums(config, list("abcdef"))
    _check_sums(config, list("abcde"))


@pytest.mark.usefixtures("stores")
def test_sums_over_photos_are_masked_once() -> None:
    """The server would know the sums before and after, and so those of a store that has joined or changed."""
    run("run", secagg=True, algorithm="ridge", rounds=1)
    with pytest.raises(UsageError, match="2 rounds of --algorithm ridge with --secagg"):
        run("run", secagg=True, algorithm="ridge", rounds=1, extend=1)


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize(
    "given", [{"algorithm": "ridge", "rounds": 1}, {"algorithm": "ridge", "rounds": 1, "ridge_lambda": 0.1}], ids=str
)
def test_a_masked_head_in_closed_form_is_that_of_exact_sums_but_for_rounding(
    given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fedshelf.algorithms.ridge"):
        masked, [found] = run("masked", secagg=True, **given)
        exact, [wanted] = run("exact", **given)
    torch.testing.assert_close(masked, exact, rtol=0, atol=1e-4 * float(exact.abs().max()))
    assert (found.accuracy, found.central_accuracy) == (wanted.accuracy, wanted.central_accuracy)
    chosen = [record.getMessage() for record in caplog.records if "are chosen on validation" in record.getMessage()]
    assert len(chosen) == 2
    assert chosen[0] == chosen[1]


@pytest.mark.usefixtures("stores")
def test_the_best_round_and_an_early_end_follow_the_figures_of_all_stores_together() -> None:
    given = {"rounds": 6, "patience": 1, "test_dir": None, "compare": False, "client_lr": 0.3, "norm": "group"}
    masked, rounds = run("masked", secagg=True, **given)
    plain, others = run("plain", codec_up="modular:32", **given)
    assert 1 < len(rounds) < 6, "the run ends early"
    assert [(r.accuracy, r.best_round) for r in rounds] == [(r.accuracy, r.best_round) for r in others]
    best = max(rounds, key=lambda found: (found.accuracy, -found.round))
    assert rounds[-1].best_round == best.round == rounds[-1].round - 1
    assert torch.equal(masked, plain)
    assert Path("masked/model/best/model.safetensors").read_bytes() == (
        Path("plain/model/best/model.safetensors").read_bytes()
    )
    shown = json.loads(output("show", "masked", "--json"))
    assert [found["accuracy"] for found in shown["rounds"]] == [found.accuracy for found in others]
    assert {member["accuracy"] for found in shown["rounds"] for member in found["clients"]} == {None}


@pytest.mark.usefixtures("stores")
def test_figures_without_noise_are_not_sent_under_masks_either() -> None:
    given = {"dp": "sample", "noise_multiplier": 1.0, "norm": "group", "compare": False}
    _, rounds = run("masked", secagg=True, **given)
    assert {found.accuracy for found in rounds} == {None}
    assert json.loads(output("show", "masked", "--json"))["refused"] == []
    noisy, [found] = run("head", secagg=True, **{**given, "algorithm": "ridge", "rounds": 1})
    assert found.accuracy is None
    assert bool(noisy.isfinite().all())


@pytest.mark.usefixtures("stores")
def test_too_many_uploads_for_the_codec_end_the_run_with_the_remedy() -> None:
    with pytest.raises(RunError, match="modular:32:0:4"):
        run("run", secagg=True, codec_up="modular:32:0:3")


def test_masks_imply_a_codec_with_room_for_all_stores(home: Path) -> None:
    for number in range(66):
        write_pack(Path("stores") / f"s{number:02}", dict.fromkeys(CLASSES, 1))
    given = {"test_dir": None, "rounds": 1, "local_epochs": 1, "compare": False, "val_fraction": 0.0}
    masked, _ = run("masked", secagg=True, **given)
    codec = json.loads(output("show", "masked", "--json"))["codec_up"]
    assert codec == "modular:32:0:66"
    plain, _ = run("plain", codec_up=codec, **given)
    assert torch.equal(masked, plain)
    assert "min-clients = 3" in Path("masked/config.toml").read_text()


def test_a_server_s_codec_has_room_for_twice_the_stores_that_it_waits_for() -> None:
    assert load(RunConfig, None, {"secagg": True, "min_clients": 32}).codec_up == "modular:32"
    assert load(RunConfig, None, {"secagg": True, "min_clients": 80}).codec_up == "modular:32:0:160"
    few = load(RunConfig, None, {"he": True, "weights": "equal", "min_clients": 80})
    assert few.codec_up == "modular:16:0:160"


@pytest.mark.usefixtures("stores")
def test_the_protection_is_in_what_a_run_shows() -> None:
    run("run", secagg=True, rounds=1, compare=False)
    shown = json.loads(output("show", "run", "--json"))
    assert shown["protections"] == ["secagg"]
    assert shown["codec_up"] == "modular:32"


@pytest.mark.usefixtures("stores")
def test_no_secret_of_a_round_is_in_a_file_or_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    secrets: list[bytes] = []

    def recorded(*given: Any) -> Any:
        found, shown = advertise(*given)
        secrets.extend([found.seed, found.mask_key.private_bytes_raw(), found.seal_key.private_bytes_raw()])
        return found, shown

    def recorded_shares(*given: Any) -> Any:
        dealt = deal(*given)
        secrets.extend(share for shares in dealt.values() for share in (shares.seed, shares.mask_key))
        return dealt

    monkeypatch.setattr(client, "advertise", recorded)
    monkeypatch.setattr(client, "deal", recorded_shares)
    with caplog.at_level(logging.DEBUG):
        run("run", secagg=True, rounds=2)
    assert len(secrets) == 2 * 2 * 4 * (3 + 2 * 4)  # for the uploads and the evaluations of two rounds
    forms = [form for secret in secrets for form in (secret, secret.hex().encode(), base64.b64encode(secret))]
    files = [path for path in home.parent.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not any(form in content for form in forms), path
    assert not any(form.decode("latin-1") in caplog.text for form in forms)
