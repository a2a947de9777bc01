"""Uploads wait for the fold."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Evaluation, TaskKey, Upload, auxiliary_vectors
from fedshelf.core.ports import Received, Spool
from fedshelf.serialization import messages as payload
from fedshelf.storage.spool import FileSpool, MemorySpool, file_name

KEY = TaskKey(run_id="run", round=3, attempt=1)


def upload(value: float = 1.0, size: int = 1000, key: TaskKey = KEY) -> Upload:
    return Upload(
        key=key,
        vectors={
            "delta": torch.full((size,), value),
            **auxiliary_vectors({"control": torch.arange(5.0), "a.b": torch.tensor([-0.0, 1e-40])}),
        },
        num_examples=7,
        num_steps=3,
        train_loss=0.1 + value,
        seconds=1 / 3,
    )


def same_bytes(one: object, other: object) -> bool:
    assert isinstance(one, Upload)
    assert isinstance(other, Upload)
    body, other_body = payload.blob_of(one).join(), payload.blob_of(other).join()
    return body == other_body and payload.encode_header(one, "x") == payload.encode_header(other, "x")


@pytest.fixture(params=["file", "memory"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> Spool:
    return FileSpool(tmp_path / "spool") if request.param == "file" else MemorySpool()


def test_an_upload_comes_back_to_the_last_bit(spool: Spool) -> None:
    spool.put(KEY, "lyon", upload())
    assert same_bytes(spool.get(KEY, "lyon"), upload())


def test_names_are_sorted_and_of_the_key_asked_for(spool: Spool) -> None:
    other_attempt = TaskKey(run_id="run", round=3, attempt=2)
    other_run = TaskKey(run_id="another", round=3, attempt=1)
    assert list(spool.names(KEY)) == []
    for client in ("b", "a", "ä", "B"):
        spool.put(KEY, client, upload())
    spool.put(other_attempt, "z", upload())
    assert list(spool.names(KEY)) == ["B", "a", "b", "ä"]
    assert list(spool.names(other_attempt)) == ["z"]
    assert list(spool.names(other_run)) == []


def test_a_second_upload_replaces_the_first(spool: Spool) -> None:
    spool.put(KEY, "a", upload(1.0))
    spool.put(KEY, "a", upload(2.0))
    assert list(spool.names(KEY)) == ["a"]
    assert same_bytes(spool.get(KEY, "a"), upload(2.0))


def test_nothing_is_left_after_clearing(spool: Spool) -> None:
    spool.put(KEY, "a", upload())
    spool.clear()
    spool.clear()
    assert list(spool.names(KEY)) == []
    with pytest.raises(KeyError):
        spool.get(KEY, "a")
    spool.put(KEY, "b", upload())
    assert list(spool.names(KEY)) == ["b"]


def test_messages_without_vectors_come_back_too(spool: Spool) -> None:
    message = Evaluation(key=KEY, num_examples=3, num_correct=2, loss_sum=0.25)
    spool.put(KEY, "a", message)
    assert spool.get(KEY, "a") == message


def test_a_restarted_server_finds_what_it_had_received(tmp_path: Path) -> None:
    FileSpool(tmp_path).put(KEY, "a", upload())
    again = FileSpool(tmp_path)
    assert list(again.names(KEY)) == ["a"]
    assert same_bytes(again.get(KEY, "a"), upload())
    assert list(FileSpool(tmp_path).names(TaskKey(run_id="another", round=3, attempt=1))) == []


def test_what_a_crash_left_unfinished_or_damaged_is_not_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = FileSpool(tmp_path)
    for client in ("whole", "damaged", "empty", "headless", "garbled"):
        spool.put(KEY, client, upload())
    folder = tmp_path / "000003-001"
    content = (folder / file_name("damaged")).read_bytes()
    (folder / file_name("damaged")).write_bytes(content[:-8] + bytes(8))
    (folder / file_name("empty")).write_bytes(b"")
    (folder / file_name("headless")).with_suffix(".json").unlink()
    (folder / file_name("garbled")).with_suffix(".json").write_text("{")
    (folder / f".{file_name('half')}.ab.tmp").write_bytes(content[:100])
    with caplog.at_level(logging.WARNING):
        assert list(FileSpool(tmp_path).names(KEY)) == ["whole"]
    assert "asked again" in caplog.text
    assert {path.stem for path in folder.iterdir()} == {Path(file_name("whole")).stem}


@pytest.mark.parametrize("damage", ["digits as text", "no JSON", "nested too deep", "no header", "no vectors"])
def test_what_can_no_longer_be_read_is_refused_and_the_others_are_there(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of an earlier process: the digest of its vectors is right, and its header is read only now."""
    FileSpool(tmp_path).put(KEY, "a", upload())
    FileSpool(tmp_path).put(KEY, "b", upload())
    spool = FileSpool(tmp_path)
    assert list(spool.names(KEY)) == ["a", "b"]
    vectors = tmp_path / "000003-001" / file_name("a")
    header = vectors.with_suffix(".json")
    text = header.read_text()
    damages: dict[str, Callable[[], object]] = {
        "digits as text": lambda: header.write_text(text.replace('\\"num_steps\\":3', '\\"num_steps\\":\\"999\\"')),
        "no JSON": lambda: header.write_text(text[:-30]),
        "nested too deep": lambda: header.write_text("[" * 100_000),
        "no header": header.unlink,
        "no vectors": lambda: vectors.write_bytes(b""),
    }
    damages[damage]()
    with caplog.at_level(logging.WARNING), pytest.raises(RefusedError, match="can no longer be read"):
        spool.get(KEY, "a")
    assert "the upload of client 'a' can no longer be read" in caplog.text
    assert same_bytes(spool.get(KEY, "b"), upload())


def test_a_body_that_came_as_a_file_is_moved_and_not_copied(tmp_path: Path) -> None:
    body = payload.blob_of(upload())
    source = Received(path=tmp_path / body.digest, digest=body.digest)
    source.path.write_bytes(body.join())
    inode = source.path.stat().st_ino
    spool = FileSpool(tmp_path / "spool")
    spool.put(KEY, "a", replace(upload(), num_examples=5), source)  # the claim was capped
    assert not source.path.exists()
    assert inode in {path.stat().st_ino for path in (tmp_path / "spool").rglob("*.safetensors")}
    for reader in (spool, FileSpool(tmp_path / "spool")):
        assert list(reader.names(KEY)) == ["a"]
        assert same_bytes(reader.get(KEY, "a"), replace(upload(), num_examples=5))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_vectors_of_an_upload_are_the_mapped_file_and_not_a_copy(tmp_path: Path) -> None:
    spool = FileSpool(tmp_path)
    spool.put(KEY, "a", upload(size=1 << 20))
    message = spool.get(KEY, "a")
    assert isinstance(message, Upload)
    address = message.delta.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            assert file_name("a") in line
            return
    pytest.fail("the vector lies in no mapping")


def test_a_mapped_upload_outlives_clearing(tmp_path: Path) -> None:
    spool = FileSpool(tmp_path)
    spool.put(KEY, "a", upload())
    message = spool.get(KEY, "a")
    spool.clear()
    assert same_bytes(message, upload())
