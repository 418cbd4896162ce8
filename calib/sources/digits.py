"""scikit-learn's scanned digits as a source that is always there.

In: nothing. Out: 1,797 images of 8x8 as PNG files in train/ and val/, split once and for all.
"""

from __future__ import annotations

import functools
import io
import random
from typing import TYPE_CHECKING

from calib.sources.base import Labels, class_folders

if TYPE_CHECKING:
    from collections.abc import Sequence

EVALUATION = 540
SEED = 20


class Digits:
    """scikit-learn's 1,797 scanned digits as 8x8 PNG files in train/ and val/."""

    label = "digits"
    sequential = False
    own_labels = False
    skipped: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the names of all images, sorted."""
        return sorted(_files())

    def labels(self, names: Sequence[str], depth: int) -> Labels:
        """Return each image's folder, which is its digit."""
        return class_folders(names, depth, self.label)

    def read(self, name: str) -> bytes:
        """Return one image file's bytes."""
        return _files()[name]


@functools.cache
def _files() -> dict[str, bytes]:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.images)))
    random.Random(SEED).shuffle(order)
    held_out = set(order[:EVALUATION])
    files = {}
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        buffer = io.BytesIO()
        # Sixteen grey levels; 255 / 16 a level puts white at white.
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(buffer, "PNG")
        split = "val" if i in held_out else "train"
        files[f"{split}/{label}/{i:04d}.png"] = buffer.getvalue()
    return files
