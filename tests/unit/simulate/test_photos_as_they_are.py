"""Folders as people have them, simulated: odd names, damaged photos, products that stores call differently."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedshelf.app.predictor import Predictor
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.events import ClientJoined, RoundFinished, RunStarted
from fedshelf.simulate.engine import simulate
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from tests.fakes import RecordingSink
from tests.unit.data.samples import write_pack, write_photo

pytestmark = pytest.mark.usefixtures("home")


def run(sink: RecordingSink | None = None, **values: Any) -> tuple[RecordingSink, RunDirectory]:
    given: dict[str, Any] = {
        "data_dir": Path("stores"), "image_size": 16, "width": 8, "rounds": 1, "batch_size": 4, "device": "cpu",
        "run_dir": Path("run"),
    }  # fmt: skip
    sink = sink or RecordingSink()
    _, directory = simulate(RunConfig(**{**given, **values}), watchers=(sink,))
    return sink, directory


def labels() -> list[str]:
    names: list[str] = json.loads(Path("run/model/labels.json").read_text(encoding="utf-8"))
    return names


def test_stores_and_products_whose_names_are_not_utf8_take_part_under_names_that_are() -> None:
    for store in (b"magasin-caf\xe9", b"lyon"):
        for product in ("柠檬".encode("gbk"), "西瓜".encode("gbk")):
            write_pack(Path("stores") / os.fsdecode(store) / os.fsdecode(product), {".": 3})
    sink, directory = run()
    assert {joined.client for joined in sink.of(ClientJoined)} == {"lyon", r"magasin-caf\xe9"}
    (record,) = sink.of(RoundFinished)
    assert [client.status.value for client in record.clients] == ["counted", "counted"]
    assert labels() == [r"\xc4\xfb\xc3\xca", r"\xce\xf7\xb9\xcf"]
    assert Predictor.load(directory.model).labels == tuple(labels())
    assert {client.client for client in run_summary(directory.path).rounds[0].clients} == {"lyon", r"magasin-caf\xe9"}


def test_a_path_that_is_not_utf8_can_be_configured() -> None:
    root = Path(os.fsdecode(b"magasins-\xe9t\xe9"))
    for store in ("lyon", "metz"):
        write_pack(root / store, {"apple": 3, "milk": 3})
    run(data_dir=root, test_dir=root / "lyon" / ".." / ".." / write_pack(Path(os.fsdecode(b"\xe9ssai")), {"apple": 1}))
    assert labels() == ["apple", "milk"]


def test_products_that_stores_spell_differently_are_named_before_the_first_round_and_united_by_aliases(
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_pack(Path("stores/a"), {"Banana": 3, "Kiwi": 3})
    write_pack(Path("stores/b"), {"banana": 3, "Kiwi": 3})
    run()
    assert labels() == ["Banana", "Kiwi", "banana"]
    assert "'Banana' (in 'a') and 'banana' (in 'b')" in caplog.text
    caplog.clear()
    Path("aliases.csv").write_text("alias,class\nbanana,Banana\n")
    sink, _ = run(aliases=Path("aliases.csv"), run_dir=Path("united"))
    assert sink.of(RunStarted)[0].num_classes == 2
    assert caplog.text == ""


def test_a_catalogue_that_names_a_product_with_a_comma_keeps_it() -> None:
    for store in ("a", "b"):
        write_pack(Path("stores") / store, {"Juice, orange": 3, "Bread": 3, "Milk [organic]": 3})
    Path("catalogue.txt").write_text("Juice, orange\nBread\nMilk [organic]\n")
    sink, _ = run(catalogue=Path("catalogue.txt"))
    assert labels() == ["Juice, orange", "Bread", "Milk [organic]"]
    assert [joined.num_left_out for joined in sink.of(ClientJoined)] == [0, 0]


def test_a_store_whose_photos_are_all_damaged_is_refused_for_that_reason() -> None:
    for store in ("a", "b", "broken"):
        write_pack(Path("stores") / store, {"apple": 3, "milk": 3})
    for photo in Path("stores/broken").rglob("*.png"):
        photo.write_bytes(b"\x89PNG\r\n\x1a\n no photo")
    with pytest.raises(DataError, match=r"stores/broken': there is no photo to train on: .*None of its 6 training"):
        run()
    assert not Path("runs").exists()


def test_what_a_store_leaves_out_is_said_once_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    for store in ("a", "b"):
        write_pack(Path("stores") / store, {"apple": 10, "kiwi": 10})
    Path("catalogue.txt").write_text("apple\n")
    run(catalogue=Path("catalogue.txt"), val_fraction=0.5)
    said = [line for line in caplog.messages if "left out" in line]
    assert said == [f"{s}: left out: 10 photos of classes that are not in the catalogue: kiwi (10)" for s in "ab"]


def test_a_product_whose_photos_are_all_damaged_is_not_in_the_catalogue() -> None:
    for store in ("a", "b"):
        write_pack(Path("stores") / store, {"apple": 3, "milk": 3, "tea": 2})
        for photo in Path("stores", store, "tea").iterdir():
            photo.write_bytes(photo.read_bytes()[:40])
    run()
    assert labels() == ["apple", "milk"]


def test_accuracies_that_tell_little_are_known_to_those_who_show_them() -> None:
    for store in ("a", "b"):
        write_pack(Path("stores") / store, {"apple": 4})
    write_pack(Path("test"), {"apple": 3, "kiwi": 4, "lemon": 2})
    sink, directory = run(test_dir=Path("test"))
    (started,) = sink.of(RunStarted)
    assert (started.num_classes, started.num_test, started.num_test_left_out) == (1, 3, 6)
    summary = run_summary(directory.path)
    assert (summary.num_classes, summary.num_test, summary.num_test_left_out) == (1, 3, 6)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"test_dir": Path("stores/b")}, UsageError, "--test-dir .*stores/b lies in --data-dir"),
        ({"test_dir": Path("pack")}, DataError, "--test-dir '.*pack' has train/"),
        ({"test_dir": Path("empty")}, DataError, "no photo in a class folder"),
        ({"catalogue": Path("twice.txt")}, DataError, "'apple' is there twice"),
        ({"aliases": Path("twice.txt")}, DataError, "must be alias,class"),
        ({"data_dir": Path("stores/a")}, DataError, "looks like one store's folder"),
        ({"data_dir": Path("pack")}, DataError, "holds 'test', 'train' next to other folders"),
        ({"data_dir": Path("chain")}, DataError, "looks like a folder of stores"),
    ],
)
def test_what_is_certainly_wrong_ends_it_before_there_is_a_run(
    values: dict[str, Any], error: type[Exception], words: str
) -> None:
    for store in ("a", "b"):
        write_pack(Path("stores") / store, {"apple": 2, "milk": 2})
    write_pack(Path("pack"), {"train/apple": 1, "test/apple": 1})
    write_pack(Path("chain"), {f"{region}/store-{n}/apple": 1 for region in ("east", "west") for n in (1, 2)})
    Path("empty").mkdir()
    Path("twice.txt").write_text("apple\napple\n")
    with pytest.raises(error, match=words):
        run(**values)
    assert not Path("run").exists()


def test_photos_of_all_formats_are_trained_on() -> None:
    for store in ("a", "b"):
        for number, ending in enumerate(("jpg", "jfif", "png", "webp", "bmp", "gif", "tif")):
            write_photo(Path("stores") / store / "apple" / f"{number}.{ending}", number)
    sink, _ = run(val_fraction=0)
    assert [joined.num_train for joined in sink.of(ClientJoined)] == [7, 7]
