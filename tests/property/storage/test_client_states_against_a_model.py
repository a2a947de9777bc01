"""Two-phase commit against the simplest model: the state in force is what the counted uploads led to, in order,
whatever was lost, asked twice, or killed in between."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedshelf.core.messages import Broadcast, Purpose, TaskKey, Upload
from fedshelf.core.ports import ClientStates
from fedshelf.core.state import ClientState
from fedshelf.serialization import messages as payload
from fedshelf.storage.client_states import FileClientStates
from tests.fakes import MemoryClientStates


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_at_step(step: int | None) -> Iterator[None]:
    """Let the first `step` changes of the disk (renames, deletions) happen, then nothing any more: kill -9."""
    done = 0

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if step is not None and done >= step:
                raise Killed
            done += 1
            return change(*args, **kwargs)

        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", counting(Path.replace))
        patch.setattr(Path, "unlink", counting(Path.unlink))
        yield


@dataclass(frozen=True)
class Round:
    """What happens to one task: how often it is asked, where the client is killed each time (None: it is not), and
    what the server makes of the answer."""

    kills: tuple[int | None, ...]
    counted: bool
    void: bool


ROUNDS = st.lists(
    st.builds(
        Round,
        kills=st.lists(st.none() | st.integers(0, 4), max_size=4).map(tuple),
        counted=st.booleans(),
        void=st.booleans(),
    ),
    max_size=8,
)


def history(counted: list[TaskKey]) -> list[float]:
    """A state that tells in which order what was counted: applying one twice, or losing one, shows."""
    return [float(100 * key.round + key.attempt) for key in counted]


def answer(states: ClientStates, broadcast: Broadcast, expected: list[TaskKey]) -> bytes:
    """A client's side of a round; checks the state in force on the way."""
    before = states.commit_or_rollback(broadcast)
    values = before.algorithm["history"].tolist() if before.algorithm else []
    assert values == history(expected)
    upload = states.cached_reply(broadcast.key)
    if upload is None:
        upload = Upload(
            key=broadcast.key,
            vectors={"delta": torch.rand(5)},
            num_examples=1,
            num_steps=1,
            train_loss=0.5,
            seconds=0.1,
        )
        after = ClientState(algorithm={"history": torch.tensor([*values, *history([broadcast.key])])})
        states.stage(broadcast.key, upload, after)
    return payload.encode_header(upload, "").encode() + payload.blob_of(upload).join()


def play(rounds: list[Round], open_states: Callable[[], ClientStates]) -> None:
    counted: list[TaskKey] = []
    number, attempt = 1, 1
    for plan in rounds:
        key = TaskKey(run_id="run", round=number, attempt=attempt)
        broadcast = Broadcast(
            key=key,
            purpose=Purpose.TRAIN,
            vectors={"params": torch.zeros(1)},
            client_lr=0.1,
            counted=counted[-1] if counted else None,
        )
        sent = None
        for kill in (*plan.kills, None):
            try:
                with killed_at_step(kill):
                    bytes_ = answer(open_states(), broadcast, counted)
            except Killed:
                continue
            assert sent in (None, bytes_), "the same question got another answer"
            sent = bytes_
        if plan.void:
            attempt += 1
        else:
            number, attempt = number + 1, 1
            if plan.counted:
                counted.append(key)


@settings(max_examples=80, deadline=None)
@given(ROUNDS)
def test_the_state_in_force_is_what_the_counted_uploads_led_to(rounds: list[Round]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        play(rounds, lambda: FileClientStates(Path(folder)))


@settings(max_examples=100, deadline=None)
@given(ROUNDS)
def test_states_in_memory_follow_the_same_rules(rounds: list[Round]) -> None:
    states = MemoryClientStates()  # one for all: memory is not what survives a kill
    play(rounds, lambda: states)
