"""Encrypted rounds in which processes are killed anywhere: completed or redone, with the same bits, and no two sums
decrypted that differ by few stores.

The server's steps are those of `test_crashes`. A client is killed between any two messages: it comes back without keys,
and the store that generates them makes new ones.
"""

from collections import defaultdict
from typing import Any

import pytest
import torch

from fedshelf.compression.modular import Modular
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientStatus, RoundVoid, RunStatus
from fedshelf.core.messages import DELTA, EncryptionReply, EncryptionRequest, Failure, ServerMessage, Setup, Upload
from fedshelf.core.rng import Rng
from fedshelf.privacy.homomorphic.settings import ANY, Encryption
from fedshelf.rounds.pipeline import UploadPipeline
from tests.fakes import Answer, Gone
from tests.property.rounds.test_crashes import fragile
from tests.property.rounds.test_masked_crashes import NAMES, lives
from tests.worlds import Remembering, World, with_batch_norm


def world_of(*, encrypted: bool = True, decryptor: str | None = None, **values: Any) -> World:
    encode = EncodeSummand(
        codec=Modular(32), vectors=lambda layout: {DELTA: (layout.num_shared, torch.float32)}, max_weight=1000.0,
        weight=lambda upload: float(upload.weight), rng=Rng(5),
    )  # fmt: skip
    encryption = Encryption(is_on=True, decryptor=decryptor)
    pipeline = UploadPipeline(stages=(encode, encryption) if encrypted else (encode,))
    given: dict[str, Any] = {"names": NAMES, "num_rounds": 3, "algorithm": Remembering(), "module": with_batch_norm}
    return World(**{**given, **values}, plan={"uploads": pipeline, "encryption": encryption, "evaluates": False})


@pytest.fixture(scope="module")
def plain() -> World:
    world = world_of(encrypted=False)
    world.run()
    return world


def assert_no_two_sums_differ_by_few(world: World) -> None:
    """No store has decrypted two different sums of a round that differ by fewer than three stores."""
    for record in world.opened_sums.values():
        by_round = defaultdict(set)
        for one in record.found:
            by_round[one.key.round].add(one.members)
        assert all(len(members) >= 3 for sets in by_round.values() for members in sets)
        assert all(len(one ^ other) in (0, 3, 4) for sets in by_round.values() for one in sets for other in sets)


@pytest.mark.parametrize("decryptor", [None, "c", ANY])
def test_without_kills_the_model_is_that_of_plain_sums(plain: World, decryptor: str | None) -> None:
    world = world_of(decryptor=decryptor)
    assert world.run() is RunStatus.FINISHED
    assert torch.equal(world.final, plain.final)
    assert [record.train_loss for record in world.finished] == [record.train_loss for record in plain.finished]
    assert world.sink.of(RoundVoid) == []
    holder = "a" if decryptor in (None, ANY) else decryptor
    assert {name for name, record in world.opened_sums.items() if record.found} == {holder}


@pytest.mark.parametrize("restart_clients", [False, True])
def test_a_server_killed_at_any_step_ends_with_the_same_model(plain: World, restart_clients: bool) -> None:
    world = world_of()
    switch = fragile(world)
    world.run()
    steps = switch.step
    assert steps > 60
    for kill_after in range(1, steps + 1, 7):
        world = world_of()
        switch = fragile(world)
        assert lives(world, switch, kill_after, restart_clients=restart_clients) is RunStatus.FINISHED, kill_after
        assert torch.equal(world.final, plain.final), kill_after
        assert_no_two_sums_differ_by_few(world)


class Dying:
    """Kills a client at its message number `at`, before it answers; it connects again a moment later."""

    def __init__(self, world: World, name: str, at: int) -> None:
        seen, handle = 0, world._handle

        def dying(client: str, message: ServerMessage) -> Any:
            nonlocal seen
            seen += client == name and not isinstance(message, Setup)
            if client != name or isinstance(message, Setup) or seen != at:
                return handle(client, message)
            world.restart_client(name)
            world.transport.connect(world.peer(name, address=f"second line to {name}"), delay=0.2)
            return Gone()

        world._handle = dying  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("at", range(1, 10))
