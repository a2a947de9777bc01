import json
import shutil
from pathlib import Path

import pytest

from fedshelf.core.errors import DataError
from fedshelf.data.health import check
from fedshelf.data.synthetic_sales import write_synthetic_sales
from tests.unit.data.samples import write_pack, write_photo


def test_a_healthy_folder_has_no_findings(tmp_path: Path) -> None:
    health = check(write_pack(tmp_path, {"A": 12, "B/C": 14}), val_fraction=0)
    assert [(entry.path, entry.train, entry.validation) for entry in health.classes] == [("A", 12, 0), ("B/C", 14, 0)]
    assert health.findings == ()
    assert not health.unusable
    assert not health.duplicates


def test_counts_follow_the_split(tmp_path: Path) -> None:
    health = check(write_pack(tmp_path, {"train/A": 3, "val/A": 2}))
    assert (health.num_train, health.num_validation) == (3, 2)


def test_unusable_photos_are_named_with_their_reason_and_not_counted(tmp_path: Path) -> None:
    write_pack(tmp_path, {"A": 3})
    (tmp_path / "A" / "bad.jpg").write_text("no photo")
    (tmp_path / "A" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    health = check(tmp_path, val_fraction=0)
    assert set(health.unusable) == {"A/bad.jpg", "A/gone.jpg"}
    assert "not a JPEG" in health.unusable["A/bad.jpg"]
    assert (health.classes[0].train, health.classes[0].unusable) == (3, 2)
    assert any("2 photos cannot be used" in finding for finding in health.findings)


def test_copies_are_found_within_a_class_across_classes_and_across_the_split(tmp_path: Path) -> None:
    write_pack(tmp_path, {"train/A": 3, "train/B": 3, "val/A": 1})
    shutil.copy(tmp_path / "train/A/000.png", tmp_path / "train/A/copy.png")
    shutil.copy(tmp_path / "train/A/001.png", tmp_path / "train/B/wrong.png")
    shutil.copy(tmp_path / "train/B/000.png", tmp_path / "val/A/leak.png")
    health = check(tmp_path)
    assert [(d.files, d.classes, d.leaks) for d in health.duplicates] == [
        (("train/A/000.png", "train/A/copy.png"), ("A",), False),
        (("train/A/001.png", "train/B/wrong.png"), ("A", "B"), False),
        (("train/B/000.png", "val/A/leak.png"), ("A", "B"), True),
    ]
    text = " ".join(health.findings)
    assert "one of the labels is wrong: 2 photos" in text
    assert "exact copies of others in their class: 1 photo" in text
    assert "validation, which then looks better than it is: 1 photo" in text


def test_tiny_photos_small_classes_and_imbalance_are_named(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Much": 33, "Little": 3})
    write_photo(tmp_path / "Much" / "tiny.png", 900, 31, 200)
    health = check(tmp_path, val_fraction=0)
    assert health.tiny == ("Much/tiny.png",)
    text = " ".join(health.findings)
    assert "fewer than 10 training photos in 1 class: 'Little'" in text
    assert "11 times" in text
    assert "smaller than 32 pixels on a side: 1 photo" in text


def test_a_class_of_unusable_photos_only_is_named(tmp_path: Path) -> None:
    write_pack(tmp_path, {"A": 12})
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "bad.jpg").touch()
    text = " ".join(check(tmp_path, val_fraction=0).findings)
    assert "no usable training photo in 1 class: 'B'" in text
    assert "only one class" in text


def test_the_report_is_json(tmp_path: Path) -> None:
    health = check(write_pack(tmp_path, {"A": 3}), val_fraction=0)
    content = json.loads(json.dumps(health.to_dict()))
    assert content["classes"] == [{"path": "A", "train": 3, "validation": 0, "unusable": 0, "tiny": 0}]
    assert content["num_train"] == 3


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no photo"):
        check(tmp_path)


def test_a_folder_whose_sales_and_dates_are_in_order_has_no_findings(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Tea": 12, "Milk": 12})
    write_synthetic_sales({"north": tmp_path}, seed=0, gamma=1.0, listed=1.0)
    assert check(tmp_path, val_fraction=0).findings == ()


def test_problems_of_sales_and_dates_are_findings(tmp_path: Path) -> None:
    write_pack(tmp_path, {"Tea": 12, "Milk": 12})
    header = "date,product,units,price\n"

    def findings(rows: str) -> tuple[str, ...]:
        (tmp_path / "sales.csv").write_text(header + rows)
        return check(tmp_path, val_fraction=0).findings

    assert findings("2026-01-05,Tea,3,1\n2026-01-05,Gin,3,1\n") == (
        "sales.csv: 1 row of products that this folder does not have",
        "no date is known for 24 of 24 photos: these are without sales",
    )
    assert "sales.csv has no units of any product in this folder" in findings("2026-01-05,Gin,3,1\n")[0]
    found = findings("5.1.2026,Tea,3,1\n2026-01-05,Tea,x,1\n")
    assert [finding.partition("', ")[2][:6] for finding in found] == ["line 2", "line 3"]
    (tmp_path / "photos.csv").write_text("photo,date\n,2026-01-05\n")
    assert "photos.csv', line 2: the photo is missing" in findings("2026-01-05,Tea,3,1\n")[0]
