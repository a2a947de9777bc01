"""With noise on the sum of uploads, nothing else of the stores shapes the model, and every sum is released once."""

from dataclasses import replace

import pytest

from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientExcluded, ClientStatus, RoundVoid
from fedshelf.core.messages import Broadcast, Evaluation, Failure, Purpose, ServerMessage, Upload
from fedshelf.core.state import OpenRound
from fedshelf.privacy.client_dp import NoisyMean
from tests.fakes import Answer
from tests.worlds import Tamper, World

NOISY = {"noisy_mean": NoisyMean(noise_multiplier=0.1, clip_norm=0.1)}


def destroyed_by_its_loss(message: ServerMessage, honest: Answer) -> Answer:
    return replace(honest, loss_sum=1e30) if isinstance(honest, Evaluation) else honest


def test_losses_without_noise_do_not_decide_about_a_round() -> None:
    tampers: dict[str, Tamper] = dict.fromkeys(("a", "b", "c"), destroyed_by_its_loss)
    world = World(num_rounds=2, plan=NOISY, tampers=tampers)
    world.run()
    assert len(world.finished) == 2
    assert not world.sink.of(RoundVoid)
    with pytest.raises(RunError):
        World(num_rounds=2, tampers=tampers).run()


def test_a_destroyed_model_is_not_replaced_by_a_second_sum_without_some_uploads() -> None:
    def large(message: ServerMessage, honest: Answer) -> Answer:
        return honest.with_vectors(delta=honest.delta * 1e6) if isinstance(honest, Upload) else honest

    noisy = NoisyMean(noise_multiplier=1e9, clip_norm=0.1)
    world = World(num_rounds=1, plan={"noisy_mean": noisy}, tampers={"b": large})
    with pytest.raises(RunError, match="void"):
        world.run()
    voids = world.sink.of(RoundVoid)
    assert all({member.status for member in void.clients} == {ClientStatus.COUNTED} for void in voids)
    assert not world.sink.of(ClientExcluded)


def test_stores_do_not_learn_how_many_were_drawn() -> None:
    seen: list[int | None] = []

    def note(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN:
            seen.append(message.quorum)
        return honest

    World(num_rounds=2, plan=NOISY, tampers={"a": note}).run()
    assert set(seen) == {None}


def test_a_restarted_server_adds_up_the_uploads_that_it_has_released() -> None:
    """Stores have seen that model when they evaluate it: a later upload would make a second one of the same attempt."""
    opened: list[OpenRound | None] = []

    def fails(message: ServerMessage, honest: Answer) -> Answer:
        return Failure(key=honest.key, reason="not now") if isinstance(honest, Upload) else honest

    def note(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Evaluation):
            opened.append(world.checkpoints.open_round)
        return honest

    world = World(num_rounds=1, plan=NOISY, tampers={"a": note, "c": fails})
    world.run()
    assert [found and found.cohort for found in opened] == [("a", "b")]
    assert world.checkpoints.open_round is not None
    assert world.checkpoints.open_round.noise_key is None
