"""Nothing but the declared payload leaves a client; and whoever plants a leak is caught."""

import base64
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedshelf.core.choices import Candidate
from fedshelf.core.messages import (
    ClassFolder,
    ClientMessage,
    Comparison,
    Evaluation,
    Failure,
    Join,
    ProductCount,
    TaskKey,
    Upload,
    auxiliary_vectors,
)
from fedshelf.deploy.records import to_parcel
from tests.leaks import Store, bytes_of_photos, leaks, photo_windows, unlisted_requests
from tests.odd_client import plain
from tests.processes import CLASSES, Site, draw_photos
from tests.recording_proxy import recording_proxy

pytestmark = pytest.mark.e2e

Records = dict[str, dict[str, Any]]


def with_bytes(records: Records) -> Records:
    """Arrays as bytes again."""
    return {
        name: {key: base64.b64decode(v["base64"]) if isinstance(v, dict) else v for key, v in record.items()}
        for name, record in records.items()
    }


def recorded(path: Path) -> list[Records]:
    return [with_bytes(json.loads(line)) for line in path.read_text().splitlines()]


def store_of(folder: Path, num_values: int) -> Store:
    files = tuple(path.name for path in folder.rglob("*") if path.is_file())
    assert files
    return Store(
        name=folder.name, classes=frozenset(CLASSES), num_values=num_values,
        file_names=(*files, *(Path(name).stem for name in files)),
    )  # fmt: skip


@pytest.mark.slow
def test_nothing_but_the_declared_payload_leaves_a_client(pair: Site) -> None:
    log = pair.root / "sent.jsonl"
    server = pair.server("--rounds", "2", "--val-fraction", "0.2", "--insecure", "--run-dir", str(pair.root / "run"))
    with recording_proxy(pair.address) as proxy:
        other = pair.client("store-2", "--insecure")
        direct, pair.address = pair.address, proxy.address
        watched = pair.odd_client("store-1", "--insecure", "--record", str(log), "--do", "fail@2")
        pair.address = direct
        server.wait_for("round_finished", round=1)
        assert server.wait_for("upload_received", round=2, client="store-1")["status"] == "failed"
        server.interrupt()  # two of two are needed: round 2 would be tried for ever
        server.end()
        watched.interrupt()
        watched.end()
        other.interrupt()
        other.end()

    messages = recorded(log)
    num_values = model_size(pair)
    store = store_of(pair.stores / "store-1", num_values)
    kinds = [json.loads(m["header"]["json"])["kind"] for m in messages if "header" in m]
    assert kinds[:5] == ["join", "ready", "upload", "evaluation", "failure"]
    assert [leaks(message, store) for message in messages] == [[]] * len(messages)

    streams = [bytes(stream) for stream in proxy.streams]
    assert [unlisted_requests(stream) for stream in streams] == [[]] * len(streams)
    assert sum(map(len, streams)) > 4 * num_values  # the upload did go through the proxy
    windows = photo_windows(sorted((pair.stores / "store-1").rglob("*.png")), 16)
    everything = b"\0".join(streams)
    assert bytes_of_photos(everything, windows) == 0
    assert not any(name.encode() in everything for name in store.file_names)
    assert b"secret" not in everything  # the name in the error that the client failed with


@pytest.mark.slow
def test_of_a_crash_nothing_leaves_but_the_signals_name(pair: Site) -> None:
    server = pair.server("--rounds", "100000", "--insecure", min_clients=1)
    with recording_proxy(pair.address) as proxy:
        pair.address = proxy.address
        client = pair.client("store-1", "--insecure")
        server.wait_for("round_finished", round=1)
        client.kill(signal.SIGSEGV)
        server.wait_for("client_left", client="store-1")
    streams = [bytes(stream) for stream in proxy.streams]
    assert [unlisted_requests(stream) for stream in streams] == [[]] * len(streams)
    assert sum(b'"signal": "SIGSEGV"}' in stream for stream in streams) == 1


