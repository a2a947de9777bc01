"""A demo photo: one package on a shelf, its neighbors, the store's light, the camera.

Shapes: S the side of the photo in pixels; photos are uint8 [S, S, 3], RGB.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fedshelf.data.demo_products import HEIGHT, PRODUCTS, WIDTH, Product, draw_package


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """The common appearance of one store's photos.

    Attributes:
        warmth: color shift of the light; above 0 toward red.
        brightness: factor on the light.
        shelf: color of boards and wall.
    """

    warmth: float
    brightness: float
    shelf: tuple[int, int, int]


LOOKS: tuple[Look, ...] = (
    Look(warmth=0.14, brightness=1.0, shelf=(150, 130, 105)),
    Look(warmth=-0.12, brightness=1.15, shelf=(205, 208, 212)),
    Look(warmth=0.03, brightness=0.75, shelf=(95, 98, 105)),
    Look(warmth=-0.04, brightness=1.0, shelf=(170, 175, 150)),
    Look(warmth=0.2, brightness=0.85, shelf=(120, 85, 60)),
)


def draw_photo(product: Product, color: int, look: Look, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one photo: uint8 [S, S, 3].

    Args:
        product: the product shown.
        color: its color variant.
        look: the store's appearance.
        size: S.
        rng: draws everything else.
    """
    canvas = size * 2  # draw large, then shrink for smooth edges
    scene = _shelf(look, canvas, rng)
    for side in (-1, 1):
        if rng.random() < 0.4:
            _place_neighbour(scene, side, rng)
    _place(
        scene, draw_package(product, color, rng),
        height=rng.uniform(0.76, 0.96), x=rng.uniform(0.43, 0.57), y=rng.uniform(0.45, 0.55),
        turn=rng.uniform(-12, 12), lean=rng.uniform(0, 0.1), rng=rng,
    )  # fmt: skip
    if rng.random() < 0.25:
        _occlude(scene, rng)
    return _develop(scene, look, size, rng)


