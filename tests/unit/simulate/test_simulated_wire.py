"""Simulated messages: what they would cost on the wire, and that they are let go of."""

import gc
import weakref

import torch

from fedshelf.core.messages import Broadcast, ClientMessage, Purpose, ServerMessage, TaskKey, Upload
from fedshelf.serialization import messages as payload
from fedshelf.simulate.simulated_wire import Sizes
from fedshelf.simulate.virtual import Dropout, Durations
from fedshelf.simulate.virtual_time_transport import VirtualTimeTransport


class Nobody:
    """A backend that forgets what it is given."""

    def submit(self, name: str, message: ServerMessage) -> None: ...

    def next(self) -> tuple[str, ClientMessage] | None:
        return None


def broadcast(round: int, params: torch.Tensor, counted: int | None = None) -> Broadcast:
    before = None if counted is None else TaskKey(run_id="r", round=counted, attempt=0)
    key = TaskKey(run_id="r", round=round, attempt=0)
    return Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=0.1, counted=before)


def test_a_model_is_not_kept_for_stores_that_were_sent_it_long_ago() -> None:
    transport, model = VirtualTimeTransport(Nobody(), (), Durations(), Dropout()), torch.zeros(10)
    transport.send("lyon", broadcast(1, model))
    gone = weakref.ref(model)
    del model
    transport.send("oslo", broadcast(2, torch.zeros(10)))
    gc.collect()
    assert gone() is None


def test_a_model_that_a_store_has_is_not_sent_again() -> None:
    transport, models = (
        VirtualTimeTransport(Nobody(), (), Durations(), Dropout()),
        [torch.zeros(1_000), torch.zeros(1_000)],
    )
    sent = [transport.send("lyon", broadcast(1, models[number])) for number in (0, 0, 1, 0)]
    assert [num_bytes > 4_000 for num_bytes in sent] == [True, False, True, True]
    assert transport.send("oslo", broadcast(1, models[0])) > 4_000


def test_sizes_that_are_remembered_are_those_of_each_message() -> None:
    sizes = Sizes()
    for counted in (None, 1, 123_456):
        for number, values in ((1, 10), (1, 10), (200, 10), (200, 3_000)):
            message = broadcast(number, torch.zeros(values), counted)
            assert sizes.of(message) == payload.size(message)
    for seconds in (0.25, 0.123456789):
        upload = Upload(
            key=TaskKey(run_id="r", round=1, attempt=0), vectors={"delta": torch.zeros(7)}, num_examples=5, num_steps=1,
            train_loss=0.1, seconds=seconds,
        )  # fmt: skip
        assert sizes.of(upload) == payload.size(upload)
