"""The pictures of the page in the documentation. `FEDSHELF_SCREENSHOTS=docs/images` writes them there."""

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from fedshelf.data.demo_products import PRODUCTS
from fedshelf.data.demo_scene import LOOKS, draw_photo
from tests.e2e.browser.conftest import OpenTab, StartTill
from tests.edge_models import info, write_color_model

pytestmark = [pytest.mark.browser, pytest.mark.e2e]

PATHS = (
    "Spreads/Honey", "Oils/Olive oil", "Dairy/Whole milk", "Spreads/Berry jam", "Drinks/Lemonade", "Drinks/Oat drink",
)  # fmt: skip
LABELS = [path.rpartition("/")[2] for path in PATHS]
MAX_BYTES = 80_000
PHONE, COUNTER = {"width": 390, "height": 844}, {"width": 1100, "height": 640}


def drawn_photo() -> bytes:
    """A jar of honey, drawn."""
    (honey,) = [product for product in PRODUCTS if product.name == "Honey"]
    picture = draw_photo(honey, honey.colors[0], LOOKS[0], 640, np.random.default_rng(7))
    return bytes(simplejpeg.encode_jpeg(picture, quality=92))


def keep(page: Any, name: str, folder: Path) -> Path:
    """Write a screenshot, with 128 colors."""
    out = Path(os.environ.get("FEDSHELF_SCREENSHOTS") or folder) / f"edge-{name}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    page.evaluate("window.scrollTo(0, 0)")
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out


@pytest.mark.parametrize(
    ("name", "threshold", "size", "language", "scheme"),
    [
        ("phone", 0.5, PHONE, "en-US", "light"), ("phone-dark", 0.8, PHONE, "en-US", "dark"),
        ("phone-zh", 0.8, PHONE, "zh-CN", "light"), ("counter-zh-dark", 0.5, COUNTER, "zh-CN", "dark"),
        ("counter", 0.8, COUNTER, "en-US", "light"),
    ],
)  # fmt: skip
def test_screenshots_are_small_and_show_the_answer(
    start_till: StartTill, open_tab: OpenTab, tmp_path: Path, name: str, threshold: float, size: dict[str, int],
    language: str, scheme: str,
) -> None:  # fmt: skip
    till = start_till(model=write_color_model(tmp_path / "s.onnx", info(LABELS, PATHS, threshold=threshold)))
    tab = open_tab(till.url, language=language, color_scheme=scheme, **size)
    tab.choose(drawn_photo())
    tab.shows("#guesses .product >> nth=0", "Honey")
    if threshold > 0.5:
        tab.shows("#folder", re.compile("Spreads"))
        tab.page.click("#wrong-button")
        tab.page.fill("#product-input", "Berry jam")
    assert keep(tab.page, name, tmp_path).stat().st_size < MAX_BYTES
