"""After the last round, the server knows how the model does on each product; a hostile claim costs one client."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedshelf.algorithms.fedasync import FedAsync
from fedshelf.core.events import ClientRefused, ProductReport
from fedshelf.core.messages import Broadcast, Evaluation, ProductCount, ServerMessage
from fedshelf.scheduling.early_stopping import EarlyStopping
from fedshelf.training.trainer import evaluate
from tests.fakes import Answer
from tests.worlds import World

FOUR = ("a", "b", "c", "d")


def report_of(world: World) -> ProductReport:
    """The report of the only round that has one, the last."""
    assert [record.report is None for record in world.finished[:-1]] == [True] * (len(world.finished) - 1)
    found = world.finished[-1].report
    assert found is not None
    return found


def expected(world: World, names: tuple[str, ...]) -> tuple[ProductCount, ...]:
    """The counts of the final model, from the photos themselves."""
    correct: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for name in names:
        trainer = world.trainer(name)
        trainer.bound_model.load(world.final)
        for (label, prediction), count in evaluate(trainer.bound_model, trainer.validation).confusion.items():
            total[label] += count
            correct[label] += count * (label == prediction)
    return tuple(ProductCount(index=k, correct=correct[k], total=total[k]) for k in sorted(total))


def asked(world: World) -> list[tuple[str, int, bool]]:
    """Watch the evaluations: who, of which round, and whether by product."""
    seen: list[tuple[str, int, bool]] = []

    def watch(name: str) -> Any:
        def tamper(message: ServerMessage, honest: Answer) -> Answer:
            if isinstance(message, Broadcast) and isinstance(honest, Evaluation):
                seen.append((name, message.key.round, message.per_product))
                assert bool(honest.products) == message.per_product
            return honest

        return tamper

    world.tampers = {name: watch(name) for name in world.names}
    return seen


def test_the_last_rounds_evaluation_counts_by_product_without_another_message() -> None:
    world = World(names=FOUR, num_rounds=3)
    seen = asked(world)
    world.run()
    assert sorted(seen) == [(name, number, number == 3) for name in FOUR for number in (1, 2, 3)]
    report = report_of(world)
    assert report.products == expected(world, FOUR)
    assert (report.num_photos, report.num_stores, report.num_withheld) == (16, 4, 0)
    assert report.levels == (sum(product.correct for product in report.products),)
    assert world.finished[-1].accuracy == report.levels[0] / 16


def test_stores_outside_the_last_cohort_are_asked_once_all_rounds_are_done() -> None:
    world = World(names=FOUR, num_rounds=2, plan={"fraction": 0.5})
    seen = asked(world)
    world.run()
    assert sorted(name for name, number, by_product in seen if by_product) == list(FOUR)
    assert report_of(world).products == expected(world, FOUR)
    assert len(world.finished[-1].clients) == 2


def test_in_asynchronous_rounds_all_stores_evaluate_the_last_version() -> None:
    world = World(names=FOUR, num_rounds=3, algorithm=FedAsync(), delays={"d": 30.0})
    world.run()
    assert report_of(world).products == expected(world, FOUR)
    assert not world.sink.of(ClientRefused)


def test_a_run_that_ends_early_has_its_report() -> None:
    world = World(names=FOUR, num_rounds=50, plan={"early_stopping": EarlyStopping(patience=2)})
    seen = asked(world)
    world.run()
    last = world.finished[-1].round
    assert last < 50
    assert report_of(world).products == expected(world, FOUR)
    assert {number for _, number, by_product in seen if by_product} >= {last}
    assert sorted(name for name, number, _ in seen if number == last) == list(FOUR), "asked once"


def test_a_server_that_stopped_in_the_last_round_reports_the_same_when_it_resumes() -> None:
    whole = World(names=FOUR, num_rounds=2, plan={"fraction": 0.5})
    whole.run()
    world = World(names=FOUR, num_rounds=2, plan={"fraction": 0.5})
    left = [name for name in FOUR if name not in {member.client for member in whole.finished[-1].clients}]

    def stop(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.per_product:
            world.stop.set()
        return honest

    world.tampers = dict.fromkeys(left, stop)
    world.run()
    assert len(world.finished) == 1
    world.stop.clear()
    world.tampers = {}
    world.restart()
    world.server().run()
    assert torch.equal(world.final, whole.final)
    assert report_of(world) == report_of(whole)


def test_a_store_may_withhold_its_counts() -> None:
    world = World(names=FOUR, num_rounds=1, withholding=("c",))
    world.run()
    report = report_of(world)
    assert (report.num_stores, report.num_withheld, report.num_photos) == (3, 1, 12)
    assert report.products == expected(world, ("a", "b", "d"))
    assert world.finished[0].clients[2].accuracy is not None


@pytest.mark.parametrize("way", ["fedper", "ditto"])
def test_with_personal_tensors_each_store_counts_with_its_own_model(way: str) -> None:
    world = World(names=FOUR, num_rounds=2, personalize=way, plan={"fraction": 0.5})
    world.run()
    report = report_of(world)
    assert (report.num_photos, report.levels) == (16, (sum(own_correct(world, name) for name in FOUR),))


def own_correct(world: World, name: str) -> int:
    """Correct validation photos of the store's own model, with its tensors after its newest counted upload."""
    trainer, key = world.trainer(name), world.checkpoints.states[-1].counted.get(name)
    trainer.bound_model.load(world.final)
    if key is not None:
        world.personalization.apply(trainer.bound_model, world.states[name].peek(key))
    return trainer.evaluate().num_correct


