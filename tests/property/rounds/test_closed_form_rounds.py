"""Rounds that compute the output layer in closed form, before and after those of another algorithm."""

from typing import Any

import pytest
import torch

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.ridge import Ridge
from fedshelf.algorithms.scaffold import Scaffold
from fedshelf.training.trainer import Score
from tests.paper.test_ridge_paper import all_photos, module, split, taken
from tests.property.rounds.test_crashes import fragile, run_with_kills
from tests.worlds import World

DEALT = {name: own for name, own in split(all_photos(90), "iid").items() if name in "abc"}


def world(algorithm: Algorithm | None = None, *, num_rounds: int = 2, **plan: Any) -> World:
    data = {name: (taken(own, range(2, len(own))), taken(own, range(2))) for name, own in DEALT.items()}
    return World(
        names=tuple(DEALT), withholding=tuple(DEALT), module=module, algorithm=algorithm or FedAvg(), data=data,
        num_rounds=num_rounds, plan={"closed_form": Ridge(), **plan},
    )  # fmt: skip


def rounds(made: World) -> list[int]:
    return [record.round for record in made.finished]


def test_round_0_gives_the_head_that_the_algorithm_of_the_closed_form_alone_gives() -> None:
    warm, alone = world(warm_start=True, num_rounds=1), world(Ridge(), num_rounds=1)
    warm.run()
    alone.run()
    assert rounds(warm) == [0, 1]
    first, second = warm.checkpoints.states[-2:]
    assert torch.equal(first.model.params, alone.final)
    assert not first.model.optimizer, "the next algorithm begins without a state"
    assert not torch.equal(second.model.params, first.model.params)
    assert not warm.checkpoints.states[-1].photos, "nothing of it remains to be taken out later"


def test_after_the_last_round_the_head_is_that_of_what_the_model_has_become() -> None:
    plain, refitted = world(), world(refit_head=True)
    plain.run()
    refitted.run()
    assert rounds(refitted) == [1, 2, 3]
    assert torch.equal(refitted.checkpoints.states[-2].model.params, plain.final)
    assert refitted.checkpoints.states[-1].refits == (3,)
    expected = world(Ridge(), num_rounds=1)
    expected.run()  # the layers before the head are frozen in neither, and have no values in this model
    torch.testing.assert_close(refitted.final, expected.final)
    assert refitted.published[-1][0] == 3


def test_all_clients_send_their_sums_whatever_the_fraction_that_the_rounds_between_ask() -> None:
    made = world(warm_start=True, refit_head=True, fraction=0.3)
    made.run()
    assert [len(record.clients) for record in made.finished] == [3, 1, 1, 3]


def test_the_refitted_model_is_tested_whatever_the_rounds_between_tests() -> None:
    made = world(warm_start=True, refit_head=True, num_rounds=3, test_every=2)
    made.score = lambda params: Score(num_examples=4, num_correct=int(params.isfinite().all()), loss_sum=1.0)
    made.run()
    tested = [record.round for record in made.finished if record.central_accuracy is not None]
    assert tested == [0, 2, 3, 4]


def test_the_algorithm_keeps_its_own_memory_over_a_round_in_closed_form() -> None:
    plain, refitted = world(Scaffold()), world(Scaffold(), refit_head=True)
    plain.run()
    refitted.run()
    before, after = plain.checkpoints.states[-1].model.optimizer, refitted.checkpoints.states[-1].model.optimizer
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_is_not_refitted_again() -> None:
    made = world(refit_head=True)
    made.run()
    made.restart()
    made.connect_all()
    made.server().run()
    assert rounds(made) == [1, 2, 3]


def test_an_extended_run_trains_on_at_the_rate_of_its_rounds_and_is_refitted_again() -> None:
    rates: set[int] = set()

    def client_lr(number: int) -> float:
        rates.add(number)
        return 0.1

    made = world(refit_head=True, client_lr=client_lr)
    made.run()
    made.restart()
    made.connect_all()
    made.num_rounds = 4
    made.server().run()
    assert rounds(made) == [1, 2, 3, 4, 5, 6]
    assert made.checkpoints.states[-1].refits == (3, 6)
    assert rates >= {1, 2, 3, 4}
    made.restart()
    made.connect_all()
    made.server().run()
    assert rounds(made) == [1, 2, 3, 4, 5, 6], "it is finished"


@pytest.mark.parametrize("restart_clients", [False, True])
@pytest.mark.parametrize("algorithm", [FedAvg(), Scaffold()], ids=["fedavg", "scaffold"])
def test_a_server_killed_at_any_step_ends_with_the_same_model(algorithm: Algorithm, restart_clients: bool) -> None:
    settings = {"warm_start": True, "refit_head": True, "average_rounds": 2}
    whole = world(algorithm, **settings)
    switch = fragile(whole)
    whole.run()
    assert switch.step > 60
    for kill_after in range(1, switch.step, 4):
        parts = world(algorithm, **settings)
        run_with_kills(parts, fragile(parts), [kill_after], restart_clients=restart_clients)
        assert torch.equal(parts.final, whole.final), kill_after
        assert sorted(set(rounds(parts))) == [0, 1, 2, 3]
