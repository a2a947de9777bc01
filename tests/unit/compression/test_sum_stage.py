"""The stage that encodes uploads for a sum."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedshelf.compression.modular import Modular
from fedshelf.compression.sum_stage import SCALARS, SUMMAND, EncodeSummand
from fedshelf.compression.unit_ball import WITHIN, IntegerBall, UnitBall
from fedshelf.compression.upload_grid import Integers, UploadGrid
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import DELTA, TaskKey, Upload
from fedshelf.core.params import bind
from fedshelf.core.rng import Rng
from fedshelf.core.state import ClientState
from fedshelf.models.resnet import resnet10
from fedshelf.rounds.pipeline import UploadPipeline, problems
from fedshelf.serialization import messages as payload

LAYOUT = bind(resnet10(5, width=4)).layout
GRID = UploadGrid.of(Modular(32), LAYOUT, scalars=SCALARS, max_weight=1000.0)
STAGE = EncodeSummand(
    codec=Modular(32), vectors=lambda layout: {DELTA: (layout.num_shared, torch.float32)}, max_weight=1000.0,
    weight=lambda upload: float(upload.weight), rng=Rng(7),
)  # fmt: skip


def upload(seed: int, *, loss: float | None = 1.5) -> Upload:
    delta = 0.01 * torch.randn(LAYOUT.num_shared, generator=torch.Generator().manual_seed(seed))
    return Upload(
        key=TaskKey(run_id="run", round=2, attempt=0), vectors={DELTA: delta}, num_examples=10 * seed, num_steps=7,
        train_loss=loss, seconds=1.0,
    )  # fmt: skip


def sealed(seed: int, *, loss: float | None = 1.5) -> Upload:
    return STAGE.seal(upload(seed, loss=loss), None, client=f"store-{seed}", layout=LAYOUT)[0]


def test_a_sum_over_the_wire_decodes_to_weighted_sums_of_vectors_and_numbers() -> None:
    total = GRID.zeros()
    for seed in (1, 2, 3):
        sent = sealed(seed, loss=None if seed == 2 else 0.5 * seed)
        blob = payload.blob_of(sent)
        received = payload.decode(payload.encode_header(sent, blob.digest), bytearray(blob.join()))
        assert isinstance(received, Upload)
        for into, part in zip(total, STAGE.codes(STAGE.open(received, LAYOUT), LAYOUT), strict=True):
            np.add(into, part, out=into)
    vectors, numbers = GRID.decode(total)
    expected = sum(10 * seed * upload(seed).delta.double() for seed in (1, 2, 3))
    assert torch.allclose(vectors[DELTA], torch.as_tensor(expected), atol=2e-2, rtol=0)
    assert {name: numbers[name] for name in ("weight", "num_examples", "num_steps", "loss_weight")} == {
        "weight": 60, "num_examples": 60, "num_steps": 21, "loss_weight": 40,
    }  # fmt: skip
    assert numbers["loss"] == pytest.approx(10 * 0.5 + 30 * 1.5)


def test_the_header_has_none_of_the_numbers_that_are_summed() -> None:
    found = sealed(3)
    assert (found.num_examples, found.num_steps, found.train_loss) == (None, None, None)
    assert set(found.vectors) == {SUMMAND}


def test_the_same_upload_is_encoded_to_the_same_bits_and_that_of_another_store_to_others() -> None:
    def parts(client: str) -> list[torch.Tensor]:
        vector = STAGE.seal(upload(1), None, client=client, layout=LAYOUT)[0].vectors[SUMMAND]
        assert isinstance(vector, Encoded)
        return list(vector.parts.values())

    assert all(map(torch.equal, parts("a"), parts("a")))
    assert not all(map(torch.equal, parts("a"), parts("b")))


def test_it_is_a_codec_of_the_pipeline() -> None:
    assert problems([STAGE]) == []
    state = ClientState()
    packed, after = UploadPipeline(stages=(STAGE,)).seal(
        upload(1), client="store-1", before=state, after=state, layout=LAYOUT
    )
    assert set(packed.vectors) == {SUMMAND}
    assert after.pipeline == {}


def test_uploads_that_are_not_codes_of_this_grid_are_refused() -> None:
    good = sealed(1)
    vector = good.vectors[SUMMAND]
    assert isinstance(vector, Encoded)
    parts = vector.parts
    for wrong, told in (
        (upload(1), "not encoded for a sum"),
        (good.with_vectors(more=torch.zeros(1)), "not encoded for a sum"),
        (good.with_vectors(**{SUMMAND: replace(vector, codec="modular:16")}), "another codec"),
        (good.with_vectors(**{SUMMAND: replace(vector, parts={"narrow": parts["narrow"]})}), "other names"),
        (good.with_vectors(**{SUMMAND: replace(vector, parts={**parts, "wide": parts["wide"][1:]})}), "lengths"),
        (good.with_vectors(**{SUMMAND: replace(vector, parts={**parts, "wide": parts["wide"].int()})}), "types"),
    ):
        with pytest.raises(RefusedError, match=told):
            STAGE.open(wrong, LAYOUT)


BOUNDED = replace(STAGE, max_weight=1.0, weight=lambda upload: 1.0, unit_ball=UnitBall(has_within=True))


def bounded_codes(delta: torch.Tensor, *, within: float = 0.5) -> tuple[tuple[Integers, ...], IntegerBall]:
    vectors = {DELTA: delta, WITHIN: torch.tensor([within], dtype=torch.float64)}
    sent, _ = BOUNDED.seal(replace(upload(1), vectors=vectors), None, client="a", layout=LAYOUT)
    ball = BOUNDED.ball(LAYOUT)
    assert ball is not None
    return BOUNDED.codes(sent, LAYOUT), ball


def random_vector(seed: int = 0) -> torch.Tensor:
    vector = torch.randn(LAYOUT.num_shared, generator=torch.Generator().manual_seed(seed))
    return vector.div_(vector.norm())


def test_the_integers_of_a_vector_in_the_unit_ball_are_within_their_bound_whatever_it_is() -> None:
    corner = torch.zeros(LAYOUT.num_shared)
    corner[3] = 1 - 2.0**-20
    for vector in (random_vector(), corner, -corner, torch.full((LAYOUT.num_shared,), LAYOUT.num_shared**-0.5)):
        codes, ball = bounded_codes(vector)
        values = codes[0].view(np.int32).astype(np.float64)
        assert values @ values <= ball.squared_norm
        assert math.sqrt(values @ values) > 0.95 * ball.levels
        assert abs(values / ball.levels - vector.numpy()).max() <= 1.001 / ball.levels
        assert not codes[1].size, "all values are on one grid"


def test_integers_that_no_draw_brings_within_the_bound_are_rounded_toward_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a store would draw them that wants to exceed the bound: every value is rounded up."""
    monkeypatch.setattr("fedshelf.compression.dither.Dither.fill", lambda self, out: out.fill(1 - 2.0**-17))
    vector = torch.full((LAYOUT.num_shared,), LAYOUT.num_shared**-0.5)
    codes, ball = bounded_codes(vector)
    np.testing.assert_array_equal(codes[0].view(np.int32), int(ball.levels * LAYOUT.num_shared**-0.5))


def test_bounded_sums_decode_to_sums_and_to_how_many_were_within() -> None:
    total = BOUNDED.grid(LAYOUT).zeros()
    for seed, within in ((1, 0.5), (2, -0.5), (3, 0.5)):
        for into, part in zip(total, bounded_codes(random_vector(seed), within=within)[0], strict=True):
            np.add(into, part, out=into)
    vectors, numbers = BOUNDED.grid(LAYOUT).decode(total)
    assert vectors.pop(WITHIN).tolist() == [0.5]
    expected = random_vector(1).double() + random_vector(2).double() + random_vector(3).double()
    ball = BOUNDED.ball(LAYOUT)
    assert ball is not None
    torch.testing.assert_close(vectors[DELTA], expected, rtol=0, atol=3.01 / ball.levels)
    assert numbers["weight"] == 3