def _shelf(look: Look, canvas: int, rng: np.random.Generator) -> NDArray[np.float32]:
    scene = np.empty((canvas, canvas, 3), np.float32)
    fade = np.linspace(rng.uniform(0.55, 0.9), rng.uniform(0.8, 1.1), canvas, dtype=np.float32)
    scene[:] = np.array(look.shelf, np.float32) * fade[:, None, None] * rng.uniform(0.8, 1.2)
    for _ in range(rng.integers(1, 5)):  # blurred blocks of any color in the background
        x, y = rng.integers(-canvas // 8, canvas, 2)
        width, height = rng.integers(canvas // 8, canvas // 2, 2)
        tone = tuple(float(v) for v in rng.integers(20, 235, 3))
        cv2.rectangle(scene, (int(x), int(y)), (int(x + width), int(y + height)), tone, -1)
    scene = np.asarray(cv2.GaussianBlur(scene, (0, 0), canvas / 60), np.float32)
    board = int(canvas * rng.uniform(0.86, 0.98))
    cv2.rectangle(scene, (0, board), (canvas, board + canvas // 20), tuple(0.6 * c for c in look.shelf), -1)
    return scene


def _place_neighbour(scene: NDArray[np.float32], side: int, rng: np.random.Generator) -> None:
    other = PRODUCTS[rng.integers(len(PRODUCTS))]
    package = draw_package(other, other.colors[rng.integers(len(other.colors))], rng)
    _place(
        scene, package, height=rng.uniform(0.5, 0.9), x=0.5 + side * rng.uniform(0.44, 0.6), y=rng.uniform(0.45, 0.6),
        turn=rng.uniform(-8, 8), lean=rng.uniform(0, 0.1), rng=rng,
    )  # fmt: skip


def _place(
    scene: NDArray[np.float32], package: NDArray[np.uint8], *, height: float, x: float, y: float, turn: float,
    lean: float, rng: np.random.Generator,
) -> None:  # fmt: skip
    """Draw a package into the scene.

    Args:
        scene: changed in place.
        package: RGBA image.
        height: as a share of the scene.
        x: as a share of the scene.
        y: as a share of the scene.
        turn: rotation in degrees.
        lean: how far the corners move (perspective).
        rng: draws the perspective.
    """
    canvas = scene.shape[0]
    scale = height * canvas / HEIGHT
    corners = np.array([(0, 0), (WIDTH, 0), (WIDTH, HEIGHT), (0, HEIGHT)], np.float32)
    centered = (corners - (WIDTH / 2, HEIGHT / 2)) * scale * (rng.uniform(0.8, 1.1), 1.0)
    angle = np.deg2rad(turn)
    turned = centered @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    stray = rng.uniform(-lean, lean, (4, 2)) * WIDTH * scale
    target = (turned + stray + (x * canvas, y * canvas)).astype(np.float32)
    margin = canvas // 10  # for the shadow; nothing changes outside of this window
    x0, y0 = np.clip(np.floor(target.min(0)).astype(int) - margin, 0, canvas)
    x1, y1 = np.clip(np.ceil(target.max(0)).astype(int) + margin, 0, canvas)
    window = scene[y0:y1, x0:x1]
    warp = cv2.getPerspectiveTransform(corners, target - np.array([x0, y0], np.float32))
    placed = np.asarray(cv2.warpPerspective(package, warp, (int(x1 - x0), int(y1 - y0))), np.float32)
    alpha = placed[:, :, 3:] * np.float32(1 / 255)
    cast = np.zeros_like(alpha)
    fall = canvas // 40
    cast[fall:, fall:] = alpha[:-fall, :-fall]
    shadow = np.asarray(cv2.GaussianBlur(cast, (0, 0), canvas / 45))
    window *= (1 - 0.5 * shadow[:, :, None]) * (1 - alpha)
    window += placed[:, :, :3] * alpha


def _occlude(scene: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Draw an object in front: a price tag, a rail, the edge of a cart."""
    canvas = scene.shape[0]
    tone = tuple(float(v) for v in rng.integers(30, 250, 3))
    if rng.random() < 0.5:
        x, y = rng.integers(0, int(canvas * 0.8), 2)
        width, height = (rng.uniform((0.15, 0.1), (0.35, 0.22)) * canvas).astype(int)
        cv2.rectangle(scene, (int(x), int(y)), (int(x + width), int(y + height)), tone, -1)
    else:
        start = (int(rng.integers(0, canvas)), 0)
        end = (int(rng.integers(0, canvas)), canvas)
        cv2.line(scene, start, end, tone, int(canvas * rng.uniform(0.04, 0.1)))


def _develop(scene: NDArray[np.float32], look: Look, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Apply the light of the store and the moment, then the camera's blur and noise."""
    canvas = scene.shape[0]
    warmth = look.warmth + rng.uniform(-0.08, 0.08)
    tint = np.array([1 + warmth, 1.0, 1 - warmth], np.float32)
    direction = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, canvas, dtype=np.float32)
    slope = np.float32(np.cos(direction)) * ramp[None, :] + np.float32(np.sin(direction)) * ramp[:, None]
    light = np.float32(look.brightness * rng.uniform(0.75, 1.25)) * (1 + np.float32(rng.uniform(0, 0.35)) * slope)
    if rng.random() < 0.3:  # shadow of the photographer, or of the shelf above
        light[slope <= rng.uniform(-0.6, 0.6)] *= np.float32(rng.uniform(0.45, 0.75))
    scene = scene * light[:, :, None] * tint
    photo = np.asarray(cv2.resize(scene, (size, size), interpolation=cv2.INTER_AREA))
    photo = np.asarray(cv2.GaussianBlur(photo, (0, 0), rng.uniform(0.3, 0.8)))
    noise = rng.standard_normal(photo.shape, dtype=np.float32) * np.float32(rng.uniform(1, 7))
    noisy: NDArray[np.uint8] = np.clip(photo + noise, 0, 255).astype(np.uint8)
    return noisy