@pytest.mark.slow
def test_of_the_models_that_a_store_compares_nothing_leaves_but_accuracies_and_a_choice(
    pair: Site, drawn_test_photos: Path
) -> None:
    log = pair.root / "sent.jsonl"
    recipe = (
        "--rounds",
        "1",
        "--val-fraction",
        "0.2",
        "--personalize",
        "finetune",
        "--run-dir",
        str(pair.root / "run"),
    )
    server = pair.server(*recipe, "--insecure")
    with recording_proxy(pair.address) as proxy:
        policy = pair.root / "policy.toml"
        policy.write_text("[metrics]\nper-product = false\n")
        other = pair.client("store-2", "--insecure", "--policy", str(policy))
        direct, pair.address = pair.address, proxy.address
        watched = pair.odd_client("store-1", "--insecure", "--record", str(log), "--test-dir", str(drawn_test_photos))
        pair.address = direct
        assert [process.end() for process in (server, watched, other)] == [0, 0, 0]
    messages = recorded(log)
    store = store_of(pair.stores / "store-1", model_size(pair))
    kinds = [json.loads(m["header"]["json"])["kind"] for m in messages if "header" in m]
    assert kinds == ["join", "ready", "upload", "evaluation", "comparison"]
    assert [leaks(message, store) for message in messages] == [[]] * len(messages)
    run = pair.show(pair.root / "run")
    shown = {found["client"]: found for found in run["stores"]}
    assert None not in shown["store-1"].values()
    evaluation = next(
        json.loads(m["header"]["json"]) for m in messages if '"evaluation"' in m.get("header", {})["json"]
    )
    assert sum(found["total"] for found in run["products"]) == evaluation["num_examples"], "store-2 withholds its own"
    assert {found["product"] for found in run["products"]} == {"bread", "cocoa", "dates"}
    everything = b"\0".join(bytes(stream) for stream in proxy.streams)
    photos = sorted((*(pair.stores / "store-1").rglob("*.png"), *drawn_test_photos.rglob("*.png")))
    assert bytes_of_photos(everything, photo_windows(photos, 16)) == 0


def model_size(site: Site) -> int:
    """Shared values of the run's model, from what the server wrote down."""
    checkpoint = max((site.root / "run" / "checkpoints").glob("round-*.safetensors"))
    return int(safetensors.torch.load_file(checkpoint)["params"].numel())


@pytest.mark.slow
def test_a_client_that_cannot_set_up_names_no_place_on_its_disk(pair: Site) -> None:
    (pair.root / "home" / "cache" / "index.sqlite").mkdir(parents=True)  # in the way of the photo cache
    log = pair.root / "sent.jsonl"
    server = pair.server("--rounds", "1", "--run-dir", str(pair.root / "run"), min_clients=1)
    broken = pair.odd_client("store-1", "--record", str(log))
    reason = server.wait_for("client_refused", client="store-1")["reason"]
    assert "cache" in reason
    assert "home" not in reason
    broken.interrupt()  # it would come back later
    broken.end()
    messages = recorded(log)
    assert [json.loads(m["header"]["json"])["kind"] for m in messages if "header" in m][:2] == ["join", "failure"]
    store = store_of(pair.stores / "store-1", 1)
    assert [leaks(message, store) for message in messages] == [[]] * len(messages)


SIZE = 50
KEY = TaskKey(run_id="20260102-030405-abcd", round=1, attempt=0)
UPLOAD = Upload(
    key=KEY,
    vectors={"delta": torch.ones(SIZE)},
    num_examples=8,
    num_steps=2,
    train_loss=1.5,
    seconds=0.25,
    batch_size=16,
    client_lr=0.05,
)
EVALUATION = Evaluation(
    key=KEY, num_examples=4, num_correct=2, loss_sum=3.5, levels=(2,),
    products=(ProductCount(index=0, correct=0, total=1), ProductCount(index=3, correct=2, total=3)),
)  # fmt: skip
COMPARISON = Comparison(
    key=KEY, best=Candidate.LOCAL, accuracies={Candidate.LOCAL: 0.5, Candidate.GLOBAL: 0.25}, on_test=True,
    num_validation=4,
)  # fmt: skip
FAILURE = Failure(key=KEY, reason="OSError: No space left on device")
JOIN = Join(
    protocol=1, version="0.1.0", client="store-1",
    classes=(ClassFolder(leaf="apple", path="apple"),),
)  # fmt: skip


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    draw_photos(tmp_path / "store-1" / "apple", 0, count=1, seed=1)
    (found,) = (tmp_path / "store-1" / "apple").iterdir()
    return found


@pytest.fixture
def store(photo: Path) -> Store:
    return store_of(photo.parents[1], SIZE)


def sent(message: ClientMessage) -> Records:
    """`message` as it would leave a client."""
    return with_bytes(plain(to_parcel(message)))


@pytest.mark.parametrize("message", [UPLOAD, EVALUATION, COMPARISON, FAILURE, JOIN])
def test_the_check_lets_honest_messages_pass(message: ClientMessage, store: Store) -> None:
    assert leaks(sent(message), store) == []


def text(photo: Path) -> str:
    """A photo in the guise of text."""
    return base64.b64encode(photo.read_bytes()).decode()


def vector(photo: Path) -> torch.Tensor:
    """A photo in the guise of a tensor."""
    return torch.frombuffer(bytearray(photo.read_bytes()), dtype=torch.uint8).float()


def in_header(message: ClientMessage, **fields: object) -> Records:
    records = sent(message)
    records["header"]["json"] = json.dumps(json.loads(records["header"]["json"]) | fields)
    return records


def in_blob(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, after: bytes = b"") -> Records:
    records = sent(UPLOAD)
    records["blob"]["safetensors"] = safetensors.torch.save(tensors, metadata) + after
    return records


