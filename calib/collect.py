"""One pass over the data gathers what every target needs.

In: the folded network and batches of pixels. Out: a `ChannelRange` for every site, and the file
they are kept in between stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from calib.observers import ChannelObserver, ChannelRange
from pipeline.convnext import sites
from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.convnext import ConvNeXt

    Statistics = Mapping[str, ChannelRange]
    """Site name to what its channels held."""


def collect(folded: ConvNeXt, pixels: Iterable[NDArray[np.float32]]) -> dict[str, ChannelRange]:
    """Run the network once over the calibration images and observe every site.

    Args:
        folded: The folded network, in eval mode.
        pixels: Batches of shape (N, 3, H, W) in [0, 255].

    Returns:
        Site name to what it held, in the order of the network; nothing where there were no images.

    Raises:
        DataError: A site held NaN or infinities.
    """
    observers = {name: ChannelObserver(name) for name, _ in sites(folded)}

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
    return {name: seen.result for name, seen in observers.items() if seen.result is not None}


def merge(parts: Sequence[Statistics]) -> dict[str, ChannelRange]:
    """Return what all processes saw together, from what each saw of its own images.

    Args:
        parts: What `collect` returned, for the same network; one at least of some images.
    """
    merged: dict[str, ChannelRange] = {}
    for part in parts:
        for name, seen in part.items():
            merged[name] = merged[name].union(seen) if name in merged else seen
    return merged


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write one .safetensors file: `SITE.minimum` and `SITE.maximum`, float32 (C,)."""
    tensors = {}
    for name, seen in statistics.items():
        tensors[f"{name}.minimum"] = seen.minimum.contiguous()
        tensors[f"{name}.maximum"] = seen.maximum.contiguous()
    save_file(tensors, path)


def load_statistics(path: Path) -> dict[str, ChannelRange]:
    """Read what `save_statistics` wrote.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    try:
        tensors = load_file(path)
        names = [name.removesuffix(".minimum") for name in tensors if name.endswith(".minimum")]
        return {
            name: ChannelRange(
                minimum=tensors[f"{name}.minimum"], maximum=tensors[f"{name}.maximum"]
            )
            for name in names
        }
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} holds no statistics ({type(error).__name__})",
            allowed="what the calibrate stage writes",
            do="Delete it and run again",
        ) from error
