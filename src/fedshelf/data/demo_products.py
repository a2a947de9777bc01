"""The packages of the demo set, drawn flat: six shapes, four label patterns, and shared colors.

A product is a shape *and* a pattern. Each shape and each pattern belongs to several products and each color to all, so
no single cue identifies a product. Everything here is synthetic and resembles no real brand.

Shapes: a package is an RGBA image uint8 [HEIGHT, WIDTH, 4], transparent around it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 128, 192

Color = tuple[int, int, int]
Points = list[tuple[float, float]]

# Ground and print of a label. A product comes in several of these, like the flavors of a brand.
COLORS: tuple[tuple[Color, Color], ...] = (
    ((196, 40, 45), (245, 235, 215)),
    ((38, 88, 170), (250, 215, 70)),
    ((46, 125, 60), (240, 245, 235)),
    ((240, 190, 50), (120, 40, 30)),
    ((235, 235, 230), (30, 90, 150)),
    ((110, 60, 130), (240, 200, 220)),
    ((225, 120, 40), (40, 60, 50)),
    ((60, 60, 65), (215, 185, 120)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """The appearance of a class of the demo set.

    Attributes:
        name: the class.
        shape: shape of the package.
        pattern: pattern of the label.
        colors: indices into `COLORS`.
    """

    name: str
    shape: str
    pattern: str
    colors: tuple[int, ...]


PRODUCTS: tuple[Product, ...] = (
    Product(name="Oat-Flakes", shape="box", pattern="disc", colors=(0, 1, 3, 4)),
    Product(name="Crackers", shape="box", pattern="diagonal", colors=(1, 2, 6, 7)),
    Product(name="Whole-Milk", shape="carton", pattern="bands", colors=(4, 1, 2, 0)),
    Product(name="Oat-Drink", shape="carton", pattern="dots", colors=(3, 4, 5, 2)),
    Product(name="Lemonade", shape="bottle", pattern="disc", colors=(3, 2, 0, 6)),
    Product(name="Olive-Oil", shape="bottle", pattern="bands", colors=(2, 7, 3, 5)),
    Product(name="Tomato-Soup", shape="can", pattern="diagonal", colors=(0, 4, 7, 3)),
    Product(name="Chickpeas", shape="can", pattern="dots", colors=(6, 1, 0, 5)),
    Product(name="Honey", shape="jar", pattern="bands", colors=(3, 6, 4, 7)),
    Product(name="Berry-Jam", shape="jar", pattern="disc", colors=(5, 0, 1, 6)),
    Product(name="Potato-Chips", shape="bag", pattern="diagonal", colors=(0, 3, 5, 2)),
    Product(name="Coffee-Beans", shape="bag", pattern="dots", colors=(7, 6, 1, 4)),
)


def draw_package(product: Product, color: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one package, seen from the front: RGBA uint8 [HEIGHT, WIDTH, 4].

    Args:
        product: the product.
        color: index into `COLORS`.
        rng: varies print and wear slightly.
    """
    ground, mark = (np.clip(np.array(c) + rng.integers(-18, 19, 3), 0, 255) for c in COLORS[color])
    body, label, rounded = _SHAPES[product.shape]()
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:] = ground
    print_area = np.zeros((HEIGHT, WIDTH), np.uint8)
    _PATTERNS[product.pattern](print_area, label, rng)
    window = np.zeros_like(print_area)
    x0, y0, x1, y1 = label
    window[y0:y1, x0:x1] = 255
    image[(print_area & window) > 0] = mark
    _lettering(image, label, ground, mark, rng)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for part, tint in body:
        area = np.zeros_like(mask)
        cv2.fillPoly(area, [np.array(part, np.int32)], 255, cv2.LINE_AA)
        if tint is not None:
            image[area > 127] = tint
        mask = np.maximum(mask, area)
    return np.dstack([_shade(image, rounded, rng), mask])


