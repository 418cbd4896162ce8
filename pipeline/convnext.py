"""The canonical ConvNeXt: one network for every dialect, and the table of named sizes.

In: an `Architecture`. Out: a plain `torch.nn.Module` whose tensor names are this project's own
dialect. Every place where a tensor may be quantized is a `Site`, an identity that calibration
observes and the shared graph turns into a quantize/dequantize pair.

Source: Liu et al., "A ConvNet for the 2020s", 2022, section 2 and appendix A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.records import Architecture, Layer, Role

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}


class Site(nn.Identity):
    """A named place where a tensor may be quantized; does nothing by itself."""

    def __init__(self, role: Role) -> None:
        super().__init__()
        self.role = role


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an (N, C, H, W) or (N, C) tensor.

    Args:
        channels: C.
        eps: Added to the variance, as the dialect defines it.
        affine: Whether gamma and beta exist; a folded model has none.
    """

    def __init__(self, channels: int, eps: float, *, affine: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.shape = (channels,)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position over its channels; same shape out."""
        y = functional.layer_norm(x.movedim(1, -1), self.shape, self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)


class Pointwise(nn.Linear):
    """A linear map over the channels of an (N, C, H, W) or (N, C) tensor."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        """Map (N, in, ...) to (N, out, ...)."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class GlobalMean(nn.Module):
    """The mean over height and width: (N, C, H, W) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Average every channel's plane."""
        return x.mean(dim=(2, 3))


class LayerScale(nn.Module):
    """A learned factor per channel on the residual branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (N, C, H, W) per channel."""
        return x * self.weight[:, None, None]


class Stem(nn.Module):
    """Patchify convolution and LayerNorm: (N, in, H, W) to (N, C, H/patch, W/patch).

    This LayerNorm keeps its affine in a folded model: its output is the residual stream itself.
    """

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.image = Site(Role.IMAGE)
        self.conv = nn.Conv2d(net.in_channels, net.dims[0], net.patch, stride=net.patch)
        self.stem_out = Site(Role.STEM_OUT)
        self.norm = ChannelNorm(net.dims[0], net.norm_eps, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the image's patches."""
        y: Tensor = self.norm(self.stem_out(self.conv(self.image(x))))
        return y


class Downsample(nn.Module):
    """LayerNorm and a 2x2 convolution of stride 2: (N, C, H, W) to (N, C', H/2, W/2)."""

    def __init__(self, before: int, after: int, net: Architecture, *, folded: bool) -> None:
        super().__init__()
        self.norm = ChannelNorm(before, net.norm_eps, affine=not folded)
        self.downsample_in = Site(Role.DOWNSAMPLE_IN)
        self.conv = nn.Conv2d(before, after, 2, stride=2)
        self.downsample_out = Site(Role.DOWNSAMPLE_OUT)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the resolution."""
        y: Tensor = self.downsample_out(self.conv(self.downsample_in(self.norm(x))))
        return y


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm, two pointwise maps around a GELU, and the residual.

    The depthwise convolution reads the residual stream through `dw_in`; the stream itself stays
    float, and `res_out` is the branch just before it is added.
    """

    def __init__(self, channels: int, net: Architecture, *, folded: bool) -> None:
        super().__init__()
        hidden = net.expansion * channels
        self.dw_in = Site(Role.DW_IN)
        self.depthwise = nn.Conv2d(
            channels, channels, net.kernel, padding=net.kernel // 2, groups=channels
        )
        self.dw_out = Site(Role.DW_OUT)
        self.norm = ChannelNorm(channels, net.norm_eps, affine=not folded)
        self.ln_out = Site(Role.LN_OUT)
        self.pw1 = Pointwise(channels, hidden)
        self.gelu_in = Site(Role.GELU_IN)
        self.gelu = nn.GELU()
        self.gelu_out = Site(Role.GELU_OUT)
        self.pw2 = Pointwise(hidden, channels)
        has_scale = net.layer_scale and not folded
        self.scale = LayerScale(channels) if has_scale else nn.Identity()
        self.res_out = Site(Role.RES_OUT)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the residual stream; (N, C, H, W) to the same."""
        y = self.ln_out(self.norm(self.dw_out(self.depthwise(self.dw_in(x)))))
        y = self.gelu_out(self.gelu(self.gelu_in(self.pw1(y))))
        branch: Tensor = self.res_out(self.scale(self.pw2(y)))
        return x + branch


class Stage(nn.Module):
    """An optional downsample and the blocks of one resolution."""

    def __init__(self, index: int, net: Architecture, *, folded: bool) -> None:
        super().__init__()
        channels = net.dims[index]
        if index:
            self.downsample: nn.Module = Downsample(
                net.dims[index - 1], channels, net, folded=folded
            )
        else:
            self.downsample = nn.Identity()
        self.blocks = nn.Sequential(
            *(Block(channels, net, folded=folded) for _ in range(net.depths[index]))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage."""
        y: Tensor = self.blocks(self.downsample(x))
        return y


class Head(nn.Module):
    """Global mean, LayerNorm and the classifier: (N, C, H, W) to (N, classes)."""

    def __init__(self, net: Architecture, *, folded: bool) -> None:
        super().__init__()
        self.pool = GlobalMean()
        self.norm = ChannelNorm(net.dims[-1], net.norm_eps, affine=not folded)
        self.head_in = Site(Role.HEAD_IN)
        self.fc = Pointwise(net.dims[-1], net.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        y: Tensor = self.fc(self.head_in(self.norm(self.pool(x))))
        return y


class ConvNeXt(nn.Module):
    """The canonical network.

    Takes float NCHW of shape (N, in_channels, H, W), H and W multiples of `architecture.stride`,
    and returns float logits (N, classes). An ordinary model takes normalised pixels; a folded one
    (`pipeline.fold`) takes pixels in [0, 255], has no LayerScale and, behind
    the stem, no affine in its LayerNorms.
    """

    def __init__(self, architecture: Architecture, *, folded: bool = False) -> None:
        super().__init__()
        self.architecture = architecture
        self.folded = folded
        self.stem = Stem(architecture)
        self.stages = nn.Sequential(
            *(Stage(i, architecture, folded=folded) for i in range(len(architecture.depths)))
        )
        self.head = Head(architecture, folded=folded)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        logits: Tensor = self.head(self.stages(self.stem(image)))
        return logits


def empty(architecture: Architecture, *, folded: bool = False) -> ConvNeXt:
    """Return the network on the meta device: names and shapes, no memory, no values."""
    with torch.device("meta"):
        return ConvNeXt(architecture, folded=folded).eval()


def seeded(architecture: Architecture, seed: int) -> ConvNeXt:
    """Return the network with reproducible random weights, in eval mode.

    Weights are drawn as in training from scratch (truncated normal, sd 0.02), while LayerScale,
    gamma and beta get spread-out values, so that every fold and every fusion has work to do.
    """
    generator = torch.Generator().manual_seed(seed)
    model = empty(architecture).to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim > 1:
                nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
            else:
                centre = 0.0 if name.endswith("bias") else 1.0
                nn.init.trunc_normal_(tensor, mean=centre, std=0.1, generator=generator)
    return model.eval()


def sites(model: ConvNeXt) -> Iterator[tuple[str, Site]]:
    """Yield every site with its name, in the order in which data reaches them."""
    for name, module in model.named_modules():
        if isinstance(module, Site):
            yield name, module


def layers(model: ConvNeXt) -> Iterator[tuple[str, Layer, nn.Conv2d | Pointwise]]:
    """Yield every layer that carries weights: its name, its kind and its module."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | Pointwise):
            yield name, layer_kind(name), module


def layer_kind(name: str) -> Layer:
    """Return the kind of the weighted layer with this canonical name."""
    last = name.rpartition(".")[2]
    if last in {"pw1", "pw2", "depthwise"}:
        return Layer(last)
    return {"stem.conv": Layer.STEM, "head.fc": Layer.HEAD}.get(name, Layer.DOWNSAMPLE)


def variant(architecture: Architecture) -> str:
    """Return the published name of these depths and dims, or `custom`."""
    for name, (depths, dims) in SIZES.items():
        if (architecture.depths, architecture.dims) == (depths, dims):
            return name
    return "custom"


def count_parameters(architecture: Architecture) -> int:
    """Return how many trained numbers the network has."""
    return sum(tensor.numel() for tensor in empty(architecture).state_dict().values())


def count_macs(architecture: Architecture, input_size: int) -> int:
    """Return the multiply-accumulates of one square image, counted by running it on meta.

    Args:
        architecture: The network.
        input_size: Side of the image in pixels.
    """
    model, total = empty(architecture), 0

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | Pointwise):
            total += output.numel() * module.weight[0].numel()

    for _, _, module in layers(model):
        module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, architecture.in_channels, input_size, input_size, device="meta"))
    return total
