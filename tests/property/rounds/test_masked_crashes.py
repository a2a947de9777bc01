"""Masked rounds in which processes are killed anywhere: completed or redone, with the same bits, and never opened twice
differently.

The server's steps are those of `test_crashes`. A client is killed between any two messages: it comes back without the
keys of the round, which it had in memory only.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedshelf.compression.modular import Modular
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.compression.unit_ball import UnitBall
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientRefused, ClientStatus, RoundVoid, RunStatus
from fedshelf.core.messages import (
    DELTA,
    Broadcast,
    Failure,
    MaskingReply,
    MaskingRequest,
    Purpose,
    ServerMessage,
    Upload,
)
from fedshelf.core.rng import Rng
from fedshelf.core.stages import Stage
from fedshelf.privacy.client_dp import ClippedAtClient, NoiseAt, NoisyMean
from fedshelf.privacy.clipping import ADAPTIVE, ClipNorm
from fedshelf.privacy.distributed_dp import NoiseShares
from fedshelf.privacy.secure_aggregation.settings import Mask
from fedshelf.rounds import round_steps
from fedshelf.rounds.pipeline import UploadPipeline
from tests.fakes import Answer
from tests.property.rounds.test_crashes import Killed, Switch, fragile
from tests.worlds import Remembering, World, with_batch_norm

NAMES = ("a", "b", "c", "d")


def world_of(
    *, masked: bool = True, threshold: int | None = 3, plan: Mapping[str, Any] | None = None, **values: Any
) -> World:  # fmt: skip
    encode = EncodeSummand(
        codec=Modular(32), vectors=lambda layout: {DELTA: (layout.num_shared, torch.float32)}, max_weight=1000.0,
        weight=lambda upload: float(upload.weight), rng=Rng(5),
        unit_ball=UnitBall(has_within=values["clip"].clip_norm == ADAPTIVE) if "clip" in values else None,
    )  # fmt: skip
    stages: tuple[Stage, ...] = (encode, Mask(is_on=True)) if masked else (encode,)
    given: dict[str, Any] = {"names": NAMES, "num_rounds": 3, "algorithm": Remembering(), "module": with_batch_norm}
    whole = {"uploads": UploadPipeline(stages=stages), "threshold": threshold, **(plan or {})}
    return World(**{**given, **values}, plan=whole)


@pytest.fixture(scope="module")
def plain() -> World:
    world = world_of(masked=False)
    world.run()
    return world


def assert_opened_once(world: World) -> None:
    """All sums of one round's uploads that any client has helped to open are over the same stores, and those of its
    evaluations, too."""
    opened = defaultdict(set)
    for record in world.opened_sums.values():
        for one in record.found:
            opened[one.key.round, one.is_evaluation].add(one.members)
    assert {len(sets) for sets in opened.values()} == {1}
    assert all(len(members) >= 3 for sets in opened.values() for members in sets)


def test_without_kills_the_model_is_that_of_plain_sums(plain: World) -> None:
    world = world_of()
    assert world.run() is RunStatus.FINISHED
    assert torch.equal(world.final, plain.final)
    assert [record.train_loss for record in world.finished] == [record.train_loss for record in plain.finished]
    assert world.sink.of(RoundVoid) == []
    assert world.sink.of(ClientRefused) == []  # also not the last one of four to open a sum that three can open
    assert_opened_once(world)


def lives(world: World, switch: Switch, kill_after: int, *, restart_clients: bool) -> RunStatus:
    world.connect_all()
    switch.kill_at = switch.step + kill_after
    try:
        return world.server().run()
    except Killed:
        for name in world.names if restart_clients else ():
            world.restart_client(name)
        world.restart()
    switch.kill_at = None
    return world.server().run()


@pytest.mark.parametrize("restart_clients", [False, True])
def test_a_server_killed_at_any_step_ends_with_the_same_model(plain: World, restart_clients: bool) -> None:
    world = world_of()
    switch = fragile(world)
    world.run()
    steps = switch.step
    assert steps > 60
    for kill_after in range(1, steps + 1, 1 if restart_clients else 2):
        world = world_of()
        switch = fragile(world)
        assert lives(world, switch, kill_after, restart_clients=restart_clients) is RunStatus.FINISHED, kill_after
        assert torch.equal(world.final, plain.final), kill_after
        assert_opened_once(world)


def test_a_threshold_of_half_of_the_stores_ends_the_run_at_once() -> None:
    world = world_of(names=tuple("abcdef"), threshold=3)
    with pytest.raises(RunError, match=r"not more than half of the cohort of round 1 \(6 stores\), .*: use 4 or more"):
        world.run()
    assert world.sink.of(RoundVoid) == []


class Restarting:
    """Restarts a client before its message number `at`."""

    def __init__(self, world: World, name: str, at: int) -> None:
        self.world, self.name, self.at, self.seen = world, name, at, 0
        handle = world._handle

        def restarting(name: str, message: ServerMessage) -> Any:
            if name == self.name and isinstance(message, Broadcast | MaskingRequest):
                self.seen += 1
                if self.seen == self.at:
                    world.restart_client(name)
            return handle(name, message)

        world._handle = restarting  # type: ignore[method-assign]


@pytest.mark.parametrize("at", range(1, 21))
def test_a_client_killed_between_any_two_messages_is_left_out_or_the_round_is_redone(at: int) -> None:
    world = world_of()
    Restarting(world, "b", at)
    assert world.run() is RunStatus.FINISHED
    assert_opened_once(world)
    for record in world.finished:
        counted = [member.client for member in record.clients if member.status is ClientStatus.COUNTED]
        assert len(counted) >= 3
        assert {"a", "c", "d"} <= set(counted)


@pytest.mark.parametrize("stage", ["keys", "shares", "survivors", "unmasking"])
def test_two_of_four_that_are_gone_in_any_stage_void_the_round_and_nothing_is_opened(stage: str) -> None:
    world = world_of(num_rounds=1)
    gone = {"left": 2}

    def silent(message: ServerMessage, answer: Answer) -> Answer:
        if isinstance(message, MaskingRequest) and message.stage.value == stage and gone["left"]:
            gone["left"] -= 1
            return Failure(key=message.key, reason="out of memory")
        return answer

    world.tampers = {"a": silent, "b": silent}
    assert world.run() is RunStatus.FINISHED
    [void] = world.sink.of(RoundVoid)
    assert any(part in void.reason for part in ("threshold is 3", "too few stores have revealed", "the round has 2"))
    # The stores that had revealed their shares open no other set later.
    assert_opened_once(world)


def test_an_answer_in_another_stores_name_or_of_another_stage_is_refused() -> None:
    world = world_of(num_rounds=1)
    kept: dict[str, Answer] = {}

    def keep(message: ServerMessage, answer: Answer) -> Answer:
        if isinstance(answer, MaskingReply):
            kept[answer.stage.value] = answer
        return answer

    def copy(message: ServerMessage, answer: Answer) -> Answer:
        return kept["keys"] if isinstance(message, MaskingRequest) else answer

    world.tampers = {"a": keep, "b": copy}
    assert world.run() is RunStatus.FINISHED
    [record] = world.finished
    [left_out] = [member for member in record.clients if member.status is not ClientStatus.COUNTED]
    assert left_out.client == "b"
    assert "in another store's name" in left_out.reason


def test_a_client_sends_no_upload_without_masks_whatever_the_server_asks() -> None:
    world = world_of(num_rounds=1)
    sent: list[Answer] = []

    def without(message: ServerMessage, answer: Answer) -> Answer:
        sent.append(answer)
        return answer

    world.tampers["a"] = without
    world.run()
    [task] = [answer.key for answer in sent if isinstance(answer, Upload)]
    params = world.checkpoints.states[-1].model.published
    broadcast = Broadcast(key=task, purpose=Purpose.TRAIN, client_lr=0.1, vectors={"params": params})
    answer = world._handle("a", broadcast)
    assert isinstance(answer, Failure)
    assert "masked, and the task comes without the shares" in answer.reason


def noisy_world(noise_at: NoiseAt, clip_norm: ClipNorm = 0.1, **values: Any) -> World:
    """Uploads are clipped to 0.1 by the clients, which add shares of the noise if it is theirs."""
    mean = NoisyMean(noise_multiplier=0.5, clip_norm=0.1, noise_at=noise_at, is_adaptive=clip_norm == ADAPTIVE)
    return world_of(
        clip=ClippedAtClient(clip_norm=clip_norm, noise_at=noise_at), plan={"noisy_mean": mean}, num_rounds=2,
        shares=NoiseShares(mean) if noise_at == "stores" else None, **values,
    )  # fmt: skip


def test_a_server_killed_at_any_step_adds_the_same_noise_to_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one key for all attempts: another sum, or other noise on it, would make another model."""
    monkeypatch.setattr(round_steps, "new_key", lambda: bytes(32))
    expected, models = noisy_world("server"), []
    switch = fragile(expected)
    expected.run()
    for kill_after in range(1, switch.step + 1, 4):
        world = noisy_world("server")
        switch_of = fragile(world)
        assert lives(world, switch_of, kill_after, restart_clients=False) is RunStatus.FINISHED, kill_after
        assert torch.equal(world.final, expected.final), kill_after
        models.append(world.final)
    assert len(models) > 8
    monkeypatch.setattr(round_steps, "new_key", lambda: bytes(31) + b"1")
    other = noisy_world("server")
    other.run()
    assert not torch.equal(other.final, expected.final)