def _shade(image: NDArray[np.uint8], rounded: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Apply light from one side; `rounded` from 0 (a flat front) to 1 (a cylinder)."""
    across = np.linspace(-1, 1, WIDTH)
    turn = rng.uniform(-0.5, 0.5)
    cylinder = np.sqrt(np.clip(1 - (0.85 * (across - turn * 0.5)) ** 2, 0.05, 1))
    light = (1 - rounded) * (1 + 0.12 * turn * across) + rounded * cylinder
    gloss = rounded * rng.uniform(20, 90) * np.exp(-(((across - turn) / 0.12) ** 2))
    lit = image * light.astype(np.float32)[None, :, None] + gloss.astype(np.float32)[None, :, None]
    shaded: NDArray[np.uint8] = np.clip(lit, 0, 255).astype(np.uint8)
    return shaded


def _lettering(
    image: NDArray[np.uint8], label: tuple[int, int, int, int], ground: NDArray[np.int64], mark: NDArray[np.int64],
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Draw a bar with strokes, which looks like a brand name and is the same on all products."""
    x0, y0, x1, y1 = label
    top = y0 + int((y1 - y0) * rng.uniform(0.02, 0.1))
    bottom = top + int((y1 - y0) * 0.16)
    image[top:bottom, x0:x1] = (ground * 0.55 + mark * 0.1).astype(np.uint8)
    for x in range(x0 + 10, x1 - 8, 9):
        if rng.random() < 0.85:
            image[top + 4 : bottom - 4, x : x + int(rng.integers(3, 7))] = mark


# --- shapes: parts (polygon, tint or None for the print), label rectangle (x0, y0, x1, y1), roundness -----------------

Blob = list[tuple[Points, Color | None]]
Shape = tuple[Blob, tuple[int, int, int, int], float]


def _box() -> Shape:
    front: Points = [(14, 12), (104, 12), (104, 184), (14, 184)]
    side: Points = [(104, 12), (120, 22), (120, 176), (104, 184)]
    return [(front, None), (side, (120, 110, 100))], (14, 30, 104, 176), 0.0


def _carton() -> Shape:
    front: Points = [(24, 60), (104, 60), (104, 186), (24, 186)]
    roof: Points = [(24, 60), (104, 60), (90, 26), (38, 26)]
    ridge: Points = [(38, 26), (90, 26), (90, 10), (38, 10)]
    return [(front, None), (roof, (205, 205, 200)), (ridge, (235, 235, 230))], (24, 68, 104, 180), 0.0


def _bottle() -> Shape:
    left: Points = [(38, 186), (32, 178), (32, 92), (40, 74), (54, 56), (54, 28)]
    body = left + [(WIDTH - x, y) for x, y in reversed(left)]
    glass: Points = [(38, 78), (54, 56), (54, 28), (74, 28), (74, 56), (90, 78)]
    cap: Points = [(51, 8), (77, 8), (77, 30), (51, 30)]
    return [(body, None), (glass, (150, 175, 160)), (cap, (70, 70, 75))], (32, 90, 96, 176), 0.9


def _can() -> Shape:
    arc = [(64 + 46 * np.cos(a), 30 + 12 * np.sin(a)) for a in np.linspace(np.pi, 2 * np.pi, 12)]
    low = [(64 + 46 * np.cos(a), 166 + 12 * np.sin(a)) for a in np.linspace(0, np.pi, 12)]
    rim = [(64 + 46 * np.cos(a), 30 + 12 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 24)]
    return [(arc + low, None), (rim, (190, 190, 195))], (18, 44, 110, 166), 0.9


def _jar() -> Shape:
    body: Points = [(30, 64), (98, 64), (112, 82), (112, 170), (102, 184), (26, 184), (16, 170), (16, 82)]
    lid: Points = [(26, 34), (102, 34), (102, 64), (26, 64)]
    return [(body, None), (lid, (200, 175, 90))], (16, 84, 112, 172), 0.8


def _bag() -> Shape:
    top = [(12 + i * 8, 12 + (i % 2) * 6) for i in range(14)]
    bottom = [(116 - i * 8, 186 - (i % 2) * 6) for i in range(14)]
    right: Points = [(120, 50), (114, 98), (120, 146)]
    left: Points = [(8, 146), (14, 98), (8, 50)]
    seam: Points = [(12, 12), (116, 12), (116, 24), (12, 24)]
    return [([*top, *right, *bottom, *left], None), (seam, (170, 170, 175))], (10, 34, 118, 170), 0.45


_SHAPES: dict[str, Callable[[], Shape]] = {
    "box": _box, "carton": _carton, "bottle": _bottle, "can": _can, "jar": _jar, "bag": _bag,
}  # fmt: skip

# --- patterns: the print on the label ---------------------------------------------------------------------------------

Label = tuple[int, int, int, int]


def _disc(area: NDArray[np.uint8], label: Label, rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = label
    radius = int((x1 - x0) * rng.uniform(0.28, 0.38))
    center = ((x0 + x1) // 2 + int(rng.integers(-4, 5)), int(y0 + (y1 - y0) * rng.uniform(0.52, 0.64)))
    cv2.circle(area, center, radius, 255, -1)
    cv2.circle(area, center, int(radius * 0.45), 0, -1)


def _bands(area: NDArray[np.uint8], label: Label, rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = label
    count = 3
    pitch = (y1 - y0) * 0.72 / count
    for i in range(count):
        top = y0 + (y1 - y0) * 0.26 + i * pitch + rng.uniform(-2, 2)
        cv2.rectangle(area, (x0, int(top)), (x1, int(top + pitch * 0.5)), 255, -1)


def _diagonal(area: NDArray[np.uint8], label: Label, rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = label
    pitch = int(rng.integers(34, 42))
    for x in range(x0 - (y1 - y0), x1 + pitch, pitch):
        shift = x + int(rng.integers(0, 4))
        cv2.line(area, (shift, y1), (shift + (y1 - y0), y0), 255, pitch // 2)


def _dots(area: NDArray[np.uint8], label: Label, rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = label
    pitch = int(rng.integers(26, 32))
    for row, y in enumerate(range(y0 + int((y1 - y0) * 0.3), y1, pitch)):
        for x in range(x0 + 12 + (row % 2) * pitch // 2, x1, pitch):
            cv2.circle(area, (x, y), pitch // 3, 255, -1)


_PATTERNS: dict[str, Callable[[NDArray[np.uint8], Label, np.random.Generator], None]] = {
    "disc": _disc, "bands": _bands, "diagonal": _diagonal, "dots": _dots,
}  # fmt: skip