PLANTED: dict[str, Callable[[Path], Records]] = {
    "a photo in a new field": lambda photo: in_header(UPLOAD, thumbnail=text(photo)),
    "a photo in a new field of the key": lambda photo: in_header(
        UPLOAD, key={"run_id": KEY.run_id, "round": 1, "attempt": 0, "note": text(photo)}
    ),
    "a photo in the key's run id": lambda photo: in_header(
        EVALUATION, key={"run_id": text(photo), "round": 1, "attempt": 0}
    ),
    "a photo in an extra tensor": lambda photo: sent(
        replace(UPLOAD, vectors={**UPLOAD.vectors, **auxiliary_vectors({"control": vector(photo)})})
    ),
    "a photo behind the model's values": lambda photo: sent(
        replace(UPLOAD, vectors={**UPLOAD.vectors, "delta": torch.cat([UPLOAD.delta, vector(photo)])})
    ),
    "a photo in the blob's metadata": lambda photo: in_blob({"delta": UPLOAD.delta}, {"note": text(photo)}),
    "a photo after the blob": lambda photo: in_blob({"delta": UPLOAD.delta}, after=photo.read_bytes()),
    "a photo as a record of its own": lambda photo: sent(UPLOAD) | {"photo": {"data": photo.read_bytes()}},
    "a photo in a failure's reason": lambda photo: sent(replace(FAILURE, reason=text(photo)[:400])),
    "a photo in many short reasons": lambda photo: sent(replace(FAILURE, reason=" ".join(text(photo)))),
    "a photo in the join's name": lambda photo: sent(replace(JOIN, client=text(photo))),
    "a photo in the join's version": lambda photo: sent(replace(JOIN, version=text(photo))),
    "a photo in a class": lambda photo: sent(replace(JOIN, classes=(ClassFolder(leaf="apple", path=text(photo)),))),
    "a photo in a number": lambda photo: in_header(
        EVALUATION, num_correct=int.from_bytes(photo.read_bytes()[:99], "big")
    ),
    "a photo in the number of a product": lambda photo: in_header(
        EVALUATION, products=[{"index": int.from_bytes(photo.read_bytes()[:99], "big"), "correct": 0, "total": 4}]
    ),
    "a photo in a count of a product": lambda photo: in_header(
        EVALUATION, products=[{"index": 0, "correct": 0, "total": 4, "photo": text(photo)}]
    ),
    "a photo in counts of many products": lambda photo: in_header(
        EVALUATION, products=[{"index": byte, "correct": 0, "total": 1} for byte in photo.read_bytes()]
    ),
    "a photo in the levels": lambda photo: in_header(EVALUATION, levels=list(photo.read_bytes())),
    "a photo in an accuracy": lambda photo: in_header(COMPARISON, accuracies={"local": text(photo)}),
    "a photo in the name of a model": lambda photo: in_header(COMPARISON, accuracies={text(photo): 0.5}),
    "a photo in the choice": lambda photo: in_header(COMPARISON, best=text(photo)),
    "a photo in a control message": lambda photo: {"control": {"kind": "noted", "reason": text(photo)}},
    "a file's name in a reason": lambda photo: sent(replace(FAILURE, reason=f"cannot read {photo.name}")),
    "a file's stem in a reason": lambda photo: sent(replace(FAILURE, reason=f"cannot read {photo.stem}, skipped")),
    "a path in a reason": lambda photo: sent(replace(FAILURE, reason="cannot read /srv/lyon/apple")),
}  # fmt: skip


@pytest.mark.parametrize("leak", PLANTED)
def test_a_planted_leak_is_caught(leak: str, photo: Path, store: Store) -> None:
    assert leaks(PLANTED[leak](photo), store) != []


def test_a_planted_request_is_caught(photo: Path) -> None:
    honest = b"POST /fedshelf/wait HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok"
    assert unlisted_requests(honest * 2) == []
    assert unlisted_requests(honest + honest.replace(b"wait", b"upload-photo")) != []
    assert unlisted_requests(honest.replace(b"wait", b"wait?photo=" + text(photo).encode())) != []
    assert unlisted_requests(honest.replace(b"Host: a", b"X-Photo: " + text(photo).encode())) != []
    assert unlisted_requests(honest.replace(b"Host: a", b"Fedshelf-Crash-Token: " + text(photo).encode())) != []


def test_bytes_of_a_photo_are_found_wherever_they_are(photo: Path) -> None:
    windows = photo_windows([photo], 16)
    noise = bytes(range(256)) * 4
    assert bytes_of_photos(noise, windows) == 0
    for data in (photo.read_bytes()[100:140], bytes(vector(photo).byte()[200:240].tolist())):
        assert bytes_of_photos(noise + data + noise, windows) > 0
