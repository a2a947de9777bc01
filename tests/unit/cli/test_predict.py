"""`fedshelf predict` on files and folders, with a model file, and its table."""

import csv
import json
from pathlib import Path

import pytest

from fedshelf.core.events import ProductReport
from fedshelf.core.text import spreadsheet_cell
from fedshelf.data.catalogue import Catalogue
from fedshelf.tracking.product_results import confusion_table
from tests.edge_models import info, photo, write_color_model
from tests.unit.cli.screen import run


@pytest.fixture
def model(home: Path) -> Path:
    Path("photos/deep/er").mkdir(parents=True)
    Path("photos/red.jpg").write_bytes(photo((250, 5, 5)))
    Path("photos/deep/er/green.png").write_bytes(photo((5, 250, 5), format="PNG"))
    Path("photos/deep/grey.jpg").write_bytes(photo((128, 128, 128)))
    return write_color_model(Path("m.onnx"), info(paths=("Warm/Red", "Cold/Green", "Cold/Blue")))


def test_a_model_file_names_photos_and_folders_of_photos_and_says_what_is_sure(model: Path) -> None:
    code, text = run("predict", "photos", "photos/red.jpg", "--onnx", "m.onnx", "--json", "--top", "1")
    assert code == 0, text
    answers = [json.loads(line) for line in text.splitlines()]
    assert [answer["photo"] for answer in answers] == [
        "photos/deep/er/green.png", "photos/deep/grey.jpg", "photos/red.jpg", "photos/red.jpg",
    ]  # fmt: skip
    assert [answer["predictions"][0]["product"] for answer in answers] == ["Green", "Red", "Red", "Red"]
    assert [answer["sure"] for answer in answers] == [True, False, True, True]
    assert answers[0]["predictions"][0]["class"] == "Green", "the former name is kept"
    assert answers[0]["levels"][0]["predictions"][0]["product"] == "Cold"
    code, text = run("predict", "photos/deep", "--onnx", "m.onnx")
    assert code == 0
    assert "photos/deep/grey.jpg (not sure)" in text
    assert "photos/deep/er/green.png\n" in text
    assert "Cold/" in text


def test_the_table_has_a_line_per_photo_and_product_and_no_formula(model: Path) -> None:
    write_color_model(Path("m.onnx"), info(["=cmd|' /C calc'!A0", "+1", "@SUM(A1)"]))
    Path("-1+1.jpg").write_bytes(photo((250, 5, 5)))
    Path("broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    code, text = run(
        "predict", "--onnx", "m.onnx", "--csv", "out.csv", "--top", "2", "--", "photos", "-1+1.jpg", "broken.jpg"
    )
    assert code == 1, "one photo cannot be used"
    assert "out.csv: 9 lines" in text
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert list(rows[0]) == ["photo", "rank", "product", "probability", "sure", "error"]
    assert [(row["photo"], row["rank"]) for row in rows[4:8]] == [
        ("photos/red.jpg", "1"), ("photos/red.jpg", "2"), ("'-1+1.jpg", "1"), ("'-1+1.jpg", "2"),
    ]  # fmt: skip
    assert rows[6]["product"] == "'=cmd|' /C calc'!A0"
    assert float(rows[6]["probability"]) > 0.9
    assert rows[6]["sure"] == "yes"
    assert (rows[8]["photo"], rows[8]["product"]) == ("broken.jpg", "")
    assert "cannot be used" in rows[8]["error"]
    for row in rows:
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row.values())


def test_flags_and_folders_that_do_not_fit_are_errors(model: Path) -> None:
    for flags in (["--run", "r"], ["--best"], ["--model-path", "photos"]):
        code, text = run("predict", "photos", "--onnx", "m.onnx", *flags)
        assert code == 2
        assert "--onnx names a whole model" in text
    Path("empty").mkdir()
    code, text = run("predict", "empty", "--onnx", "m.onnx")
    assert code == 1
    assert "folder 'empty': no file below it has the name of a photo" in text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "＝1"])
def test_what_a_spreadsheet_takes_for_a_formula_becomes_text(text: str) -> None:
    assert spreadsheet_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "Milk 3.5 %", "a=b", "'quoted", "1-2"])
def test_other_text_is_left_as_it_is(text: str) -> None:
    assert spreadsheet_cell(text) == text


def test_the_confusion_table_holds_no_formula() -> None:
    catalogue = Catalogue(("=1+1", "milk"), (("=1+1",), ("milk",)))
    table = [*confusion_table(ProductReport(confusion=((0, 1, 3), (1, 0, 2))), catalogue)]
    assert table[1:] == [("'=1+1", "milk", 3), ("milk", "'=1+1", 2)]
