"""What is remembered of a tensor while the data streams by.

In: one batch after another. Out: a `ChannelRange`. Memory does not grow with the number of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRange:
    """The least and the greatest value of every channel: float32 (C,) each."""

    minimum: Tensor
    maximum: Tensor

    def union(self, other: ChannelRange) -> ChannelRange:
        """Return what both saw."""
        return ChannelRange(
            minimum=torch.minimum(self.minimum, other.minimum),
            maximum=torch.maximum(self.maximum, other.maximum),
        )


class ChannelObserver:
    """The least and the greatest value of every channel over all batches."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.result: ChannelRange | None = None

    def observe(self, x: Tensor) -> None:
        """Take in one batch, (N, C, H, W) or (N, C).

        Raises:
            DataError: The batch holds NaN or infinities.
        """
        # Channels-last tensors are contiguous only in this order, and a copy costs a pass.
        rows = x.movedim(1, -1).flatten(0, -2)
        seen = ChannelRange(minimum=rows.amin(dim=0), maximum=rows.amax(dim=0))
        low, high = float(seen.minimum.min()), float(seen.maximum.max())
        if not (torch.isfinite(seen.minimum).all() and torch.isfinite(seen.maximum).all()):
            raise DataError(
                f"site {self.site} took values from {low} to {high} while calibrating",
                allowed="finite activations",
                do="Check the checkpoint's weights and the mean and std",
            )
        self.result = seen if self.result is None else self.result.union(seen)
