"""Whatever products a file and a run have: each row goes to the product that it belongs to."""

import unicodedata
from functools import partial
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedshelf.models.initial_weights import InitialWeights, load_initial_weights

names = st.text(min_size=1, max_size=3).map(partial(unicodedata.normalize, "NFC"))
products = st.lists(names, min_size=1, max_size=8, unique=True)


@given(old=products, new=products)
def test_a_row_belongs_to_a_name_and_not_to_a_position(old: list[str], new: list[str]) -> None:
    file = nn.Linear(2, len(old)).state_dict()
    module = nn.Linear(2, len(new))
    fresh = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights = InitialWeights(path=Path("w"), tensors=file, labels=tuple(old))
    loaded = load_initial_weights(module, weights, new)
    for name in ("weight", "bias"):
        tensor = module.state_dict()[name]
        for row, product in enumerate(new):
            source, position = (file, old.index(product)) if product in old else (fresh, row)
            assert torch.equal(tensor[row], source[name][position])
    assert sorted(loaded.kept + loaded.moved + loaded.added) == sorted(new)
    assert sorted(loaded.kept + loaded.moved + loaded.dropped) == sorted(old)
    assert all(old.index(product) == new.index(product) for product in loaded.kept)
    assert bool(loaded.reason) == (not set(old) & set(new))
