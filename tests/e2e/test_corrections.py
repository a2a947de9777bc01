"""From the shelf to the next round: a served model, corrections by HTTP, and a client that runs all the while."""

import hashlib
import json
import shutil
from pathlib import Path

import httpx
import pytest

from tests.edge_models import info, photo, write_color_model
from tests.processes import CLASSES, Process, Site

pytestmark = pytest.mark.e2e


def url_of(served: Process) -> str:
    said = served.wait_for("text")["text"]
    return str(said).rpartition(" at ")[2].strip()


def test_corrections_made_while_a_client_runs_are_in_its_next_round(pair: Site) -> None:
    stores = pair.root / "stores"
    shutil.copytree(pair.stores, stores)
    pair.stores = stores
    folder = stores / "store-1"
    served = pair.fedshelf(
        "edge", "serve", str(write_color_model(pair.root / "m.onnx", info(CLASSES))), "--port", "0",
        "--data-dir", str(folder),
    )  # fmt: skip
    corrections = f"{url_of(served)}v1/corrections"
    server = pair.server("--rounds", "3", "--val-fraction", "0", min_clients=2)
    client, other = pair.held_client("store-1", "hold@2"), pair.client("store-2")
    client.wait_for("held", round=2)  # it has received the task, and has not looked at its folder yet
    made = []
    for shade in range(10, 130, 10):  # no color that the model is sure of
        data = photo((shade, shade, shade))
        answer = httpx.post(corrections, files={"file": data}, data={"product": "bread"}, timeout=60).json()
        assert answer["status"] == "training", answer
        made.append(answer["id"])
    assert pair.fedshelf("edge", "corrections", "undo", str(folder), made.pop()).end() == 0
    pair.release(2)
    assert [process.end() for process in (server, client, other)] == [0, 0, 0], server.text()
    rounds = {entry["round"]: entry for entry in pair.show(pair.only_run())["rounds"]}
    photos = {
        number: next(c["num_examples"] for c in rounds[number]["clients"] if c["client"] == "store-1")
        for number in (1, 2, 3)
    }
    assert photos == {1: 24, 2: 24 + 11, 3: 24 + 11}
    listed = pair.fedshelf("edge", "corrections", "list", str(folder))
    assert listed.end() == 0
    said = "\n".join(event["text"] for event in listed.events)
    assert f"11 corrections were first in round 2 of {pair.only_run().name}" in said
    log = next((pair.root / "home/clients/store-1/trained-photos").iterdir())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    expected = {key(path) for path in (folder / "bread").glob("correction-*.jpg")}
    assert len(expected) == 11
    assert expected == set(next(line["added"] for line in lines if line.get("round") == 2))


def key(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(f"{digest}\nbread".encode()).hexdigest()[:32]
