"""What is remembered of a tensor while the data streams by.

In: one batch after another. Out: a `Range`. Memory does not grow with the number of images.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.errors import DataError
from pipeline.records import Range

if TYPE_CHECKING:
    from torch import Tensor


class RangeObserver:
    """The least and the greatest value of all batches."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.minimum = math.inf
        self.maximum = -math.inf
        self.count = 0

    def observe(self, x: Tensor) -> None:
        """Take in one batch of any shape.

        Raises:
            DataError: The batch holds NaN or infinities.
        """
        # Channels-last tensors are contiguous only in this order, and a copy costs a pass.
        low, high = (float(value) for value in x.movedim(1, -1).aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                f"site {self.site} took values from {low} to {high} while calibrating",
                allowed="finite activations",
                do="Check the checkpoint's weights and the mean and std",
            )
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.count += x.numel()

    def result(self) -> Range:
        """Return what was seen."""
        return Range(minimum=self.minimum, maximum=self.maximum, count=self.count)
