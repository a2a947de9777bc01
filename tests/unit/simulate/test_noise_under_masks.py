"""`--dp client` with `--secagg`: stores clip, and the noise is the server's, or that of the stores together."""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedshelf.compression.upload_grid import UploadGrid
from fedshelf.core.errors import UsageError
from fedshelf.privacy.distributed_dp import NoiseShares
from fedshelf.rounds import round_steps
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from tests.unit.data.samples import write_pack
from tests.unit.simulate.test_masked_simulation import CLASSES, STORES, run
from tests.unit.tracking.test_runs_commands import output

NOISELESS = 1e-9
GIVEN: dict[str, Any] = {"dp": "client", "norm": "group", "compare": False}


@pytest.fixture(autouse=True)
def stores(home: Path) -> None:
    for number, name in enumerate(STORES):
        write_pack(Path("stores") / name, dict.fromkeys(CLASSES, 3 + number))
    write_pack(Path("test"), dict.fromkeys(CLASSES, 2))


def initial() -> torch.Tensor:
    """The model that all runs of these tests start from."""
    found, _ = run("unmoved", rounds=1, norm="group", client_lr=1e-12, compare=False)
    return found


@pytest.mark.parametrize(
    ("codec", "given"),
    [
        ("modular:32", {}),
        ("modular:16:0:8", {"clip_norm": 0.5, "width": 4}),
        ("modular:32", {"algorithm": "scaffold", "clip_norm": 0.5}),
    ],
    ids=str,
)
def test_with_the_same_key_of_the_noise_a_masked_run_has_the_bits_of_one_without_masks(
    monkeypatch: pytest.MonkeyPatch, codec: str, given: dict[str, Any]
) -> None:
    monkeypatch.setattr(round_steps, "new_key", lambda: bytes(32))
    values = {**GIVEN, "noise_multiplier": 0.5, **given}
    masked, rounds = run("masked", secagg=True, codec_up=codec, **values)
    plain, others = run("plain", codec_up=codec, **values)
    assert torch.equal(masked, plain)
    assert [round_.train_loss for round_ in rounds] == [round_.train_loss for round_ in others]
    monkeypatch.setattr(round_steps, "new_key", lambda: bytes(31) + b"1")
    another, _ = run("another", secagg=True, codec_up=codec, **values)
    assert not torch.equal(masked, another)


@pytest.mark.parametrize("clip_norm", [0.02, 0.5])
def test_stores_clip_as_the_server_would(clip_norm: float) -> None:
    values = {**GIVEN, "noise_multiplier": NOISELESS, "clip_norm": clip_norm, "rounds": 1, "client_lr": 0.2}
    masked, _ = run("masked", secagg=True, **values)
    plain, _ = run("plain", **values)
    moved = float((plain - initial()).norm())
    assert (moved <= 0.02 * 1.001) == (clip_norm == 0.02), "one of the two norms clips, and the other does not"
    assert float((masked - plain).norm()) < 0.03 * clip_norm, "the error of rounding is far below the noise of any ε"


def clip_norm_after(name: str) -> float | None:
    state = FileCheckpoints(RunDirectory.open(Path(name)).checkpoints).load()
    return None if state is None else state.clip_norm


@pytest.mark.parametrize("noise_at", ["server", "stores"])
@pytest.mark.parametrize(("client_lr", "share"), [(1e-6, 1.0), (5.0, 0.0)])
def test_an_adaptive_norm_follows_the_norms_that_stores_count(noise_at: str, client_lr: float, share: float) -> None:
    """From 0.1, C changes by exp(-0.2 (share - 0.5)), and the count's noise has a deviation of a twentieth."""
    values = {**GIVEN, "secagg": True, "noise_multiplier": NOISELESS, "client_lr": client_lr, "warmup_rounds": 0}
    run("run", rounds=1, noise_at=noise_at, **values)
    assert clip_norm_after("run") == pytest.approx(0.1 * math.exp(-0.2 * (share - 0.5)), rel=0.06)