def test_a_store_killed_at_any_message_gets_keys_again(plain: World, name: str, at: int) -> None:
    world = world_of(rounds={"quorum": 4})  # so that no round does without it
    Dying(world, name, at)
    assert world.run() is RunStatus.FINISHED
    assert torch.equal(world.final, plain.final)
    assert_no_two_sums_differ_by_few(world)


def test_if_every_store_may_decrypt_the_sum_of_a_holder_that_refuses_is_decrypted_by_another(plain: World) -> None:
    world = world_of(decryptor=ANY)

    def refuses(message: ServerMessage, answer: Answer) -> Answer:
        is_asked = isinstance(message, EncryptionRequest) and message.stage.value == "decryption"
        return Failure(key=message.key, reason="out of memory") if is_asked and message.key else answer  # type: ignore[union-attr]

    world.tampers["a"] = refuses
    assert world.run() is RunStatus.FINISHED
    assert torch.equal(world.final, plain.final)
    assert len(world.opened_sums["b"].found) == 3


def test_a_store_that_joins_later_gets_the_same_keys() -> None:
    world = world_of(num_rounds=2)
    world.plan = {**world.plan, "start_clients": 3}
    world.delays = dict.fromkeys("abc", 1.0)
    for name in NAMES:
        world.transport.connect(world.peer(name), delay=4.5 if name == "d" else 0.0)
    assert world.server().run() is RunStatus.FINISHED
    counted = [
        {member.client for member in record.clients if member.status is ClientStatus.COUNTED}
        for record in world.finished
    ]
    assert counted == [{"a", "b", "c"}, set(NAMES)]


def test_a_store_accepts_no_other_decryptor_than_the_first_even_after_a_restart() -> None:
    world = world_of(num_rounds=2)
    world.run()
    assert {record["run-1"] for record in world.decryptors.values()} == {"a"}
    for name in world.names:
        world.restart_client(name)
    world.plan = {**world.plan, "encryption": Encryption(is_on=True, decryptor="b"), "num_rounds": 3}
    world.checkpoints.open_round = None
    world.restart()
    with pytest.raises(RunError, match="with another holder than this run's"):
        world.server().run()
    assert not world.opened_sums["b"].found


def test_an_upload_that_is_no_proper_ciphertext_voids_the_round() -> None:
    world = world_of(num_rounds=1)

    def alters(message: ServerMessage, answer: Answer) -> Answer:
        if isinstance(answer, Upload) and answer.key.attempt == 0:
            answer.vectors["summand"].parts["ciphertexts"][:1000] ^= 1  # type: ignore[union-attr]
        return answer

    world.tampers["b"] = alters
    assert world.run() is RunStatus.FINISHED
    [void] = world.sink.of(RoundVoid)
    assert "an upload in it is not a proper ciphertext" in void.reason


def test_a_store_that_answers_in_anothers_name_is_left_out() -> None:
    world = world_of(num_rounds=1)
    kept: dict[str, Answer] = {}

    def keep(message: ServerMessage, answer: Answer) -> Answer:
        if isinstance(answer, EncryptionReply):
            kept[answer.stage.value] = answer
        return answer

    def copy(message: ServerMessage, answer: Answer) -> Answer:
        is_asked = isinstance(message, EncryptionRequest) and message.stage.value == "request"
        return kept["request"] if is_asked else answer

    world.tampers = {"b": keep, "c": copy}
    assert world.run() is RunStatus.FINISHED
    [record] = world.finished
    [left_out] = [member for member in record.clients if member.status is not ClientStatus.COUNTED]
    assert (left_out.client, "in another store's name" in left_out.reason) == ("c", True)
