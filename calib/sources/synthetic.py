"""Images out of nothing, for calibration without data.

In: nothing. Out: 1,024 images of 96x96 as PNG files: overlapping discs of many sizes on a smooth
ground ("dead leaves"), which have the edges and the spectrum of photographs. What a LayerNorm
writes hardly depends on the image; what stands in front of the first one, and GELU's tails, do.

Source: Lee, Mumford, Huang, "Occlusion Models for Natural Images", 2001.
"""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING

import numpy as np

from calib.sources.base import UNLABELLED, Labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

IMAGES, SIDE = 1024, 96
DISCS = 60
SMALLEST, LARGEST = 3.0, 60.0
"""Radii, in pixels; as many per octave everywhere."""


class Synthetic:
    """Seeded images without labels; the word `none` on the command line."""

    label = "none"
    sequential = False
    own_labels = False
    skipped: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the names of all images, sorted."""
        return [f"{i:04d}.png" for i in range(IMAGES)]

    def labels(self, names: Sequence[str], depth: int) -> Labels:
        """Return none: these images show nothing."""
        return UNLABELLED

    def read(self, name: str) -> bytes:
        """Return one image file's bytes."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(_leaves(zlib.crc32(name.encode()))).save(buffer, "PNG")
        return buffer.getvalue()


def _leaves(seed: int) -> NDArray[np.uint8]:
    """Paint one image: (SIDE, SIDE, 3)."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    canvas = np.broadcast_to(draw.uniform(0, 255, 3), (SIDE, SIDE, 3)).copy()
    radii = np.exp(draw.uniform(np.log(SMALLEST), np.log(LARGEST), DISCS))
    for radius in sorted(radii, reverse=True):
        cy, cx = draw.uniform(-radius, SIDE + radius, 2)
        color = draw.normal(draw.uniform(0, 255), 40, 3)
        slope = draw.normal(0, 40, 2)
        away = np.hypot(y - cy, x - cx)
        shade = ((y - cy) * slope[0] + (x - cx) * slope[1]) / SIDE
        # Two pixels from inside to outside: lenses blur.
        inside = np.clip((radius - away) / 2 + 0.5, 0, 1)[..., None]
        canvas = canvas * (1 - inside) + (color + shade[..., None]) * inside
    low, high = draw.uniform(0, 60), draw.uniform(160, 255)
    contrast = low + np.clip(canvas, 0, 255) * ((high - low) / 255)
    noisy = contrast + draw.normal(0, draw.uniform(0, 6), canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)
