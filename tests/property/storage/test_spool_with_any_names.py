"""Whatever a client calls itself, its upload stays its own and inside the spool's folder."""

import tempfile
from pathlib import Path

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedshelf.core.messages import TaskKey, Upload
from fedshelf.storage.spool import FileSpool

KEY = TaskKey(run_id="run", round=1, attempt=1)
NAMES = st.text(st.characters(), max_size=400)  # surrogates too: JSON from the network can hold them


def upload(value: float) -> Upload:
    return Upload(
        key=KEY,
        vectors={"delta": torch.tensor([float(value)])},
        num_examples=1,
        num_steps=1,
        train_loss=0.0,
        seconds=0.0,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, unique=True, max_size=8))
@example(["/etc/passwd", "..", "../..", ".", "", "a/b", "a\0b", "A", "a", "\ud800", "é", "e\u0301", "x" * 5000])
def test_every_name_gets_its_own_upload_back_in_order_also_after_a_restart(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "spool"
        spool = FileSpool(directory)
        for index, name in enumerate(names):
            spool.put(KEY, name, upload(index))
        for reader in (spool, FileSpool(directory)):
            assert list(reader.names(KEY)) == sorted(names)
            for index, name in enumerate(names):
                message = reader.get(KEY, name)
                assert isinstance(message, Upload)
                assert message.delta.tolist() == [index]
        assert sorted(path.name for path in Path(folder).iterdir()) == ["spool"] * bool(names)
