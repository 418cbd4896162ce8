"""Exact rewrites: the same function in fewer operations.

In: a `ConvNeXt` and the preprocessing's mean and std. Out: the folded `ConvNeXt`, which takes
pixels in [0, 255], without LayerScale and, behind the stem, without an affine in its LayerNorms
(the stem's writes the residual stream itself, which no single layer reads).

    normalisation -> stem        W' = W / (255 sd)      b' = b - sum W mu / sd
    GRN's shift   -> pw2                                b' = b + W beta
    LayerScale    -> pw2         W' = diag(l) W         b' = l b
    LayerNorm     -> what reads  W' = W diag(gamma)     b' = b + W beta   (2x2: over its four taps)

All are computed in float64 and rounded once. The first is exact where the stem has no padding; an
overlapping stem pads, so there only sd goes into the weights and the mean stays an operation. A
head that normalises before it pools folds alike: the mean of an affine is the affine of the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.convnext import Block, ConvNeXt, Downsample, LayerScale, ResponseNorm, empty

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
    _fold_normalisation(tensors, preprocessing, padded=model.architecture.stem != "patch")
    _fold_norm(tensors, "head.norm", "head.hidden" if model.architecture.head_width else "head.fc")
    for name, module in model.named_modules():
        if isinstance(module, Downsample):
            _fold_norm(tensors, f"{name}.norm", f"{name}.conv")
        elif isinstance(module, Block):
            _fold_norm(tensors, f"{name}.norm", f"{name}.pw1")
            if isinstance(module.grn, ResponseNorm):
                _fold_shift(tensors, f"{name}.grn.bias", f"{name}.pw2")
            if isinstance(module.scale, LayerScale):
                _fold_scale(tensors, f"{name}.scale", f"{name}.pw2")
    folded = empty(model.architecture, folded=True).to_empty(device="cpu").to(dtype)
    folded.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()})
    return folded.eval()


def _fold_normalisation(tensors: Tensors, preprocessing: Preprocessing, *, padded: bool) -> None:
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    std = torch.tensor(preprocessing.std, dtype=torch.float64)[:, None, None]
    weight = tensors["stem.conv.weight"] / std
    if padded:
        tensors["stem.centre.bias"] = -255 * mean
    else:
        summed = (weight * mean[:, None, None]).sum(dim=(1, 2, 3))
        tensors["stem.conv.bias"] = tensors["stem.conv.bias"] - summed
    tensors["stem.conv.weight"] = weight / 255


def _fold_norm(tensors: Tensors, norm: str, reader: str) -> None:
    _fold_shift(tensors, f"{norm}.bias", reader)
    gamma, weight = tensors.pop(f"{norm}.weight"), tensors[f"{reader}.weight"]
    tensors[f"{reader}.weight"] = weight * _across(gamma, weight.ndim)


def _fold_shift(tensors: Tensors, shift: str, reader: str) -> None:
    weight = tensors[f"{reader}.weight"]
    summed = (weight * _across(tensors.pop(shift), weight.ndim)).flatten(1).sum(dim=1)
    tensors[f"{reader}.bias"] = tensors[f"{reader}.bias"] + summed


def _across(values: Tensor, ndim: int) -> Tensor:
    """Reshape (in,) so that it broadcasts along a weight's second axis."""
    return values.reshape(1, -1, *[1] * (ndim - 2))


def _fold_scale(tensors: Tensors, scale: str, writer: str) -> None:
    factor = tensors.pop(f"{scale}.weight")
    tensors[f"{writer}.weight"] = tensors[f"{writer}.weight"] * factor[:, None]
    tensors[f"{writer}.bias"] = tensors[f"{writer}.bias"] * factor
