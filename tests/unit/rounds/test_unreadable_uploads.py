"""A file of the spool that can no longer be read costs its client the round, and not the server its life."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.core.events import ClientStatus, RoundVoid, RunStatus
from fedshelf.core.messages import ClientMessage, TaskKey
from fedshelf.core.ports import Received
from fedshelf.storage.spool import FileSpool, file_name
from tests.worlds import World


class DamagedSpool(FileSpool):
    """A real spool on a disk that loses one client's upload in some rounds."""

    def __init__(self, directory: Path, client: str, is_lost: Callable[[TaskKey], bool]) -> None:
        super().__init__(directory)
        self._root, self._client, self._is_lost = directory, client, is_lost

    def put(self, key: TaskKey, client: str, message: ClientMessage, source: Received | None = None) -> None:
        super().put(key, client, message, source)
        if client == self._client and self._is_lost(key):
            (header,) = self._root.rglob(f"{Path(file_name(client)).stem}.json")
            header.write_text(header.read_text().replace("num_steps", "num_slips"))


@pytest.mark.parametrize("algorithm", [FedAvg(), FedBuff(server_lr=1.0, buffer_size=2)], ids=["fedavg", "fedbuff"])
def test_it_is_left_out_of_its_round_by_name(tmp_path: Path, algorithm: Algorithm) -> None:
    world = World(
        names=("a", "b", "c", "d"), num_rounds=3, algorithm=algorithm, delays={"a": 1.0, "b": 1.2, "c": 5.0, "d": 6.0}
    )
    world.spool = DamagedSpool(tmp_path / "spool", "b", lambda key: True)  # type: ignore[assignment]
    assert world.run() is RunStatus.FINISHED
    lost = [m for record in world.finished for m in record.clients if m.client == "b"]
    assert lost
    assert all(m.status is ClientStatus.REFUSED and "can no longer be read" in m.reason for m in lost)
    assert not world.sink.of(RoundVoid)
    assert bool(world.final.isfinite().all())


def test_a_round_that_lacks_its_quorum_without_it_is_tried_again(tmp_path: Path) -> None:
    honest = World(names=("a", "b"), num_rounds=2, rounds={"quorum": None})
    world = World(names=("a", "b"), num_rounds=2, rounds={"quorum": None})
    world.spool = DamagedSpool(  # type: ignore[assignment]
        tmp_path / "spool", "b", lambda key: (key.round, key.attempt) == (2, 0)
    )
    assert honest.run() is world.run() is RunStatus.FINISHED
    (void,) = world.sink.of(RoundVoid)
    assert [(m.client, m.status) for m in void.clients] == [("a", ClientStatus.COUNTED), ("b", ClientStatus.REFUSED)]
    assert torch.equal(world.checkpoints.states[0].model.params, honest.checkpoints.states[0].model.params)
    assert [len(record.clients) for record in world.finished] == [2, 2]
