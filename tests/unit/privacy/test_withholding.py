"""What a policy withholds from a client's messages, and what the pages say of it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.app.privacy_explanation import released
from fedshelf.core.choices import Candidate
from fedshelf.core.messages import (
    ClassFolder,
    ClientMessage,
    Comparison,
    Evaluation,
    Join,
    ProductCount,
    Ready,
    TaskKey,
    Upload,
)
from fedshelf.privacy.policy import STANDARD, STRICT, Policy
from fedshelf.privacy.policy_tables import Metrics, Protection
from fedshelf.privacy.withholding import WITHHELD_BY, WITHOUT_NOISE, only_noised, withhold
from fedshelf.serialization import messages as wire

KEY = TaskKey(run_id="r", round=1, attempt=0)
PAGE = Path("docs/explanation/what-leaves-a-store.md")
MESSAGES: tuple[ClientMessage, ...] = (
    Join(protocol=7, version="1", client="a", classes=(ClassFolder(leaf="x", path="x"),)),
    Ready(
        run_id="r", layout_digest="l", catalogue_digest="c", config_digest="d", num_train=5, num_validation=2,
        num_left_out=1,
    ),
    Upload(key=KEY, vectors={"delta": torch.ones(3)}, num_examples=5, num_steps=2, train_loss=1.5, seconds=0.5),
    Evaluation(
        key=KEY, num_examples=2, num_correct=1, loss_sum=3.0, levels=(1,),
        products=(ProductCount(index=0, correct=1, total=2),),
    ),
    Comparison(key=KEY, best=Candidate.LOCAL, accuracies={Candidate.LOCAL: 0.5}, on_test=False, num_validation=2),
)  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("key", ["class_names", "example_counts", "losses", "per_product"])
def test_a_key_withholds_its_fields_and_no_others(key: str, message: ClientMessage) -> None:
    metrics = Metrics(**{key: False})
    kept = withhold(message, metrics)
    assert withhold(message, Metrics()) == message or isinstance(message, Upload | Comparison)
    for field in dataclasses.fields(message):
        by = WITHHELD_BY.get(type(message), {}).get(field.name)
        before, after = getattr(message, field.name), getattr(kept, field.name)
        if by is None or getattr(metrics, by):
            assert after is before
        else:
            assert not after
    header, blob = wire.encode_header(kept, wire.blob_of(kept).digest), wire.blob_of(kept)
    assert type(wire.Header.parse(header).message(dict(getattr(kept, "vectors", {})))) is type(kept)
    assert blob.size == wire.blob_of(message).size


def test_the_page_says_of_every_field_whether_it_can_be_withheld_and_by_which_key() -> None:
    parts = re.split(r"^#+ +(.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    for field in released(STANDARD):
        row = next(line for line in sections[field.message].splitlines() if line.startswith(f"| `{field.field}` |"))
        told = row.rstrip(" |").rsplit("| ", 1)[1]
        key = field.key.removeprefix("metrics.") if field.key.startswith("metrics.") else ""
        expected = f"clear, or withheld: `{key}`" if key else "clear"
        assert told == ("clear, or noised or summed: `required`" if field.field == "vectors" else expected), row


def test_the_page_names_what_a_run_with_noise_withholds() -> None:
    text = PAGE.read_text(encoding="utf-8")
    paragraph = text[text.index("In runs with `--dp sample`") :].split("\n\n")[0]
    assert set(re.findall("`(\\w+)`", paragraph)) == {field for told in WITHOUT_NOISE.values() for field in told or ()}


def states(policy: Policy) -> dict[str, str]:
    return {f"{field.message}.{field.field}": field.state for field in released(policy)}


def test_an_explanation_tells_the_state_of_every_field() -> None:
    assert set(states(STANDARD).values()) == {"clear"}
    strict = states(STRICT)
    assert strict["Upload.vectors"] == "noised"
    assert strict["Upload.train_loss"] == strict["Upload.seconds"] == strict["Ready.num_validation"] == "withheld"
    assert strict["Upload.num_examples"] == strict["Ready.num_train"] == "clear"
    assert {state for field, state in strict.items() if field.startswith("Evaluation")} == {"not sent"}
    assert {state for field, state in strict.items() if field.startswith("Comparison")} == {"not sent"}
    counts = states(Policy(metrics=Metrics(example_counts=False)))
    assert counts["Upload.num_steps"] == counts["Ready.num_train"] == counts["Comparison.accuracies"] == "withheld"
    assert counts["Evaluation.num_correct"] == "not sent"


def explained(**more: Any) -> Any:
    from fedshelf.app.privacy_explanation import explain

    return explain(**more).to_record()


def test_an_explanation_of_a_run_has_its_bytes_seconds_and_refusals() -> None:
    from fedshelf.config.schema import RunConfig

    config = RunConfig(width=8, image_size=16, batch_size=8, local_epochs=3)
    found = explained(policy=STRICT, config=config, num_classes=4, num_train=20)
    assert found["bytes_up"] > 4 * 77_612, "statistics of normalization leave, too"
    assert found["bytes_per_day"] == 100 * found["bytes_up"]
    assert found["seconds_per_round"] > 0
    assert "sample-dp" in found["refusals"][0]
    assert (found["epsilon"], found["delta"], found["budget"]) == (8.0, 1e-5, 8.0)
    assert {f["state"] for f in found["fields"] if f["message"] in ("Ready", "Upload", "Evaluation")} == {"not sent"}
    anything = explained(policy=STANDARD)
    assert (anything["epsilon"], anything["refusals"], anything["seconds_per_round"]) == (None, (), None)
    assert anything["bytes_up"] == 2 * 4 * STANDARD.limits.max_parameters
    scaffold = explained(policy=STANDARD, config=config.model_copy(update={"algorithm": "scaffold"}), num_classes=4)
    assert scaffold["bytes_up"] > 1.9 * found["bytes_up"], "control variates leave, too"


def test_an_explanation_of_an_encrypted_run_has_the_bytes_that_leave() -> None:
    from fedshelf.config.schema import RunConfig

    plain: dict[str, Any] = {"width": 8, "image_size": 16, "codec_up": "modular:32", "min_clients": 3}
    found, all_, head = (
        explained(policy=STANDARD, config=RunConfig(**plain, **more), num_classes=4)
        for more in ({}, {"he": True}, {"he": True, "he_scope": "head"})
    )
    assert [one["is_encrypted"] for one in (found, all_, head)] == [False, True, True]
    assert 3 * found["bytes_up"] < all_["bytes_up"] < 6 * found["bytes_up"]
    assert found["bytes_up"] < head["bytes_up"] < all_["bytes_up"], "the layers before the head are not encrypted"


def noised_run(**more: Any) -> Any:
    from fedshelf.config.schema import RunConfig

    given = {"width": 8, "image_size": 16, "batch_size": 8, "local_epochs": 1, "norm": "group", "rounds": 6}
    return RunConfig(**{**given, "dp": "sample", "noise_multiplier": 2.0, **more})


def field_states(record: dict[str, Any]) -> dict[str, str]:
    return {f"{field['message']}.{field['field']}": field["state"] for field in record["fields"]}


@pytest.mark.parametrize("policy", [STANDARD, STRICT], ids=["standard", "strict"])
def test_an_explanation_of_a_run_with_noise_tells_what_a_client_of_that_run_sends(policy: Policy) -> None:
    states = field_states(explained(policy=policy, config=noised_run(compare=True), num_train=64))
    assert states["Upload.vectors"] == "noised"
    for message in MESSAGES:
        name, told = type(message).__name__, WITHOUT_NOISE.get(type(message), {})
        mine = {field: state for field, state in states.items() if field.startswith(f"{name}.")}
        if isinstance(message, Evaluation):
            assert told is None
            assert set(mine.values()) == {"not sent"}
        elif isinstance(message, Join) or set(mine.values()) == {"not sent"}:
            continue
        else:
            assert isinstance(message, Ready | Upload | Comparison)
            kept = withhold(only_noised(message), policy.metrics)
            for field in dataclasses.fields(message):
                is_withheld = field.name in (told or {}) or not _same(message, kept, field.name)
                assert (mine[f"{name}.{field.name}"] == "withheld") is is_withheld, field.name


def _same(one: object, other: object, field: str) -> bool:
    return getattr(one, field) is getattr(other, field)


def test_an_explanation_of_a_run_with_noise_has_its_epsilon_and_what_the_budget_makes_of_it() -> None:
    from fedshelf.privacy.accounting import SampledGaussian, compose

    found = explained(policy=STANDARD, config=noised_run(), num_train=64)
    whole = SampledGaussian(noise_multiplier=2.0, sampling_rate=8 / 64, steps=8 * 6)
    assert found["epsilon"] == pytest.approx(compose([whole], found["delta"]).epsilon)
    assert found["noise"] == {"noise_multiplier": 2.0, "sampling_rate": 8 / 64, "steps": 8}
    assert (found["budget"], found["rounds_allowed"], found["refusals"]) == (None, 6, ())
    three = compose([SampledGaussian(noise_multiplier=2.0, sampling_rate=8 / 64, steps=8 * 3)], 1e-5).epsilon
    tight = Policy(protection=Protection(required="sample-dp", epsilon=three + 1e-3))
    stopped = explained(policy=tight, config=noised_run(), num_train=64)
    assert (stopped["epsilon"], stopped["rounds_allowed"]) == (found["epsilon"], 3)
    assert "stops the store after 3 rounds" in stopped["protection"]
    weak = explained(policy=tight, config=noised_run(noise_multiplier=0.3), num_train=64)
    assert "one round needs an ε of" in weak["refusals"][0]
    assert field_states(weak)["Upload.vectors"] == "not sent"
    assert field_states(weak)["Ready.num_train"] == "clear", "the budget is asked when a round begins"
    aimed = explained(policy=tight, config=noised_run(noise_multiplier=None, target_epsilon=8.0), num_train=64)
    assert (aimed["epsilon"] <= three + 1e-3, aimed["rounds_allowed"]) == (True, 6), "a store adds noise for its budget"
    assert explained(policy=STANDARD, config=noised_run())["epsilon"] is None
    without_photos = noised_run(noise_multiplier=None, target_epsilon=8.0)
    assert explained(policy=STANDARD, config=without_photos)["epsilon"] == 8.0
    assert explained(policy=tight, config=without_photos)["epsilon"] == three + 1e-3
    ridge = noised_run(algorithm="ridge", rounds=1, pretrained=False)
    assert explained(policy=STANDARD, config=ridge, num_train=64)["noise"] == {
        "noise_multiplier": 2.0, "sampling_rate": 1.0, "steps": 1
    }  # fmt: skip


def test_an_explanation_of_a_run_without_noise_in_the_store_says_who_sees_its_updates() -> None:
    found = explained(policy=STANDARD, config=noised_run(dp="client"), num_train=64)
    assert "sees each update without it" in found["protection"]
    assert field_states(found)["Upload.vectors"] == field_states(found)["Evaluation.num_correct"] == "clear"
    assert field_states(found)["Comparison.best"] == "not sent", "this run compares no models"
    assert "from which parts of photos can sometimes be reconstructed" in found["learns"][0]
