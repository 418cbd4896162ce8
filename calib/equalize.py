"""LayerNorm-aware rescaling: which channel-wise shifts and scales a site may take.

In: where a site's channels lie. Out: candidates, the identity always among them. What writes a
site divides by the scale and what reads it multiplies, so the function stays what it was:

    behind a LayerNorm     gamma' = 1 / s, beta' = -z / s      W' = W diag(s), b' = b + W z
    behind a layer         its rows / s (the integers stay)    a multiplication by s in front of
                                                               the LayerNorm or the addition
    in the residual stream all that a stage adds to it / s     depthwise rows * s, and one
                                                               multiplication by s at its end

A shift is exact only where the reader pads nothing: behind a LayerNorm.

Sources: the general form of RepQ-ViT (Li et al., 2023), Outlier Suppression+ (Wei et al., 2023) and
SmoothQuant (Xiao et al., 2023); the strength is SmoothQuant's alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from calib.grid import Rescaling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from calib.observers import ChannelRange

STRENGTHS = (0.5, 0.75, 1.0)
STREAM_STRENGTHS = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
NARROWEST = 1e-4
"""Of the widest channel's width: a channel that is all but constant is taken for this wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """One way to say where a site's channels lie and how wide they are: float32 (C,) each.

    By their ends nothing is clipped. By their deviations the grid serves what is common, and rare
    values of some channels are clipped: which is better depends on their tails.
    """

    middle: Tensor
    width: Tensor


def widths(x: Tensor, seen: ChannelRange, *, shifts: bool) -> tuple[Widths, Widths]:
    """Return the widths of a site's channels by their ends, and by their deviations.

    Args:
        x: The site's tensor on a sample of images, (N, C, ...).
        seen: What the channels held over all images.
        shifts: Whether the middle may be moved to 0; otherwise widths are taken from 0.
    """
    rows = x.movedim(1, 0).flatten(1)
    middle = (seen.minimum + seen.maximum) / 2 if shifts else torch.zeros(len(rows))
    mean = rows.mean(dim=1) if shifts else torch.zeros(len(rows))
    deviation = (rows - mean[:, None]).square().mean(dim=1).sqrt()
    return (
        Widths(middle=middle, width=_width(seen.minimum - middle, seen.maximum - middle)),
        Widths(middle=mean, width=deviation),
    )


def rescaling(by: Widths, strength: float) -> Rescaling:
    """Return the rescaling of one strength, its scales' geometric mean 1."""
    return Rescaling(shift=by.middle, scale=_scale(by.width, strength), strength=strength)


def stream_candidates(of_sites: Sequence[ChannelRange]) -> list[Rescaling]:
    """Return the identity and rescalings of a residual stream.

    Args:
        of_sites: What the channels held at every site of one stage that reads or writes it.

    Returns:
        Rescalings by the widest range of each channel at any site, and by their geometric mean.
    """
    ends = torch.stack([_width(seen.minimum, seen.maximum) for seen in of_sites])
    relative = ends / ends.amax(dim=1, keepdim=True).clamp(min=1e-30)
    means = (
        relative.amax(dim=0),
        relative.clamp(min=NARROWEST).log().mean(dim=0).exp(),
    )
    found = [Rescaling.identity(ends.shape[1])]
    for width in means:
        found += [
            Rescaling(shift=torch.zeros_like(width), scale=_scale(width, a), strength=a)
            for a in STREAM_STRENGTHS
        ]
    return found


def spread(seen: ChannelRange, by: Rescaling) -> float:
    """Return the widest channel's range over the median channel's, after a rescaling."""
    width = _width((seen.minimum - by.shift) / by.scale, (seen.maximum - by.shift) / by.scale)
    middle = float(width.median())
    return float(width.max()) / middle if middle > 0 else 1.0


def _width(minimum: Tensor, maximum: Tensor) -> Tensor:
    return torch.maximum(minimum.abs(), maximum.abs())


def _scale(width: Tensor, strength: float) -> Tensor:
    widest = width.max()
    if not widest > 0:
        return torch.ones_like(width)
    floored = width.clamp(min=max(float(widest) * NARROWEST, torch.finfo(width.dtype).tiny))
    return torch.exp(strength * (floored.log() - floored.log().mean()))
