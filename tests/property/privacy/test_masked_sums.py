"""Uploads of a model through the codec and the protocol: masked or not, the sum is the same in every bit."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedshelf.compression.chain import parse
from fedshelf.compression.modular import Modular
from fedshelf.compression.upload_grid import UploadGrid
from fedshelf.core.messages import DELTA
from fedshelf.core.params import bind
from fedshelf.models.resnet import resnet10
from tests.unit.privacy.secure_aggregation.cohort import CONTEXT, Cohort, added

LAYOUT = bind(resnet10(5, width=4)).layout


@settings(max_examples=15)
@given(
    st.sampled_from([("modular:16", 1.0), ("modular:32", 1.0), ("modular:32", 500.0)]),
    st.integers(3, 7),
    st.integers(0, 2**32),
)
def test_masked_equals_unmasked_bit_for_bit(form: tuple[str, float], count: int, seed: int) -> None:
    text, max_weight = form
    codec, random = parse(text).quantizer, Random(seed)
    assert isinstance(codec, Modular)
    grids = UploadGrid.of(codec, LAYOUT, scalars=("weight", "loss"), max_weight=max_weight)
    cohort = Cohort(count, context=replace(CONTEXT, sizes=grids.sizes))
    generator = torch.Generator().manual_seed(seed)
    for number, name in enumerate(cohort.names):
        weight = float(random.randint(1, int(max_weight)))
        delta = 10 ** random.uniform(-4, 0) * torch.randn(LAYOUT.num_shared, generator=generator)
        numbers = {"weight": weight, "loss": weight * random.uniform(0, 5)}
        cohort.plain[name] = grids.encode({DELTA: delta}, numbers, weight=weight, seed=number)
    staying = sorted(random.sample(cohort.names, random.randint(2 * count // 3 + 1, count)))
    masked = cohort.keys().shares().uploads(staying).signatures(staying).opened(staying)
    plain = added((cohort.plain[name] for name in staying), cohort.context)
    assert all(np.array_equal(one, other) for one, other in zip(masked, plain, strict=True))
    (vectors, scalars), (others, numbers) = grids.decode(masked), grids.decode(plain)
    assert torch.equal(vectors[DELTA], others[DELTA])
    assert scalars == numbers
    assert scalars["weight"] == pytest.approx(sum(grids.decode(cohort.plain[name])[1]["weight"] for name in staying))
