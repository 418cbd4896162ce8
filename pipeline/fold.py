"""Exact rewrites: the same function in fewer operations.

In: a `ConvNeXt` and the preprocessing's mean and std. Out: the folded `ConvNeXt`, which takes
pixels in [0, 255], without LayerScale and, behind the stem, without an affine in its LayerNorms
(the stem's writes the residual stream itself, which no single layer reads).

    normalisation -> stem        W' = W / (255 sd)      b' = b - sum W mu / sd
    LayerScale    -> pw2         W' = diag(l) W         b' = l b
    LayerNorm     -> what reads  W' = W diag(gamma)     b' = b + W beta   (2x2: over its four taps)

All are computed in float64 and rounded once. The first is exact because the stem has no padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.convnext import Block, ConvNeXt, Downsample, LayerScale, empty

if TYPE_CHECKING:
    from pipeline.records import Preprocessing

Tensors = dict[str, Tensor]


def fold(model: ConvNeXt, preprocessing: Preprocessing) -> ConvNeXt:
    """Return the folded model; the given one is left as it is.

    Args:
        model: A canonical network, float32 or float64, taking normalised pixels.
        preprocessing: Its mean and std, in units of pixels in [0, 1].

    Returns:
        A network of the model's dtype that takes pixels in [0, 255] and gives the same logits.
    """
    dtype = next(model.parameters()).dtype
    tensors = {name: tensor.to(torch.float64) for name, tensor in model.state_dict().items()}
    _fold_normalisation(tensors, preprocessing)
    _fold_norm(tensors, "head.norm", "head.fc")
    for name, module in model.named_modules():
        if isinstance(module, Downsample):
            _fold_norm(tensors, f"{name}.norm", f"{name}.conv")
        elif isinstance(module, Block):
            _fold_norm(tensors, f"{name}.norm", f"{name}.pw1")
            if isinstance(module.scale, LayerScale):
                _fold_scale(tensors, f"{name}.scale", f"{name}.pw2")
    folded = empty(model.architecture, folded=True).to_empty(device="cpu").to(dtype)
    folded.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()})
    return folded.eval()


def _fold_normalisation(tensors: Tensors, preprocessing: Preprocessing) -> None:
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(preprocessing.std, dtype=torch.float64)[:, None, None]
    weight = tensors["stem.conv.weight"] / std
    tensors["stem.conv.bias"] = tensors["stem.conv.bias"] - (weight * mean).sum(dim=(1, 2, 3))
    tensors["stem.conv.weight"] = weight / 255


def _fold_norm(tensors: Tensors, norm: str, reader: str) -> None:
    gamma, beta = tensors.pop(f"{norm}.weight"), tensors.pop(f"{norm}.bias")
    weight = tensors[f"{reader}.weight"]
    across = (1, -1, *[1] * (weight.ndim - 2))
    summed = (weight * beta.reshape(across)).flatten(1).sum(dim=1)
    tensors[f"{reader}.bias"] = tensors[f"{reader}.bias"] + summed
    tensors[f"{reader}.weight"] = weight * gamma.reshape(across)


def _fold_scale(tensors: Tensors, scale: str, writer: str) -> None:
    factor = tensors.pop(f"{scale}.weight")
    tensors[f"{writer}.weight"] = tensors[f"{writer}.weight"] * factor[:, None]
    tensors[f"{writer}.bias"] = tensors[f"{writer}.bias"] * factor
