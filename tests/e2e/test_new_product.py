"""A product is added while a server and its clients run: nothing is lost, and whoever is killed agrees afterwards."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedshelf.edge.serving.correction_journal import Status
from fedshelf.edge.serving.corrections import Corrections
from fedshelf.edge.serving.photo_copy import clean_copy
from tests.edge_models import photo
from tests.processes import CLASSES, Site, draw_photos, statuses

pytestmark = pytest.mark.e2e

NEW = "elder"
COUNTED = {"store-1": "counted", "store-2": "counted"}


@pytest.fixture
def known(pair: Site) -> tuple[str, ...]:
    """Arguments of a server that knows four products, of which store-1 has a fifth."""
    stores = pair.root / "stores"
    shutil.copytree(pair.stores, stores)
    pair.stores = stores
    draw_photos(stores / "store-1" / NEW, 2, count=8, seed=500)
    (pair.root / "products.txt").write_text("\n".join(CLASSES))
    return ("--catalogue", str(pair.root / "products.txt"), "--val-fraction", "0")


def examples(run: Path, site: Site, client: str) -> list[int]:
    return [c["num_examples"] for r in site.show(run)["rounds"] for c in r["clients"] if c["client"] == client]


def correct(folder: Path, product: str, count: int) -> None:
    store = Corrections(folder, labels=CLASSES, paths=CLASSES)
    for shade in range(count):
        data = photo((40 * shade, 20, 90))
        found = store.file(clean_copy(data), product, source=hashlib.sha256(data).hexdigest())
        assert found.status is Status.INBOX


def labels(run: Path) -> list[str]:
    found: list[str] = json.loads((run / "model/labels.json").read_text())
    return found


def add(site: Site, *arguments: str) -> str:
    process = site.fedshelf("catalogue", "add", str(site.only_run()), *arguments)
    assert process.end() == 0, process.text()
    return "\n".join(event["text"] for event in process.events)


def test_stores_that_have_photos_of_it_train_on_them_from_the_next_round_on(pair: Site, known: tuple[str, ...]) -> None:
    recipe = (*known, "--rounds", "4", "--algorithm", "scaffold", "--codec-up", "topk:0.5", "--codec-down", "int8")
    folder = pair.stores / "store-1"
    correct(folder, "Fig", 3)
    server = pair.server(*recipe, min_clients=2)
    first, second = pair.client("store-1"), pair.held_client("store-2", "hold@2")
    second.wait_for("held", round=2)
    assert "from its next round on" in add(pair, NEW, "apple", "fig")
    alias = pair.fedshelf("catalogue", "alias", str(pair.only_run()), "SKU-7=elder")
    assert alias.end() == 0, alias.text()
    pair.release(2)
    assert [process.end() for process in (server, first, second)] == [0, 0, 0], server.text()
    run = pair.only_run()
    assert [statuses(pair.show(run), number) for number in (1, 2, 3, 4)] == [COUNTED] * 4
    assert examples(run, pair, "store-1") == [24, 24, 35, 35]
    assert examples(run, pair, "store-2") == [24] * 4
    assert labels(run) == [*CLASSES, NEW, "fig"]
    changed = server.wait_for("catalogue_changed", round=2)
    assert pair.show(run)["num_parameters"] == changed["num_parameters"]
    assert changed["added"] == [NEW, "fig"]
    sizes = {
        len(tensor) for name, tensor in load_file(run / "model/model.safetensors").items() if name.startswith("head")
    }
    assert sizes == {6}
    assert "does not train on 3 photos of 'Fig' in the inbox" in first.text()
    assert "trains on 3 photos of 'fig' from the inbox" in first.text()
    listed = pair.fedshelf("edge", "corrections", "list", str(folder))
    assert listed.end() == 0
    said = "\n".join(event["text"] for event in listed.events)
    assert f"3 corrections were first in round 3 of {run.name}" in said


def test_killed_servers_and_clients_agree_on_the_grown_catalogue(pair: Site, known: tuple[str, ...]) -> None:
    recipe = (*known, "--rounds", "4", "--algorithm", "scaffold", "--codec-up", "topk:0.5")
    server = pair.server(*recipe, min_clients=2)
    first, second = pair.held_client("store-1", "hold@1", "hold@2"), pair.client("store-2")
    first.wait_for("held", round=1)
    server.wait_for("upload_received", round=1, client="store-2")  # of the former model; nothing is saved but this
    add(pair, NEW)
    server.kill()
    server = pair.server(*recipe, min_clients=2)
    assert server.wait_for("run_started")["num_classes"] == 4  # the open round ends as it began
    pair.release(1)
    server.wait_for("catalogue_changed", round=1)
    first.wait_for("held", round=2)
    server.wait_for("upload_received", round=2, client="store-2", status="counted")
    for process in (server, second):
        process.kill()  # before the first commit with the new product
    server, second = pair.server(*recipe, min_clients=2), pair.client("store-2")
    assert server.wait_for("run_started")["num_classes"] == 5
    pair.release(2)
    assert [process.end() for process in (server, first, second)] == [0, 0, 0], server.text()
    run = pair.only_run()
    assert [statuses(pair.show(run), number) for number in (1, 2, 3, 4)] == [COUNTED] * 4
    assert pair.show(run)["void_rounds"] == 0
    assert examples(run, pair, "store-1") == [24, 32, 32, 32]
    assert labels(run) == [*CLASSES, NEW]