def count(index: int, correct: int, total: int) -> ProductCount:
    return ProductCount(index=index, correct=correct, total=total)


def changed(first: Callable[[ProductCount], ProductCount]) -> Callable[[Evaluation], Evaluation]:
    return lambda e: replace(e, products=(first(e.products[0]), *e.products[1:]))


HOSTILE: dict[str, tuple[Callable[[Evaluation], Evaluation], str]] = {
    "beyond the catalogue": (lambda e: replace(e, products=(*e.products, count(3, 0, 1))), "beyond the 3 products"),
    "a product twice": (lambda e: replace(e, products=(e.products[0], *e.products)), "products twice"),
    "in another order": (lambda e: replace(e, products=e.products[::-1]), "another order"),
    "more right than photos": (changed(lambda p: replace(p, correct=p.total + 1)), "right answers of"),
    "no photos": (changed(lambda p: replace(p, correct=0, total=0)), "right answers of 0"),
    "another sum of photos": (changed(lambda p: replace(p, total=p.total + 1)), "add up to"),
    "another sum of right answers": (
        lambda e: replace(e, num_correct=e.num_correct - 1 if e.num_correct else 1), "add up to",
    ),
    "no levels": (lambda e: replace(e, levels=()), "for 1 level"),
    "too many levels": (lambda e: replace(e, levels=(4, *e.levels)), "for 1 level"),
    "another level": (lambda e: replace(e, levels=(e.num_correct + 1,)), "for 1 level"),
    "levels alone": (lambda e: replace(e, products=()), "add up to 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_hostile_count_costs_one_client(kind: str, fraction: float) -> None:
    change, why = HOSTILE[kind]
    world = World(names=FOUR, num_rounds=1, plan={"fraction": fraction})

    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        return change(honest) if isinstance(honest, Evaluation) else honest

    world.tampers["c"] = tamper
    world.run()
    (refused,) = world.sink.of(ClientRefused)
    assert refused.client == "c"
    assert re.search(why, refused.reason), refused.reason
    assert report_of(world).products == expected(world, ("a", "b", "d"))


def test_counts_that_were_not_asked_for_are_refused() -> None:
    world = World(names=FOUR, num_rounds=2)

    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Evaluation) and not honest.products:
            return replace(honest, products=(count(0, honest.num_correct, honest.num_examples),), levels=(0,))
        return honest

    world.tampers["c"] = tamper
    world.run()
    (refused,) = world.sink.of(ClientRefused)
    assert "was not asked to" in refused.reason
