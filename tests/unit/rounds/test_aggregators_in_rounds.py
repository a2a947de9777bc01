"""Aggregators at work in rounds: what hostile clients come to, and what is kept of an upload that was left out."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedshelf.algorithms import aggregation
from fedshelf.algorithms.aggregation import combine, fold
from fedshelf.algorithms.reduce import MEAN, Aggregator, Parts, Verdict, weighted_mean
from fedshelf.algorithms.registry import AGGREGATORS
from fedshelf.algorithms.robust import NormBound
from fedshelf.algorithms.scaffold import CONTROL_VARIATE, Scaffold
from fedshelf.core.events import ClientStatus
from fedshelf.core.messages import (
    STATISTICS,
    TRAINABLE,
    Broadcast,
    Purpose,
    ServerMessage,
    TaskKey,
    Upload,
    auxiliary_vectors,
)
from fedshelf.storage.spool import FileSpool
from tests.fakes import Answer
from tests.worlds import Tamper, World, aggregator, with_batch_norm

EIGHT = tuple("abcdefgh")
KEY = TaskKey(run_id="r", round=1, attempt=0)


def upload(*delta: float, control: tuple[float, ...] = ()) -> Upload:
    return Upload(
        key=KEY,
        vectors={
            "delta": torch.tensor(delta, dtype=torch.float32),
            **auxiliary_vectors({"control": torch.tensor(control, dtype=torch.float32)} if control else {}),
        },
        num_examples=1,
        num_steps=1,
        train_loss=0.0,
        seconds=0.0,
    )


def finds(*verdicts: Verdict) -> Callable[[Parts], list[Verdict]]:
    return lambda parts: list(verdicts)


def test_what_a_screen_leaves_out_is_left_out_whole_and_the_other_weights_make_one() -> None:
    uploads = [upload(1, 2, control=(8,)), upload(9, 9, control=(9,)), upload(3, 6, control=(4,))]
    rule = Aggregator(screens=(finds(Verdict(), Verdict(left_out=True), Verdict()),))
    found, verdicts = combine(uploads, [1.0, 100.0, 3.0], rule, num_trainable=1)
    assert found.delta.tolist() == [2.5, 5.0]
    assert found.auxiliary["control"].tolist() == [6.0]
    assert (found.num_clients, found.num_trainable) == (2, 1)
    assert [verdict.left_out for verdict in verdicts] == [False, True, False]


@pytest.mark.parametrize(("name", "expected"), [("median", 2.0), ("trimmed-mean", 2.5), ("multi-krum", 2.5)])
def test_robust_rules_believe_no_weight(name: str, expected: float) -> None:
    values = (1.0, 2.0, 5.0, 2.0, 90.0) if name != "trimmed-mean" else (1.0, 2.0, 3.5, 2.0, 90.0)
    rule = aggregator(name, trim=0.25, norm_bound=None)
    found, _ = combine([upload(value) for value in values], [1, 1, 1e9, 1, 1e12], rule, num_trainable=1)
    assert found.delta.item() == expected


def test_each_part_has_its_own_factor() -> None:
    uploads = [upload(1, 2, 4, control=(8, 16)), upload(1, 2, 4, control=(8, 16))]
    factors = {TRAINABLE: 0.5, STATISTICS: 0.25, "auxiliary.control": 0.0}
    rule = Aggregator(screens=(finds(Verdict(factors=factors), Verdict()),))
    found, _ = combine(uploads, [1.0, 1.0], rule, num_trainable=2)
    assert found.delta.tolist() == [0.75, 1.5, 2.5]
    assert found.auxiliary["control"].tolist() == [4.0, 8.0]


def test_a_later_screen_sees_those_left_in_as_they_were_sent_and_its_findings_are_added() -> None:
    seen: list[list[float]] = []

    def second(parts: Parts) -> list[Verdict]:
        seen.append([row.item() for row in parts[TRAINABLE]])
        return [Verdict(factors={TRAINABLE: 0.5}, reason="second"), Verdict()]

    first = finds(
        Verdict(factors={TRAINABLE: 0.5}, reason="first"), Verdict(left_out=True, reason="out"), Verdict(reason="kept")
    )
    found, verdicts = combine(
        [upload(4), upload(5), upload(6)], [1.0] * 3, Aggregator(screens=(first, second)), num_trainable=1
    )
    assert seen == [[4.0, 6.0]]
    assert found.delta.item() == (1 + 6) / 2
    assert [verdict.reason for verdict in verdicts] == ["first; second", "out", "kept"]


def test_factors_stay_with_their_uploads_when_others_are_left_out() -> None:
    found, _ = combine(
        [upload(100), upload(2), upload(5)], [1.0] * 3,
        Aggregator(screens=(finds(Verdict(left_out=True), Verdict(factors={TRAINABLE: 0.5}), Verdict()),)),
        num_trainable=1,
    )  # fmt: skip
    assert found.delta.item() == (2 * 0.5 + 5) / 2


def test_an_upload_that_was_left_out_stays_out() -> None:
    assert Verdict(left_out=True).then(Verdict()).left_out
    assert Verdict().then(Verdict(left_out=True)).left_out
    assert not Verdict().then(Verdict()).left_out


def test_a_screen_that_leaves_nobody_in_is_an_error() -> None:
    with pytest.raises(ValueError, match="every upload"):
        combine([upload(1)], [1.0], Aggregator(screens=(finds(Verdict(left_out=True)),)), num_trainable=1)


def test_screens_are_not_shown_parts_without_values() -> None:
    def screen(parts: Parts) -> list[Verdict]:
        assert list(parts) == [TRAINABLE]
        return [Verdict()]

    assert combine([upload(1, 2)], [1.0], Aggregator(screens=(screen,)), num_trainable=2).aggregate.num_clients == 1


def test_the_mean_part_by_part_is_that_of_whole_deltas_to_the_last_bit() -> None:
    deltas = list(torch.randn(7, 101, generator=torch.Generator().manual_seed(3)))
    weights = [float(3 + 5 * i) for i in range(7)]
    found, _ = combine(
        [replace(upload(), vectors={**upload().vectors, "delta": delta}) for delta in deltas],
        weights,
        MEAN,
        num_trainable=64,
    )
    assert torch.equal(found.delta, fold(deltas, weights, weighted_mean))


@pytest.mark.parametrize("block", [1, 7, 40])
def test_scaled_rows_are_the_same_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = list(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)))
    before = [delta.clone() for delta in deltas]
    expected = weighted_mean([deltas[0] * 0.3, deltas[1], deltas[2] * 2], [0.5, 0.25, 0.25])
    factors = [0.3, 1.0, 2.0]
    assert torch.equal(fold(deltas, [2, 1, 1], weighted_mean, factors=factors, block=block), expected)
    monkeypatch.setattr(aggregation, "SCALED", 3 * block)
    assert torch.equal(fold(deltas, [2, 1, 1], weighted_mean, factors=factors), expected)
    assert all(torch.equal(delta, kept) for delta, kept in zip(deltas, before, strict=True)), "files are read only"


def test_scaled_copies_are_bounded_however_many_uploads_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "SCALED", 30)
    sizes: list[int] = []

    def watching(rows: Any, weights: Any) -> Tensor:
        sizes.append(sum(len(row) for row in rows))
        return weighted_mean(rows, weights)

    deltas = [torch.ones(25)] * 6
    fold(deltas, [1.0] * 6, watching, factors=[0.5] * 6)
    assert max(sizes) <= 30
    fold(deltas, [1.0] * 6, watching, factors=[1.0] * 6)
    assert sizes[-1] == 150, "views cost nothing"


def test_spooled_files_are_read_and_not_changed(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    uploads = [
        replace(
            upload(),
            vectors={
                **upload().vectors,
                "delta": torch.randn(60, generator=draw) * 3**i,
                **auxiliary_vectors({"c": torch.randn(40, generator=draw)}),
            },
        )
        for i in range(5)
    ]
    spool = FileSpool(tmp_path)
    for name, given in zip("abcde", uploads, strict=True):
        spool.put(KEY, name, given)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    spooled = [kept for name in spool.names(KEY) if isinstance(kept := spool.get(KEY, name), Upload)]
    assert len(spooled) == 5
    for name in AGGREGATORS:
        rule = aggregator(name, trim=0.25, norm_bound=2.0)
        combined, _ = combine(spooled, [1.0] * 5, rule, num_trainable=40)
        expected, verdicts = combine(uploads, [1.0] * 5, rule, num_trainable=40)
        assert torch.equal(combined.delta, expected.delta)
        assert torch.equal(combined.auxiliary["c"], expected.auxiliary["c"])
        assert any(verdict.factors for verdict in verdicts)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def multiplied(factor: float) -> Tamper:
    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        if not isinstance(honest, Upload):
            return honest
        auxiliary = {name: vector * factor for name, vector in honest.auxiliary.items()}
        return replace(
            honest, vectors={**honest.vectors, "delta": honest.delta * factor, **auxiliary_vectors(auxiliary)}
        )

    return tamper


def attacked(rule: Aggregator = MEAN, *attackers: str, **values: Any) -> World:
    world = World(names=EIGHT, num_rounds=4, module=with_batch_norm, plan={"aggregator": rule}, **values)
    world.tampers.update(dict.fromkeys(attackers, multiplied(-10.0)))
    world.run()
    return world


@pytest.fixture(scope="module")
def clean() -> World:
    return attacked()


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "multi-krum"])
@pytest.mark.parametrize("norm_bound", [None, 1.0])
def test_two_of_eight_that_scale_by_minus_ten_ruin_the_mean_and_not_a_robust_rule(
    clean: World, name: str, norm_bound: float | None
) -> None:
    moved = clean.final.norm()
    ruined = (attacked(MEAN, "a", "b").final - clean.final).norm()
    held = (attacked(aggregator(name, trim=0.25, norm_bound=norm_bound), "a", "b").final - clean.final).norm()
    assert ruined > moved, "further from the clean model than that is from zero"
    assert held < ruined / 10


def test_a_norm_bound_makes_an_attack_as_small_as_any_other_upload() -> None:
    world = attacked(aggregator("mean", trim=0.25, norm_bound=0.05), "a")
    (record, *_) = world.finished
    reasons = {member.client: member.reason for member in record.clients}
    assert re.match(r"norm bounded: trainable from [1-9]\S* to 0.05, statistics from", reasons["a"])
    assert {member.status for member in record.clients} == {ClientStatus.COUNTED}
    layout = world.trainer("a").bound_model.params.layout
    first, second = (state.model.published[: layout.num_trainable] for state in world.checkpoints.states[:2])
    assert (second - first).norm() <= 0.05 * 1.0001


def test_whom_multi_krum_leaves_out_is_refused_with_the_reason_and_not_asked_for_its_accuracy() -> None:
    world = attacked(aggregator("multi-krum", trim=0.25, norm_bound=None), "c", "f")
    for record in world.finished:
        members = {member.client: member for member in record.clients}
        assert [name for name in EIGHT if members[name].status is ClientStatus.REFUSED] == ["c", "f"]
        assert "left out by multi-krum" in members["c"].reason
        assert members["a"].reason == ""
        assert members["c"].accuracy is None
    asked = [m for m in world.transport.broadcasts("line-to-c") if m.purpose is Purpose.EVALUATE]
    assert asked == []


def test_an_upload_that_was_left_out_leaves_no_trace_in_client_state() -> None:
    """c is the mean of the c_i that clients hold, those of clients whose uploads were left out included."""
    world = World(
        names=EIGHT, num_rounds=4, algorithm=Scaffold(server_lr=1.0, option="2"),
        plan={"aggregator": aggregator("multi-krum", trim=0.25, norm_bound=None)},
    )  # fmt: skip
    world.run()
    left_out = [
        {member.client for member in record.clients if member.status is ClientStatus.REFUSED}
        for record in world.finished
    ]
    assert all(len(clients) == 2 for clients in left_out)
    assert (left_out[0] | left_out[1] | left_out[2]) - left_out[3], "nobody was counted after having been left out"
    assert left_out[3] - left_out[0], "nobody was left out after having been counted"
    state = world.checkpoints.states[-1]
    held = []
    for name in EIGHT:
        settled = world.states[name].commit_or_rollback(
            Broadcast(
                key=TaskKey(run_id="run-1", round=5, attempt=0), purpose=Purpose.TRAIN,
                vectors={"params": state.model.published}, client_lr=0.1, counted=state.counted.get(name),
            )
        )  # fmt: skip
        held.append(settled.algorithm.get(CONTROL_VARIATE, torch.zeros_like(state.model.optimizer[CONTROL_VARIATE])))
    torch.testing.assert_close(state.model.optimizer[CONTROL_VARIATE], torch.stack(held).mean(0), rtol=1e-5, atol=1e-6)


def test_a_round_of_too_few_for_multi_krum_is_a_round() -> None:
    rule = aggregator("multi-krum", trim=0.25, norm_bound=None)
    finals = []
    for given in (rule, aggregator("median", trim=0.25, norm_bound=None)):
        world = World(names=("a", "b", "c"), plan={"aggregator": given})
        world.run()
        finals.append(world.final)
        assert all(member.status is ClientStatus.COUNTED for record in world.finished for member in record.clients)
    assert torch.equal(*finals)


def test_a_bound_that_binds_nothing_changes_not_one_bit_of_the_mean(clean: World) -> None:
    far = Aggregator(screens=(lambda parts: NormBound(1e9)({TRAINABLE: parts[TRAINABLE]}),))
    assert torch.equal(attacked(far).final, clean.final)
