"""Keyed randomness: stable over versions, since a resumed run must draw what it drew before."""

import itertools

import torch

from fedshelf.core.rng import Rng

PINNED = (8267082969884941211, 2538724033655614738, 5709719293750871023)


def test_the_derivation_never_changes() -> None:
    assert Rng(0).fork(purpose="shuffle", round=1, client="a").seed == PINNED[0]
    assert Rng(7).fork(purpose="cohort-0", round=3).seed == PINNED[1]
    assert Rng(2**63 - 1).fork(purpose="init").seed == PINNED[2]


def test_every_part_of_the_key_counts() -> None:
    keys = itertools.product((0, 1), ("shuffle", "augment"), (0, 1, 11), ("", "a", "1", "ü"))
    seeds = [Rng(seed).fork(purpose=p, round=r, client=c).seed for seed, p, r, c in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_parts_of_the_key_do_not_run_together() -> None:
    rng = Rng(0)
    assert rng.fork(round=1, client="1a", purpose="p") != rng.fork(round=11, client="a", purpose="p")
    assert rng.fork(client="ab", purpose="c") != rng.fork(client="a", purpose="bc")


def test_forking_and_drawing_leave_the_parent_as_it_was() -> None:
    rng = Rng(3)
    first = rng.fork(purpose="x").torch()
    torch.rand(5, generator=first)
    rng.python().random()
    assert torch.equal(
        torch.rand(5, generator=rng.fork(purpose="x").torch()),
        torch.rand(5, generator=Rng(3).fork(purpose="x").torch()),
    )
    assert rng.python().random() == rng.python().random()


def test_children_draw_differently() -> None:
    draws = [torch.rand(1000, generator=Rng(0).fork(purpose=p).torch()) for p in ("a", "b")]
    correlation = torch.corrcoef(torch.stack(draws))[0, 1].abs()
    assert correlation < 0.15
