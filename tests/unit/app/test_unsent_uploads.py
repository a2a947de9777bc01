"""A client that was killed between staging an upload and writing it to its ledger."""

from pathlib import Path

import pytest
import torch

from fedshelf.app.client import StoreClient
from fedshelf.app.client_place import ClientPlace
from fedshelf.core.messages import DELTA, Failure, TaskKey, Upload
from fedshelf.core.state import ClientState
from fedshelf.privacy.ledger import Ledger
from fedshelf.storage.client_states import FileClientStates

KEY = TaskKey(run_id="r", round=1, attempt=0)


@pytest.mark.parametrize("has_left", [True, False])
def test_an_upload_that_never_began_to_leave_is_forgotten_with_its_state(home: Path, has_left: bool) -> None:
    (home.parent / "photos" / "apple").mkdir(parents=True)
    place = ClientPlace.of(home.parent / "photos", name="lyon", state_dir=None, device="cpu")
    upload = Upload(
        key=KEY, vectors={DELTA: torch.rand(9)}, num_examples=1, num_steps=1, train_loss=1.0, seconds=1.0
    )  # fmt: skip
    place.state_dir.mkdir(mode=0o700, parents=True)
    ledger = Ledger(place.state_dir)
    ledger.intend(Failure(reason="an earlier message"), [b"header"])
    FileClientStates(place.state_dir / "rounds").stage(KEY, upload, ClientState(algorithm={"c": torch.ones(3)}))
    if has_left:
        ledger.intend(upload, [b"header", b"blob"])
    StoreClient(place)
    kept = FileClientStates(place.state_dir / "rounds").cached_reply(KEY)
    assert (kept is not None) is has_left
