"""What passes between the simulation's processes arrives as it was, and its memory is used again at the right time."""

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedshelf.core.encoded import Encoded
from fedshelf.core.messages import TaskKey, Upload
from fedshelf.simulate.ipc import pack, unpack
from fedshelf.simulate.shared import Mappings, Reference, SharedFiles, SharedFolders

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KEY = TaskKey(run_id="r", round=1, attempt=0)


@pytest.fixture
def files(tmp_path: Path) -> SharedFiles:
    return SharedFiles([tmp_path], "test")


@given(
    dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(0, 40), max_size=3).map(tuple), transposed=st.booleans()
)
def test_any_tensor_arrives_as_it_was(dtype: torch.dtype, shape: tuple[int, ...], transposed: bool) -> None:
    folders = SharedFolders()
    try:
        files = SharedFiles(folders.paths, "test")
        tensor = torch.randint(0, 100, shape).to(dtype)
        tensor = tensor.T if transposed and tensor.dim() == 2 else tensor
        message = {"a": [tensor], "b": "text"}
        received = unpack(pack(message, files.write), Mappings().read)
        assert received["b"] == "text"
        assert received["a"][0].dtype == dtype
        assert torch.equal(received["a"][0], tensor)
    finally:
        folders.close()


def test_a_compressed_upload_passes_as_any_other_message(files: SharedFiles) -> None:
    parts = {"codes": torch.arange(10_000).to(torch.int8), "scales": torch.rand(7).to(torch.bfloat16)}
    encoded = Encoded(codec="int8", size=10_000, parts=parts)
    message = Upload(
        key=KEY, vectors={"trainable": encoded}, num_examples=3, num_steps=1, train_loss=0.5, seconds=0.1
    )  # fmt: skip
    stored: list[Reference] = []

    def store(tensor: torch.Tensor) -> Reference:
        stored.append(files.write(tensor))
        return stored[-1]

    received = unpack(pack(message, store), Mappings().read)
    assert isinstance(received, Upload)
    vector = received.vectors["trainable"]
    assert isinstance(vector, Encoded)
    assert (received.key, received.train_loss) == (KEY, 0.5)
    assert all(torch.equal(vector.parts[name], part) for name, part in parts.items())
    assert [reference.dtype for reference in stored] == [torch.int8]  # the small part went with the message


def test_a_tensor_that_is_sent_to_many_is_written_once(files: SharedFiles, tmp_path: Path) -> None:
    model = torch.rand(10_000)
    assert pack(model, files.publish) == pack(model, files.publish)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_published_file_is_used_again_when_the_tensor_is_garbage_and_not_before(
    files: SharedFiles, tmp_path: Path
) -> None:
    first, second = torch.zeros(10_000), torch.ones(10_000)
    files.publish(first)
    data = pack(second, files.publish)
    assert len(list(tmp_path.iterdir())) == 2
    del first
    gc.collect()
    files.publish(torch.rand(10_000))
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(unpack(data, Mappings().read), second)


def test_a_reader_is_done_when_the_last_view_is_garbage(files: SharedFiles) -> None:
    released: list[str] = []
    tensor: Any = Mappings().read(files.write(torch.arange(10_000.0)), done=lambda: released.append("done"))
    view = tensor[5_000:].view(50, 100)
    del tensor
    gc.collect()
    assert released == []
    assert view[0, 0] == 5_000
    del view
    gc.collect()
    assert released == ["done"]


def test_a_file_given_back_takes_the_next_tensor_of_about_the_size(files: SharedFiles, tmp_path: Path) -> None:
    mappings = Mappings()
    for count in (10_000, 9_900, 10_100):
        reference = files.write(torch.full((count,), float(count)))
        assert torch.equal(mappings.read(reference), torch.full((count,), float(count)))
        files.release(reference.path, reference.capacity)
    assert len(list(tmp_path.iterdir())) == 1


def test_files_are_made_on_disk_where_the_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tmp_path / "memory", tmp_path / "disk"
    small.mkdir()
    large.mkdir()
    allocate = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(small):
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    reference = SharedFiles([small, large], "test").write(torch.ones(10_000))
    assert torch.equal(Mappings().read(reference), torch.ones(10_000))
    assert Path(reference.path).parent == large
    assert list(small.iterdir()) == []
    with pytest.raises(OSError, match="No space"):
        SharedFiles([small], "test").write(torch.ones(10_000))


def test_the_folders_are_gone_when_they_are_closed() -> None:
    folders = SharedFolders()
    reference = SharedFiles(folders.paths, "test").write(torch.ones(10_000))
    mapped = Mappings().read(reference)
    folders.close()
    assert not any(path.exists() for path in folders.paths)
    assert torch.equal(mapped, torch.ones(10_000))


def test_what_a_killed_process_left_in_memory_is_removed_by_the_next() -> None:
    code = (
        "import os, signal, torch; from fedshelf.simulate.shared import *; folders = SharedFolders(); "
        "SharedFiles(folders.paths, 'test').write(torch.ones(10_000)); "
        "print(folders.paths[0], flush=True); signal.pause()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        SharedFolders().close()
        assert left.exists(), "a living process' folder was removed"
        process.kill()
    SharedFolders().close()
    assert not left.exists()
