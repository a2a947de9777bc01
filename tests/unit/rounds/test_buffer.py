"""The uploads that wait for a version: none takes another one's place."""

from itertools import permutations

import pytest
import torch

from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.algorithms.reduce import MEAN
from fedshelf.core.messages import TaskKey, Upload
from fedshelf.rounds.asynchronous.buffer import UploadBuffer
from fedshelf.storage.spool import MemorySpool
from tests.worlds import bound_model

LAYOUT = bound_model().params.layout
BASE = torch.zeros(LAYOUT.num_shared)


def upload(round: int, attempt: int, value: float) -> Upload:
    key = TaskKey(run_id="r", round=round, attempt=attempt)
    return Upload(
        key=key,
        vectors={"delta": torch.full_like(BASE, value)},
        num_examples=5,
        num_steps=1,
        train_loss=value,
        seconds=0.1,
    )


def test_after_a_restart_no_upload_takes_the_place_of_one_that_was_found() -> None:
    """A client's first upload may be lost (its file damaged, the model that it began with gone) where its second is
    not."""
    spool = MemorySpool()
    spool.put(TaskKey(run_id="r", round=4, attempt=0), "a", upload(2, 0, 1.0))  # began with a model that is lost
    spool.put(TaskKey(run_id="r", round=4, attempt=1), "a", upload(4, 0, 2.0))
    buffer = UploadBuffer(spool=spool, layout=LAYOUT, run_id="r")
    buffer.open(4, lambda version: None if version == 1 else BASE)
    assert [(record.client, record.number, record.train_loss) for record in buffer.records()] == [("a", 1, 2.0)]
    assert buffer.num_answered("a", 4) == 1
    assert dict(buffer.newest()) == {"a": TaskKey(run_id="r", round=4, attempt=0)}

    buffer.add("a", upload(4, 1, 6.0), BASE)
    assert [(record.number, record.train_loss) for record in buffer.records()] == [(1, 2.0), (2, 6.0)]
    assert dict(buffer.newest()) == {"a": TaskKey(run_id="r", round=4, attempt=1)}
    aggregate = buffer.combine(FedBuff(server_lr=1.0, buffer_size=2), MEAN, BASE, relative=False)
    torch.testing.assert_close(aggregate.delta, torch.full_like(BASE, 4.0))


@pytest.mark.parametrize("names", list(permutations("abc")), ids="".join)
def test_uploads_are_folded_in_the_order_of_names_however_they_came(names: tuple[str, ...]) -> None:
    """Of values so unequal that the sum depends on the order even in double precision."""
    buffer = UploadBuffer(spool=MemorySpool(), layout=LAYOUT, run_id="r")
    buffer.open(1, lambda version: BASE)
    values = {"a": 1e30, "b": 1.0, "c": -1e30}
    for name in names:
        buffer.add(name, upload(1, 0, values[name]), BASE)
    aggregate = buffer.combine(FedBuff(server_lr=1.0, buffer_size=3), MEAN, BASE, relative=False)
    assert torch.equal(aggregate.delta, torch.zeros_like(BASE))
    assert [record.client for record in buffer.records()] == ["a", "b", "c"]
