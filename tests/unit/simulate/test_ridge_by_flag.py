"""`--algorithm ridge` from photos in folders: what stores compute together is what one of them computes with all."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedshelf.core.events import RunStatus
from fedshelf.simulate.engine import simulate
from fedshelf.tracking.queries import run_summary
from tests.unit.simulate.test_simulation import SIZE, config, final, stores

__all__ = ["stores"]
EXACT = {"algorithm": "ridge", "train": "head", "ridge_lambda": 0.02, "test_dir": None}


def in_one_place(stores: Path) -> Path:
    """The photos of all stores in one."""
    for photo in sorted(stores.glob("*/*/*")):
        folder = Path("together") / "all" / photo.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / f"{photo.parent.parent.name}-{photo.name}")
    return Path("together")


def head(name: str, stores: Path, **values: object) -> torch.Tensor:
    status, directory = simulate(
        config(data_dir=stores, run_dir=Path(name), **{**EXACT, "rounds": 1, "val_fraction": 0.0, **values})
    )
    assert status is RunStatus.FINISHED
    return final(directory)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_three_stores_get_the_head_of_all_their_photos(stores: Path, num_workers: int) -> None:
    one, three = head("one", in_one_place(stores), min_clients=1), head("three", stores, workers=num_workers)
    torch.testing.assert_close(three, one, rtol=0, atol=1e-4)


def test_photos_added_to_a_folder_count_in_an_extended_run(stores: Path) -> None:
    before = head("three", stores)
    for number in range(5):
        pixels = np.full((SIZE, SIZE, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(next((stores / "oslo").iterdir()) / f"new-{number}.png")
    after, one = head("three", stores, extend=1), head("one", in_one_place(stores), min_clients=1)
    assert not torch.allclose(after, before, rtol=0, atol=1e-3)
    torch.testing.assert_close(after, one, rtol=0, atol=1e-4)


def test_the_newest_head_is_the_best_one(stores: Path) -> None:
    """An earlier one is not better: it is the head of other photos."""
    run = Path("three")
    for extend in (0, 1):
        head("three", stores, extend=extend, val_fraction=0.2)
    newest, best = ((run / folder / "model.safetensors").read_bytes() for folder in ("model", "model/best"))
    assert newest == best


def test_results_by_product_are_of_a_model_that_has_not_seen_the_photos(tmp_path: Path) -> None:
    """Photos of noise, fewer than features: what has seen one knows its product, and what has not must guess."""
    draw = np.random.default_rng(1)
    for number in range(36):
        folder = tmp_path / "noise" / f"store-{number % 3}" / f"product-{number // 3 % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / f"{number}.png")
    given = {**EXACT, "rounds": 1, "val_fraction": 0.3, "ridge_lambda": 1e-4, "model": "resnet10", "width": 16}
    _, directory = simulate(config(data_dir=tmp_path / "noise", run_dir=tmp_path / "run", **given))
    summary = run_summary(directory.path)
    counts = summary.results.products
    total, correct = (sum(getattr(count, key) for count in counts) for key in ("total", "correct"))
    assert summary.rounds[-1].accuracy == pytest.approx(correct / total)
    assert correct < total
    assert summary.results.levels[-1].accuracy == pytest.approx(correct / total)
