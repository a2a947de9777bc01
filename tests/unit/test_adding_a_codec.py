"""The codec of the how-to page, added as the page says."""

from itertools import pairwise

import pytest
import torch

from fedshelf.app.components import uploads_of
from fedshelf.compression.chain import parse
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import FedShelfError, UsageError
from tests.howto import Addition
from tests.worlds import World


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    Addition.of("add-a-codec.md").install(monkeypatch)


@pytest.mark.parametrize("text", ["uniform:0.01", "uniform:0.01+zstd", "topk:1.0+uniform:0.01"])
def test_values_come_back_as_the_nearest_multiples_of_the_step(text: str) -> None:
    chain, vector = parse(text), torch.linspace(-3, 3, 1001)
    assert str(chain) == text
    decoded = chain.decode(chain.encode(vector, seed=1))
    assert (decoded - vector).abs().max() <= 0.005001
    torch.testing.assert_close((decoded / 0.01).round() * 0.01, decoded)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("uniform", "write uniform:STEP .STEP: the distance between neighboring values"),
        ("uniform:2", "STEP = 2 is not above 0 and at most 1"),
        ("unifrom:1", "did you mean 'uniform:STEP'"),
        ("uniform:0.1+int8", "at most one quantizer .*uniform"),
    ],
)
def test_a_wrong_text_is_refused_as_that_of_any_other_codec(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse(text)


def test_values_that_the_codec_cannot_hold_are_an_error() -> None:
    with pytest.raises(FedShelfError, match="larger STEP"):
        parse("uniform:0.0001").encode(torch.tensor([4.0]), seed=1)


def test_a_federation_runs_with_it() -> None:
    world = World(plan={"uploads": uploads_of(RunConfig(codec_up="uniform:0.001+zstd"))})
    world.run()
    steps = [(after.model.params - before.model.params).norm() for before, after in pairwise(world.checkpoints.states)]
    assert steps
    assert all(step > 0.01 for step in steps)
