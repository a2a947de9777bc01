"""FedBuff with encrypted uploads: the model of plain sums, processes that are killed, and no upload in two sums."""

from typing import Any

import pytest
import torch

from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.compression.modular import Modular
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.core.events import ClientStatus, RoundVoid, RunStatus
from fedshelf.core.messages import DELTA
from fedshelf.core.rng import Rng
from fedshelf.privacy.homomorphic.settings import ANY, Encryption
from fedshelf.rounds.pipeline import UploadPipeline
from tests.property.rounds.test_crashes import fragile
from tests.property.rounds.test_encrypted_crashes import Dying
from tests.property.rounds.test_masked_crashes import NAMES, lives
from tests.worlds import World, with_batch_norm

DELAYS = {"a": 1.0, "b": 1.4, "c": 2.1, "d": 3.3}


def world_of(*, encrypted: bool = True, decryptor: str | None = ANY, size: int = 3, **values: Any) -> World:
    encode = EncodeSummand(
        codec=Modular(32, 0.0, 64), vectors=lambda layout: {DELTA: (layout.num_shared, torch.float32)},
        max_weight=1.0, weight=lambda upload: 1.0, rng=Rng(5),
    )  # fmt: skip
    encryption = Encryption(is_on=True, decryptor=decryptor)
    pipeline = UploadPipeline(stages=(encode, encryption) if encrypted else (encode,))
    given: dict[str, Any] = {"names": NAMES, "num_rounds": 5, "module": with_batch_norm, "delays": dict(DELAYS)}
    plan = {"uploads": pipeline, "encryption": encryption, "evaluates": False}
    return World(**{**given, **values}, algorithm=FedBuff(buffer_size=size), plan=plan)


def staleness(world: World) -> list[int | None]:
    return [member.staleness for record in world.finished for member in record.clients]


def assert_each_upload_is_in_one_sum(world: World) -> None:
    for record in world.opened_sums.values():
        pairs = [pair for one in record.found for pair in one.members]
        assert len(pairs) == len(set(pairs))


def test_the_model_is_that_of_plain_weighted_sums() -> None:
    same = dict.fromkeys(NAMES, 1.0)  # so that the store that decrypts is never waited for
    world, plain = world_of(delays=same, decryptor="c"), world_of(delays=same, encrypted=False)
    assert world.run() is plain.run() is RunStatus.FINISHED
    assert torch.equal(world.final, plain.final)
    assert [record.train_loss for record in world.finished] == [record.train_loss for record in plain.finished]
    assert staleness(world) == staleness(plain)
    assert {name for name, record in world.opened_sums.items() if record.found} == {"c"}
    assert_each_upload_is_in_one_sum(world)


def test_versions_of_fresh_uploads_are_those_of_fedbuff_but_for_the_rounding_of_codes() -> None:
    same = dict.fromkeys(NAMES, 1.0)
    summed, single = world_of(encrypted=False, delays=same, size=4), world_of(encrypted=False, delays=same, size=4)
    single.plan = {}
    single.clients = {name: single.client(name) for name in NAMES}
    for world in (summed, single):
        assert world.run() is RunStatus.FINISHED
        assert set(staleness(world)) == {0}
    moved = float((single.final - single.checkpoints.states[0].model.published).abs().max())
    assert moved > 0.01
    torch.testing.assert_close(summed.final, single.final, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decryptor", [None, ANY])
def test_uploads_that_arrive_while_the_server_waits_for_the_decryptor_count_in_the_next_version(
    decryptor: str | None,
) -> None:
    world = world_of(decryptor=decryptor, delays={**DELAYS, "a": 5.0})
    assert world.run() is RunStatus.FINISHED
    assert world.sink.of(RoundVoid) == []
    assert all(
        member.status is ClientStatus.COUNTED for record in world.finished for member in record.clients
    )  # fmt: skip
    assert {1} & set(staleness(world))
    assert_each_upload_is_in_one_sum(world)


def test_a_server_killed_at_any_step_finishes_the_run() -> None:
    world = world_of(decryptor=None, num_rounds=3)
    switch = fragile(world)
    world.run()
    steps = switch.step
    for kill_after in range(1, steps + 1, 13):
        world = world_of(decryptor=None, num_rounds=3)
        switch = fragile(world)
        assert lives(world, switch, kill_after, restart_clients=False) is RunStatus.FINISHED, kill_after
        assert_each_upload_is_in_one_sum(world)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 7])
def test_a_store_killed_at_any_message_gets_keys_again(name: str, at: int) -> None:
    world = world_of(decryptor=None)
    Dying(world, name, at)
    assert world.run() is RunStatus.FINISHED
    assert_each_upload_is_in_one_sum(world)
