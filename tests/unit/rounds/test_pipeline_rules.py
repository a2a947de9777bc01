"""The pipeline's rules: what may not go together is refused when a run is configured, all of it at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedshelf.compression.chain import parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.compression.codec_stage import Encode
from fedshelf.core.messages import TaskKey, Upload, auxiliary_vectors
from fedshelf.core.params import Layout
from fedshelf.core.stages import Declaration, Stage
from fedshelf.core.state import ClientState
from fedshelf.privacy.clipping import Clip
from fedshelf.rounds.pipeline import UploadPipeline, problems
from tests.worlds import bound_model, with_batch_norm


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A stage that only says what it is."""

    declares: Declaration

    def seal(
        self, upload: Upload, memory: Tensor | None, *, client: str, layout: Layout
    ) -> tuple[Upload, Tensor | None]:
        return upload, memory

    def open(self, upload: Upload, layout: Layout) -> Upload:
        return upload


NOISE = Declared(declares=Declaration(name="noise", setting="--noise 1", adds_noise=True))
MASKS = Declared(declares=Declaration(name="masks", setting="--secagg", masks=True))
CLIP = Clip(max_norm=1.0)


def codec(text: str) -> Sequence[Stage]:
    return () if text == "none" else (Encode(policy=CodecPolicy(codec=parse(text))),)


@pytest.mark.parametrize("text", ["none", "int8", "topk:0.1+modular:16:1", "drive", "int4+zstd", "modular:16:1+zstd"])
def test_masked_sums_refuse_what_masks_do_not_cancel_in(text: str) -> None:
    assert problems([*codec(text), MASKS])


@pytest.mark.parametrize("text", ["modular:16:1", "randk:0.1+modular:16:0.5"])
def test_modular_integers_and_a_common_choice_of_values_are_offered_to_masked_sums(text: str) -> None:
    assert problems([CLIP, *codec(text), MASKS]) == []


@pytest.mark.parametrize("text", ["topk:0.1", "topk:0.1+int8+zstd", "randk:0.5"])
def test_noise_refuses_error_feedback(text: str) -> None:
    (only,) = problems([CLIP, NOISE, *codec(text)])
    assert "error feedback" in only


@pytest.mark.parametrize("text", ["none", "int8+zstd", "drive", "int4"])
def test_noise_allows_what_keeps_no_memory(text: str) -> None:
    assert problems([CLIP, NOISE, *codec(text)]) == []


def test_protections_are_what_limits_an_upload_and_no_codec_is_one() -> None:
    stages: tuple[Stage, ...] = (CLIP, NOISE, *codec("int8"), MASKS)
    assert UploadPipeline(stages=stages).protections == ("clip-norm 1", "noise 1", "secagg")
    assert UploadPipeline(stages=(*codec("int8"),)).protections == ()


def test_noise_needs_a_clip_before_it() -> None:
    (only,) = problems([NOISE])
    assert "--clip-norm" in only
    assert len(problems([NOISE, CLIP])) == 2, "and none after it"


def test_plain_stages_come_before_the_codec_and_no_stage_comes_twice() -> None:
    (misplaced,) = problems([*codec("int8"), CLIP])
    assert "put it first" in misplaced
    (twice,) = problems([CLIP, CLIP])
    assert "two stages" in twice


def test_stages_are_in_a_safe_order_by_what_they_declare() -> None:
    plain = Declared(declares=Declaration(name="plain", setting="--plain 1"))
    ordered: list[Stage] = [CLIP, NOISE, plain, *codec("modular:16:1"), MASKS]
    positions = [stage.declares.position for stage in ordered]
    assert positions == sorted(set(positions))
    assert problems(ordered) == []


def test_all_that_is_wrong_is_told_at_once() -> None:
    found = problems([CLIP, NOISE, *codec("topk:0.1+int8+zstd"), MASKS])
    assert len(found) == 4
    assert all("--codec-up topk:0.1+int8+zstd" in problem for problem in found)


@pytest.mark.parametrize("text", ["none", "topk:0.01+int8+zstd", "drive"])
def test_without_protection_everything_goes(text: str) -> None:
    assert problems(codec(text)) == []


@pytest.mark.parametrize("size", [0.5, 3.0])
def test_clipping_bounds_all_that_leaves_together_and_leaves_small_uploads_as_they_are(size: float) -> None:
    layout = bound_model(with_batch_norm()).params.layout
    delta, control = torch.randn(layout.num_shared), torch.randn(layout.num_trainable)
    norm = float(torch.cat([delta, control]).norm())
    upload = Upload(
        key=TaskKey(run_id="r", round=1, attempt=0), num_examples=1, num_steps=1, train_loss=0.0, seconds=0.0,
        vectors={"delta": size * delta / norm, **auxiliary_vectors({"control": size * control / norm})},
    )  # fmt: skip
    pipeline = UploadPipeline(stages=(Clip(max_norm=1.0),))
    sealed, after = pipeline.seal(upload, client="a", before=ClientState(), after=ClientState(), layout=layout)
    assert after.is_empty
    opened = pipeline.open(sealed, layout)
    left = torch.cat([opened.delta, opened.auxiliary["control"]])
    assert float(left.norm()) == pytest.approx(min(size, 1.0), rel=1e-5)
    torch.testing.assert_close(left / left.norm(), torch.cat([delta, control]) / norm, rtol=1e-4, atol=1e-6)
    if size < 1:
        assert opened.vectors is upload.vectors
