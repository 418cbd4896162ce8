"""One pass over the data gathers what every target needs.

In: the folded network and batches of pixels. Out: a `Range` for every site.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from calib.observers import RangeObserver
from pipeline.convnext import sites
from pipeline.records import Range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.convnext import ConvNeXt


def collect(folded: ConvNeXt, pixels: Iterable[NDArray[np.float32]]) -> dict[str, Range]:
    """Run the network once over the calibration images and observe every site.

    Args:
        folded: The folded network, in eval mode.
        pixels: Batches of shape (N, 3, H, W) in [0, 255].

    Returns:
        Site name to what it held, in the order of the network; nothing where there were no images.

    Raises:
        DataError: A site held NaN or infinities.
    """
    observers = {name: RangeObserver(name) for name, _ in sites(folded)}

    def hook(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def observe(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            observers[name].observe(output)

        return observe

    handles = [site.register_forward_hook(hook(name)) for name, site in sites(folded)]
    try:
        with torch.inference_mode():
            for batch in pixels:
                folded(torch.from_numpy(batch).contiguous(memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()
    return {name: observer.result() for name, observer in observers.items() if observer.count}


def merge(parts: Sequence[Mapping[str, Range]]) -> dict[str, Range]:
    """Return what all processes saw together, from what each saw of its own images.

    Args:
        parts: What `collect` returned, for the same network; one at least of some images.
    """
    parts = [part for part in parts if part]
    return {
        name: Range(
            minimum=min(part[name].minimum for part in parts),
            maximum=max(part[name].maximum for part in parts),
            count=sum(part[name].count for part in parts),
        )
        for name in parts[0]
    }