def test_the_sum_that_is_opened_is_that_of_codes_and_shares_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks cancel bit for bit over noise, too: with the noise given, the sum of what stores hold is what is opened."""
    held: list[list[np.ndarray[Any, Any]]] = []
    opened: list[list[np.ndarray[Any, Any]]] = []
    add, decode = NoiseShares.add, UploadGrid.decode

    def recorded_add(self: NoiseShares, codes: Any, ball: Any, **values: Any) -> None:
        before = [part.copy() for part in codes]
        add(self, codes, ball, **values)
        held.append([part.copy() for part in codes])
        assert (codes[0] != before[0]).mean() > 0.9, "nearly every value has noise"
        assert values["num_members"] == 4
        assert values["threshold"] == 3

    def recorded_decode(self: UploadGrid, codes: Any) -> Any:
        opened.append([part.copy() for part in codes])
        return decode(self, codes)

    monkeypatch.setattr(NoiseShares, "add", recorded_add)
    monkeypatch.setattr(UploadGrid, "decode", recorded_decode)
    _, rounds = run("run", secagg=True, noise_at="stores", noise_multiplier=0.5, **GIVEN)
    assert len(held) == 2 * 4
    for number in range(2):
        for part, found in enumerate(opened[number]):
            expected = sum(codes[part] for codes in held[4 * number : 4 * number + 4])
            np.testing.assert_array_equal(found, expected)
    for round_ in rounds:
        assert round_.train_loss is None
        for member in round_.clients:
            assert (member.num_examples, member.num_steps, member.seconds) == (None, None, None)


def test_without_noise_the_two_forms_make_the_same_model() -> None:
    values = {**GIVEN, "clip_norm": 0.5, "noise_multiplier": NOISELESS, "secagg": True}
    at_server, _ = run("server", **values)
    at_stores, _ = run("stores-", noise_at="stores", **values)
    torch.testing.assert_close(at_server, at_stores, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("noise_at", "surplus"), [("server", 1.0), ("stores", 4 / 3)])
def test_the_noise_in_the_model_has_the_declared_deviation(noise_at: str, surplus: float) -> None:
    """Of four stores, three have to stay: if all do, there is a third more of their noise."""
    values = {**GIVEN, "clip_norm": 0.01, "noise_multiplier": 20.0, "rounds": 1, "secagg": True}
    noisy, _ = run("noisy", noise_at=noise_at, **values)
    noise = noisy - initial()
    expected = 20 * 0.01 / 4 * math.sqrt(surplus)
    assert float(noise.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(noise)) + 0.01)


@pytest.mark.parametrize("noise_at", ["server", "stores"])
def test_sampling_amplifies_nothing_where_members_know_each_other(noise_at: str) -> None:
    run("run", secagg=True, noise_at=noise_at, fraction=0.75, noise_multiplier=2.0, rounds=3, **GIVEN)
    summary = run_summary(Path("run"))
    assert summary.noise[""].sampling_rate == 1
    shown = json.loads(output("show", "run", "--json"))["privacy"]
    taken = max(sum(member.client == name for round_ in summary.rounds for member in round_.clients) for name in STORES)
    assert {len(round_.clients) for round_ in summary.rounds} == {3}, "cohorts have the size of the fraction"
    assert [one["steps"] for one in shown["releases"]] == [taken]
    assert shown["unit"] == "client"
    assert (shown["pld"] is None) == (noise_at == "stores")
    assert any("Which stores take part in which round is known" in sentence for sentence in shown["assumptions"])
    assert any("as many stores as the threshold" in one for one in shown["assumptions"]) == (noise_at == "stores")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--noise-at stores with --dp client: a share of the noise protects the sum of all uploads"),
        ({"codec_up": "modular:32"}, "--noise-at stores with --dp client: a share of the noise"),
        ({"secagg": True, "codec_up": "int8"}, "--secagg masks integers"),
    ],
    ids=str,
)
def test_shares_of_noise_without_masks_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        run("run", noise_at="stores", noise_multiplier=1.0, **GIVEN, **given)
    assert any(said in str(problem) for problem in raised.value.args), raised.value.args


def test_too_few_bits_for_the_noise_end_the_run_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"modular:16 has no room for the sum of 64 updates .* or modular:32"):
        run("run", secagg=True, codec_up="modular:16", noise_at="stores", noise_multiplier=100.0, **GIVEN)


def test_the_epsilon_that_is_warned_of_is_not_below_the_one_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run("run", secagg=True, noise_at="stores", noise_multiplier=0.5, **GIVEN)
    [warned] = re.findall(r"ε will be ([0-9.]+) or somewhat less", caplog.text)
    epsilon = json.loads(output("show", "run", "--json"))["privacy"]["epsilon"]
    assert float(warned) == pytest.approx(epsilon, rel=5e-3)
