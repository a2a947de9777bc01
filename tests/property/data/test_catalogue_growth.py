"""Properties of a catalogue and a model that grow: nothing known changes, and nothing new steals."""

import random
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedshelf.core.errors import DataError, ModelError
from fedshelf.core.growth import Growth
from fedshelf.core.params import Layout, Params, bind
from fedshelf.data.catalogue import Catalogue, united
from fedshelf.data.catalogue_changes import problem_with_change, with_products
from fedshelf.data.folder import class_folder
from tests.examples import examples

NAMES = st.lists(
    st.text(string.ascii_lowercase + "äß柠 ", min_size=1, max_size=6).map(str.strip).filter(bool),
    min_size=2, max_size=8, unique=True,
)  # fmt: skip


def flat(names: list[str]) -> Catalogue:
    return Catalogue(tuple(names), tuple((name,) for name in names))


@given(NAMES, st.integers(1, 7))
@settings(max_examples=examples(60))
def test_a_catalogue_grows_at_its_end_and_knows_where_it_began(names: list[str], split: int) -> None:
    before = flat(names[: min(split, len(names) - 1)])
    after = with_products(before, names, allow_similar=True)
    assert after.names == tuple(names)
    assert problem_with_change(before, after) == ""
    assert after.num_first(before.names_digest) == len(before)
    assert after.num_first(after.names_digest) == len(after)
    assert before.num_first(after.names_digest) is None
    assert after.first(len(before)) == before
    for index, name in enumerate(names):
        assert after.index_of(class_folder(f"shelf/{name}")) == index
    if len(after) > len(before):
        assert "removed, renamed, or moved" in problem_with_change(after, before)


@given(NAMES, st.randoms())
@settings(max_examples=examples(60))
def test_aliases_unite_what_stores_call_a_product_or_all_conflicts_are_named(
    names: list[str], rng: random.Random
) -> None:
    catalogue = flat(names)
    pairs = [(f"SKU {rng.randrange(6)}", rng.choice(names)) for _ in range(5)]
    meanings = {alias: {name for other, name in pairs if other == alias} for alias, _ in pairs}
    conflicts = sorted(alias for alias, found in meanings.items() if len(found) > 1)
    if conflicts:
        with pytest.raises(DataError) as caught:
            united(pairs)
        assert all(f"'{alias}' means both" in str(caught.value) for alias in conflicts)
        return
    named = catalogue.with_aliases(united(pairs))
    assert named.names_digest == catalogue.names_digest
    assert problem_with_change(catalogue, named) == ""
    for alias, name in pairs:
        assert named.index_of(class_folder(alias)) == names.index(name)
    assert Catalogue.from_json(named.to_json()) == named
    taken = {pairs[0][0]: next(name for name in names if name != pairs[0][1]), names[0]: names[1]}
    with pytest.raises(DataError) as caught:
        named.with_aliases(taken)
    assert len(caught.value.args) == 2


def model(num_classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, num_classes))


def of(module: nn.Module, *, personal: bool = False) -> Params:
    return bind(module, is_personal=lambda name: personal and name.startswith("3."))


ROWS = frozenset({"3.weight", "3.bias"})


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99), st.booleans())
@settings(max_examples=examples(30))
def test_a_grown_model_says_what_it_said_and_its_new_rows_are_never_first(
    before: int, more: int, seed: int, personal: bool
) -> None:
    small, large = model(before, seed), model(before + more, seed + 1)
    old, new = of(small, personal=personal), of(large, personal=personal)
    growth = Growth(layout=new.layout, rows=ROWS, before=before, after=before + more)
    new.shared.copy_(growth.shared(old.shared))
    new.personal.copy_(growth.personal(old.personal))
    with torch.no_grad():
        images = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        logits, grown = small.eval()(images), large.eval()(images)
    assert torch.allclose(grown[:, :before], logits, atol=1e-6)
    assert torch.allclose(grown[:, before:], logits.mean(1, keepdim=True).expand(-1, more), atol=1e-5)
    if before > 1:
        assert torch.equal(grown.argmax(1), logits.argmax(1))
    if more == 1:
        assert float(grown.softmax(1)[:, -1].max()) <= 1 / (before + 1) + 1e-6


@given(st.integers(1, 6), st.integers(1, 4), st.floats(-2, 2, width=32))
@settings(max_examples=examples(30))
def test_what_an_optimizer_keeps_gets_the_given_value_for_new_coordinates(before: int, more: int, fill: float) -> None:
    old, new = of(model(before, 0)).layout, of(model(before + more, 0)).layout
    growth = Growth(layout=new, rows=ROWS, before=before, after=before + more)
    vector = torch.arange(1.0, old.num_trainable + 1)
    grown = growth.trainable(vector, fill=fill)
    assert len(grown) == new.num_trainable
    assert sorted(grown.tolist()) == sorted([*vector.tolist(), *[fill] * (more * 17)])
    by_name = named(new, grown)
    for name, values in named(old, vector).items():
        assert torch.equal(by_name[name][: len(values)], values), name
    same = growth.of_size(vector)
    assert same is not None
    assert torch.equal(same, growth.trainable(vector))
    assert growth.of_size(vector[:-1]) is None


def named(layout: Layout, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        t.name: torch.as_strided(vector, t.shape, t.stride, t.offset)
        for t in layout.tensors
        if t.offset < layout.num_trainable
    }  # fmt: skip


def test_a_model_that_cannot_grow_says_why() -> None:
    layout = of(model(4, 0)).layout
    frozen = bind(model(4, 0), is_frozen=lambda name: name.startswith("3.")).layout
    for rows, before, given_layout, said in (
        (frozenset[str](), 3, layout, "no output layer that could be found"),
        (ROWS, 4, layout, "classes are only added"),
        (ROWS, 3, frozen, "the output layer of this run is frozen"),
        (frozenset({"0.weight"}), 3, of(model(3, 0)).layout, "one row for each"),
    ):
        with pytest.raises(ModelError, match=said):
            Growth(layout=given_layout, rows=rows, before=before, after=5 if said.startswith("one") else 4)
    growth = Growth(layout=layout, rows=ROWS, before=3, after=4)
    with pytest.raises(ModelError, match="in more than its output layer"):
        growth.shared(torch.zeros(7))
