"""Forms of the canonical network that other tools take; all compute what it computes.

In: a `ConvNeXt` that is not folded. Out: the same function as a torch module laid out as published,
without LayerScale, or in TensorFlow's ops.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn import functional

from pipeline import convnext
from pipeline.convnext import GRN_EPS, Block, ConvNeXt, LayerScale, empty

if TYPE_CHECKING:
    from collections.abc import Callable

CONTAINERS = (
    nn.Sequential,
    *(ConvNeXt, convnext.Stem, convnext.Stage, convnext.Downsample, Block, convnext.Head),
)
"""The modules that a trace looks into."""


class PublishedBlock(nn.Module):
    """A block as the published networks compute it: channels last between two permutations.

    The canonical block moves the channels around every layer. A float runtime cancels that; tools
    that put quantizers in between cannot, so an export of it would be slower than a user's.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the branch to the residual stream; (N, C, H, W) to the same."""
        block, norm = self.block, self.block.norm
        y = block.depthwise(x).permute(0, 2, 3, 1)
        y = functional.layer_norm(y, norm.shape, norm.weight, norm.bias, norm.eps)
        y = block.gelu(functional.linear(y, block.pw1.weight, block.pw1.bias))
        if isinstance(block.grn, convnext.ResponseNorm):
            response = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
            relative = response / (response.mean(dim=-1, keepdim=True) + GRN_EPS)
            y = y + y * relative * block.grn.weight + block.grn.bias
        y = functional.linear(y, block.pw2.weight, block.pw2.bias)
        if isinstance(block.scale, LayerScale):
            y = y * block.scale.weight
        return x + y.permute(0, 3, 1, 2)


def as_published(network: ConvNeXt) -> ConvNeXt:
    """Return the network, changed in place, with its blocks in the published form."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Block):
            network.set_submodule(name, PublishedBlock(module))
    return network


def without_layer_scale(network: ConvNeXt) -> ConvNeXt:
    """Return the same function with each LayerScale multiplied into the layer before it."""
    tensors = dict(network.state_dict())
    for name, block in network.named_modules():
        if isinstance(block, Block) and isinstance(block.scale, LayerScale):
            factor = tensors.pop(f"{name}.scale.weight")
            tensors[f"{name}.pw2.weight"] = torch.diag(factor) @ tensors[f"{name}.pw2.weight"]
            tensors[f"{name}.pw2.bias"] = factor * tensors[f"{name}.pw2.bias"]
    plain = empty(replace(network.architecture, layer_scale=False)).to_empty(device="cpu")
    plain.load_state_dict(tensors)
    return plain.eval()


def tensorflow_function(network: ConvNeXt) -> Callable[[Any], Any]:
    """Return the network as a function of an NHWC tensor of TensorFlow."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return not isinstance(m, CONTAINERS)

    class InTensorFlow(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return tensorflow_op(network.get_submodule(target), args[0])

    return InTensorFlow(network, graph=Tracer().trace(network)).run


def tensorflow_op(module: Any, x: Any) -> Any:
    """Compute one module on a channels-last tensor.

    Raises:
        NotImplementedError: The module has no translation here.
    """
    tf: Any = import_module("tensorflow")
    values: dict[str, Any] = {
        name: p.detach().numpy() for name, p in module.named_parameters(recurse=False)
    }
    weight: Any
    weight, bias = values.get("weight"), values.get("bias", 0)
    match type(module).__name__:
        case "Identity" | "Site":
            return x
        case "Conv2d" if module.groups > 1:
            # A depthwise one: odd, of stride 1 and padded by half.
            return tf.nn.depthwise_conv2d(x, weight.transpose(2, 3, 0, 1), [1] * 4, "SAME") + bias
        case "Conv2d":
            sides = [[pad, pad] for pad in module.padding]
            x = tf.pad(x, [[0, 0], *sides, [0, 0]]) if any(module.padding) else x
            return tf.nn.conv2d(x, weight.transpose(2, 3, 1, 0), module.stride, "VALID") + bias
        case "Pointwise":
            return tf.tensordot(x, weight.T, 1) + bias
        case "ChannelNorm":
            mean, variance = tf.nn.moments(x, [-1], keepdims=True)
            return (x - mean) * tf.math.rsqrt(variance + module.eps) * weight + bias
        case "GELU":
            return tf.nn.gelu(x, approximate=False)
        case "GlobalMean":
            return tf.reduce_mean(x, [1, 2])
        case "LayerScale":
            return x * weight
        case "ResponseNorm":
            response = tf.sqrt(tf.reduce_sum(tf.square(x), [1, 2], keepdims=True))
            mean = tf.reduce_mean(response, -1, keepdims=True)
            return x + x * (response / (mean + GRN_EPS)) * weight + bias
    msg = f"{type(module).__name__} has no form in TensorFlow here"
    raise NotImplementedError(msg)
