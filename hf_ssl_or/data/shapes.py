"""A built-in image set: ten shapes in any pose, color and light, rendered by formula, so that nothing is downloaded.

The class is in the outline alone. Everything else is nuisance: pixels hardly tell the class (nearest neighbors on raw
pixels fail), but an encoder that learns what crops, flips and color changes of an image share finds it. Each shape is
a signed distance (in units of its radius, negative inside), which gives smooth edges at any size. Image i depends on
(seed, i) alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hf_ssl_or.randomness import hashed_seed

# Strength of the nuisances; lengths are shares of the image's side.
RADIUS = (0.24, 0.39)
SHIFT = 0.15  # largest distance of the center from the image's, along each axis
CONTRAST = (0.35, 0.75)  # difference of gray between shape and background
TINT = 0.35  # spread of colors around gray
GRADIENT = 0.06  # change of the background's light across the image
TEXTURE = 0.03  # amplitude of stripes, of their own in shape and background
TEXTURE_PERIOD = (0.12, 0.4)
NOISE = 0.03  # standard deviation per pixel
SPAN = 0.75  # share of the range that the image is rendered in at last, so that few colors are cut off

_BLOCK = 500  # images rendered together

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


class ShapesSource:
    """`n` images of the set.

    Args:
        n: How many.
        seed: Which; images of two seeds have nothing in common.
        size: Side in pixels.
    """

    def __init__(self, n: int, seed: int, size: int = 32) -> None:
        self.name, self.fingerprint = "shapes", f"shapes-2/{seed}/{n}/{size}"
        blocks = [_render_block(seed, block, size) for block in range(-(-n // _BLOCK))]
        self._images_NHW3 = np.concatenate([images for images, _ in blocks])[:n]
        self.labels: np.ndarray | None = np.concatenate([labels for _, labels in blocks])[:n]
        self.class_names: list[str] | None = list(SHAPES)

    def __len__(self) -> int:
        return len(self._images_NHW3)

    def read(self, i: int) -> np.ndarray:
        """Returns image i: uint8, (H, W, 3)."""
        return self._images_NHW3[i]

    def describe(self, i: int) -> str:
        """Returns what messages call image i."""
        return f"image {i} of the built-in shapes"


def _render_block(seed: int, block: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(hashed_seed("shapes", seed, block)))
    labels_N = rng.permutation(_BLOCK) % len(SHAPES)
    inside_NHW = _render_outlines(rng, labels_N, size)[..., None]
    back_N3, fore_N3 = _sample_colors(rng)
    light_NHW = _render_waves(rng, size, (1.5, 3.0))  # less than a period: a gradient
    back = back_N3[:, None, None] + GRADIENT * light_NHW[..., None]
    back = back + TEXTURE * _render_waves(rng, size, TEXTURE_PERIOD)[..., None]
    fore = fore_N3[:, None, None] + TEXTURE * _render_waves(rng, size, TEXTURE_PERIOD)[..., None]
    images = back + inside_NHW * (fore - back)
    images += NOISE * rng.standard_normal(images.shape, dtype=np.float32)
    images = 0.5 + SPAN * (images - 0.5)
    return (images * 255).round().clip(0, 255).astype(np.uint8), labels_N.astype(np.int64)


def _render_outlines(rng: np.random.Generator, labels_N: np.ndarray, size: int) -> np.ndarray:
    """Returns the share of each pixel that is inside its image's shape, (N, H, W)."""
    n = len(labels_N)
    angle, radius = rng.uniform(0, 2 * np.pi, n), rng.uniform(*RADIUS, n)
    center = rng.uniform(0.5 - SHIFT, 0.5 + SHIFT, (2, n))
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    dx, dy = ((grid - c[:, None]) / radius[:, None] for c in center)
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    x_NHW = (cos * dx[:, None, :] + sin * dy[:, :, None]).astype(np.float32)
    y_NHW = (cos * dy[:, :, None] - sin * dx[:, None, :]).astype(np.float32)
    inside = np.empty_like(x_NHW)
    for label, distance in enumerate(SHAPES.values()):
        which = labels_N == label
        pixels = distance(x_NHW[which], y_NHW[which]) * (radius[which, None, None] * size)
        inside[which] = (0.5 - pixels).clip(0, 1)
    return inside


def _sample_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Samples background and shape colors that differ in gray by a wanted contrast, either way: (N, 3) each."""
    contrast = rng.uniform(*CONTRAST, (_BLOCK, 1))
    dark = rng.uniform(0.1, 0.9 - contrast)
    swap = rng.random((_BLOCK, 1)) < 0.5
    back, fore = np.where(swap, dark + contrast, dark), np.where(swap, dark, dark + contrast)
    tints = rng.uniform(-TINT, TINT, (2, _BLOCK, 3))
    return (back + tints[0]).astype(np.float32), (fore + tints[1]).astype(np.float32)


def _render_waves(rng: np.random.Generator, size: int, period: tuple[float, float]) -> np.ndarray:
    """Renders a plane wave per image, in any direction, values in [-1, 1]: (N, H, W)."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, _BLOCK, 1, 1)).astype(np.float32)
    turns = (2 * np.pi / rng.uniform(*period, (_BLOCK, 1, 1))).astype(np.float32)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.sin(turns * (np.cos(angle) * grid + np.sin(angle) * grid[:, None]) + phase)


# ---------------------------------------------------------------------------------------------------------------------
# Signed distances, exact at the edges, for a shape of radius about 1 around the origin


def _disk(x: np.ndarray, y: np.ndarray, center: tuple[float, float] = (0, 0), radius: float = 0.85) -> np.ndarray:
    return np.hypot(x - center[0], y - center[1]) - radius


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.72) - 0.22


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.75, 0.75)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * 0.866 + y * 0.5, -y) - 0.5


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: the plane folded into one tenth, where a point's edge is a line."""
    turn = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, y) + turn, 2 * turn) - turn)
    radius = np.hypot(x, y)
    px, py = radius * np.sin(angle), radius * np.cos(angle)
    edge = np.array([0.42 * np.sin(turn), 0.42 * np.cos(turn) - 1.05])  # from the tip (0, 1.05) to the notch
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return px * normal[0] + (py - 1.05) * normal[1]


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95))


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_disk(x, y, radius=0.95), -_disk(x, y, (0.45, 0), 0.75))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner with a disk on each upper side."""
    square = (np.abs(x) + np.abs(y + 0.1)) * 0.7071 - 0.55
    disk = _disk(np.abs(x), y, (0.389, 0.289), 0.55)
    return np.minimum(square, disk)


def _bars(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.9, 0.17), _box(x, np.abs(y) - 0.65, 0.9, 0.17))


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_disk(x, y, (0, 0.65), 0.36), _disk(np.abs(x), y, (0.56, -0.33), 0.36))


SHAPES: dict[str, Distance] = {
    "disk": _disk,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "bars": _bars,
    "dots": _dots,
}
