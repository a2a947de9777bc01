"""Who is drawn in rounds on fake ports: by what, with which weights, and anew each time."""

from dataclasses import replace
from typing import Any

import pytest

from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.core.choices import SamplingName
from fedshelf.core.errors import RunError
from fedshelf.core.events import RoundStarted
from fedshelf.core.messages import Broadcast, Purpose, Ready, ServerMessage
from fedshelf.core.rng import Rng
from fedshelf.scheduling.cohort import draw
from tests.fakes import Answer, Garbled
from tests.worlds import World

NAMES, OFTEN, SELDOM = tuple("abcdefgh"), tuple("abcdef"), tuple("gh")


def cohorts(world: World) -> list[tuple[str, ...]]:
    return [event.cohort for event in world.sink.of(RoundStarted)]


def test_a_void_round_is_tried_again_with_another_cohort() -> None:
    """The same one would fail again where the same few are broken."""

    def breaks(message: ServerMessage, honest: Answer) -> Answer:
        return Garbled() if isinstance(message, Broadcast) else honest

    world = World(names=NAMES, plan={"fraction": 0.25}, tampers=dict.fromkeys(NAMES, breaks))
    with pytest.raises(RunError, match=r"void 10 times|no client is left"):
        world.run()
    assert len(set(cohorts(world))) > 3


def test_clients_are_drawn_by_the_photos_they_came_with_and_no_claim_counts_for_more_than_the_cap() -> None:
    rounds, cap = range(1, 7), 40
    claims = {name: 10**12 if name == "a" else 5 * number + 1 for number, name in enumerate(NAMES)}

    def claims_to_have(count: int) -> Any:
        return lambda message, honest: replace(honest, num_train=count) if isinstance(honest, Ready) else honest

    world = World(
        names=NAMES, num_rounds=len(rounds), plan={"fraction": 0.25, "sampling": "size", "rng": Rng(1)},
        rounds={"max_examples": cap}, tampers={name: claims_to_have(claims[name]) for name in NAMES},
    )  # fmt: skip
    world.run()

    def draws(weights: dict[str, float] | None) -> list[tuple[str, ...]]:
        return [draw(NAMES, 2, Rng(1).fork(round=number, purpose="cohort-0"), weights) for number in rounds]

    assert cohorts(world) == draws({name: float(min(claims[name], cap)) for name in NAMES})
    assert cohorts(world) != draws(None)
    assert cohorts(world) != draws({name: float(claims[name]) for name in NAMES})


def test_clients_are_drawn_by_how_often_they_were_there() -> None:
    world = World(names=NAMES, num_rounds=1, plan={"fraction": 0.25, "sampling": "availability", "rng": Rng(3)})
    world.run()
    for last, there in ((9, OFTEN), (20, NAMES)):
        world.num_rounds, world.names = last, there
        world.restart()
        world.server().run()
    rngs = {number: Rng(3).fork(round=number, purpose="cohort-0") for number in range(11, 21)}
    expected = [  # the tenth round does not wait for who was not there in the ninth
        draw(NAMES, 2, rng, {**dict.fromkeys(OFTEN, 1.0), **dict.fromkeys(SELDOM, number / (number - 9))})
        for number, rng in rngs.items()
    ]
    assert cohorts(world)[10:] == expected
    for weights in (None, dict.fromkeys(NAMES, 1.0)):
        assert expected != [draw(NAMES, 2, rng, weights) for rng in rngs.values()], "or the test shows nothing"


def test_asynchronous_rounds_draw_anew_whenever_somebody_is_needed() -> None:
    """One is at work at a time, and six uploads make the one version."""
    world = World(
        names=NAMES, num_rounds=1, algorithm=FedBuff(server_lr=1.0, buffer_size=6), plan={"fraction": 0.125}
    )  # fmt: skip
    world.run()
    assert len({member.client for member in world.finished[0].clients}) > 3


def test_asynchronous_rounds_prefer_who_was_seldom_there() -> None:
    def first_asked(sampling: SamplingName) -> list[int]:
        """For each of those who came late, the round in which it was first asked to train."""
        world = World(
            names=NAMES, num_rounds=80, algorithm=FedBuff(server_lr=1.0, buffer_size=1),
            delays=dict.fromkeys(NAMES, 1.0),
            plan={"fraction": 0.125, "sampling": sampling, "rng": Rng(1), "start_clients": len(OFTEN)},
        )  # fmt: skip
        for name in OFTEN:
            world.transport.connect(world.peer(name))
        for name in SELDOM:
            world.transport.connect(world.peer(name), delay=100.0)  # round 50 or so
        world.server().run()
        tasks = [world.transport.broadcasts(f"line-to-{name}") for name in SELDOM]
        return [min((m.key.round for m in sent if m.purpose is Purpose.TRAIN), default=99) for sent in tasks]

    weighted = first_asked("availability")
    assert max(weighted) <= 55
    assert max(first_asked("uniform")) > max(weighted) + 3