def test_a_client_that_is_asked_twice_gives_the_same_noise_and_for_another_attempt_other_noise() -> None:
    sent: dict[int, Upload] = {}
    tasks: dict[int, Broadcast] = {}

    def keep(message: ServerMessage, answer: Answer) -> Answer:
        if isinstance(answer, Upload) and isinstance(message, Broadcast):
            again = world._handle("a", message)
            assert isinstance(again, Upload)
            assert again.vectors == answer.vectors
            sent[message.key.round], tasks[message.key.round] = answer, message
        return answer

    world = noisy_world("stores", tampers={"a": keep})
    assert world.run() is RunStatus.FINISHED
    assert len(sent) == 2
    world.restart_client("a")
    answer = world._handle("a", tasks[2])
    assert isinstance(answer, Failure), "its keys are gone, so there is no second upload with other noise"


def test_a_client_masks_no_upload_that_is_scaled_by_another_norm_than_those_of_the_others() -> None:
    world = noisy_world("server", ADAPTIVE)
    handle = world._handle

    def other_norm(name: str, message: ServerMessage) -> Any:
        if name == "a" and isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN:
            message = replace(message, clip_norm=0.2)
        return handle(name, message)

    world._handle = other_norm  # type: ignore[method-assign]
    assert world.run() is RunStatus.FINISHED
    for record in world.finished:
        [left_out] = [member for member in record.clients if member.status is not ClientStatus.COUNTED]
        assert left_out.client == "a"
        assert "not the one that this round's keys were made for" in left_out.reason
