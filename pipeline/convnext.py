"""The canonical ConvNeXt, V1 and V2: one network for every dialect, and the named sizes.

In: an `Architecture`. Out: a plain `torch.nn.Module` whose tensor names are this project's own
dialect. Every place where a tensor may be quantized is a `Site`, an identity that calibration
observes and the shared graph turns into a quantize/dequantize pair.

Sources: Liu et al., "A ConvNet for the 2020s", 2022, section 2 and appendix A; Woo et al.,
"ConvNeXt V2", 2023, section 3.3.
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
    "zepto": ((2, 2, 4, 2), (32, 64, 128, 256)),
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
    "xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
    "isotropic-small": ((18,), (384,)),
    "isotropic-base": ((18,), (768,)),
    "isotropic-large": ((36,), (1024,)),
}
GRN_EPS = 1e-6
"""The same in every dialect; added to the mean response."""


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


class Centre(nn.Module):
    """Subtracts a constant per channel; only a folded network with a padded stem has one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shift (N, C, H, W) per channel."""
        return x + self.bias[:, None, None]


class ResponseNorm(nn.Module):
    """Global response normalisation: x (1 + gamma n) + beta over an (N, C, H, W) tensor.

    n is each channel's L2 norm over the image, divided by the mean norm of all channels.

    Args:
        channels: C.
        shift: Whether beta exists; a folded model has it in the layer that follows.

    Source: Woo et al., "ConvNeXt V2", 2023, section 3.3.
    """

    def __init__(self, channels: int, *, shift: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; same shape out."""
        response: Tensor = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        relative = response / (response.mean(dim=1, keepdim=True) + GRN_EPS)
        y: Tensor = x + x * relative * self.weight[:, None, None]
        return y if self.bias is None else y + self.bias[:, None, None]


class LayerScale(nn.Module):
    """A learned factor per channel on the residual branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (N, C, H, W) per channel."""
        return x * self.weight[:, None, None]


class Stem(nn.Module):
    """Image to residual stream: (N, in, H, W) to (N, C, H/r, W/r), r the patch or 4.

    One patchifying convolution, or two overlapping 3x3 ones of stride 2; then LayerNorm, except in
    an isotropic network. It keeps its affine in a folded model: its output is the residual stream
    itself. Before a padded convolution the image's mean cannot be folded into the weights, for the
    padding is zero after it is subtracted: a folded overlapping stem subtracts it as an operation.
    """

    def __init__(self, net: Architecture, *, folded: bool) -> None:
        super().__init__()
        overlap, width = net.stem != "patch", net.dims[0]
        first = net.stem_width or width
        self.centre = Centre(net.in_channels) if overlap and folded else nn.Identity()
        self.image = Site(Role.IMAGE)
        if overlap:
            self.conv = nn.Conv2d(net.in_channels, first, 3, stride=2, padding=1)
            self.stem_mid: nn.Module = Site(Role.STEM_MID)
            acts = net.stem == "overlap_act"
            self.gelu = nn.GELU() if acts else nn.Identity()
            self.stem_in: nn.Module = Site(Role.STEM_IN) if acts else nn.Identity()
            self.conv2: nn.Module = nn.Conv2d(first, width, 3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(net.in_channels, width, net.patch, stride=net.patch)
            self.stem_mid = self.gelu = self.stem_in = self.conv2 = nn.Identity()
        self.stem_out = Site(Role.STEM_OUT)
        self.norm = (
            ChannelNorm(width, net.norm_eps, affine=True) if net.stem_norm else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed the image's patches."""
        y = self.stem_mid(self.conv(self.image(self.centre(x))))
        y = self.conv2(self.stem_in(self.gelu(y)))
        z: Tensor = self.norm(self.stem_out(y))
        return z


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
    """Depthwise 7x7, LayerNorm, two pointwise maps around a GELU (V2: and GRN), and the residual.

    The depthwise convolution reads the residual stream through `dw_in`; the stream itself stays
    float, and `res_out` is the branch just before it is added. With GRN the second pointwise map
    reads `grn_out`; `gelu_out` is then what GRN reads, in float.
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
        self.grn = ResponseNorm(hidden, shift=not folded) if net.grn else nn.Identity()
        self.grn_out: nn.Module = Site(Role.GRN_OUT) if net.grn else nn.Identity()
        self.pw2 = Pointwise(hidden, channels)
        has_scale = net.layer_scale and not folded
        self.scale = LayerScale(channels) if has_scale else nn.Identity()
        self.res_out = Site(Role.RES_OUT)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the residual stream; (N, C, H, W) to the same."""
        y = self.ln_out(self.norm(self.dw_out(self.depthwise(self.dw_in(x)))))
        y = self.gelu_out(self.gelu(self.gelu_in(self.pw1(y))))
        y = self.grn_out(self.grn(y))
        branch: Tensor = self.res_out(self.scale(self.pw2(y)))
        return x + branch


class Stage(nn.Module):
    """An optional downsample and the blocks of one resolution."""

    def __init__(self, index: int, net: Architecture, *, folded: bool) -> None:
        super().__init__()
        channels = net.dims[index]
        if index or net.downsample_first:
            before = net.dims[max(index - 1, 0)]
            self.downsample: nn.Module = Downsample(before, channels, net, folded=folded)
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
    """Global mean, LayerNorm and the classifier: (N, C, H, W) to (N, classes).

    Variants normalise before the mean (`head_norm_first`), or have a hidden layer with GELU
    (`head_width`).
    """

    def __init__(self, net: Architecture, *, folded: bool) -> None:
        super().__init__()
        channels = net.dims[-1]
        eps = net.head_norm_eps or net.norm_eps
        self.norm_first = net.head_norm_first
        self.pool = GlobalMean()
        self.norm = ChannelNorm(channels, eps, affine=not folded)
        self.head_in = Site(Role.HEAD_IN)
        if net.head_width is not None:
            self.hidden: nn.Module = Pointwise(channels, net.head_width)
            self.head_mid: nn.Module = Site(Role.HEAD_MID)
            self.gelu: nn.Module = nn.GELU()
            self.head_hidden: nn.Module = Site(Role.HEAD_HIDDEN)
        else:
            self.hidden = self.head_mid = self.gelu = self.head_hidden = nn.Identity()
        self.fc = Pointwise(net.head_width or channels, net.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        y = self.pool(self.norm(x)) if self.norm_first else self.norm(self.pool(x))
        y = self.gelu(self.head_mid(self.hidden(self.head_in(y))))
        logits: Tensor = self.fc(self.head_hidden(y))
        return logits


class ConvNeXt(nn.Module):
    """The canonical network.

    Takes float NCHW of shape (N, in_channels, H, W), H and W at least `architecture.stride`, and
    returns float logits (N, classes). An ordinary model takes normalised pixels; a folded one
    (`pipeline.fold`) takes pixels in [0, 255], has no LayerScale, no shift in GRN and, behind the
    stem, no affine in its LayerNorms.
    """

    def __init__(self, architecture: Architecture, *, folded: bool = False) -> None:
        super().__init__()
        self.architecture = architecture
        self.folded = folded
        self.stem = Stem(architecture, folded=folded)
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
            elif ".grn." in name:  # trained ones stand apart from 0, where they start
                nn.init.trunc_normal_(tensor, std=0.3, generator=generator)
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
    parent, _, last = name.rpartition(".")
    if last in {"pw1", "pw2", "depthwise"}:
        return Layer(last)
    return {"stem": Layer.STEM, "head": Layer.HEAD}.get(parent, Layer.DOWNSAMPLE)


def variant(architecture: Architecture) -> str:
    """Return the published name of this network, or `custom`.

    The size comes first, `v2-` before it for a ConvNeXt V2; behind it stand what differs from the
    plain network: `ols` (overlapping stem), `hnf` (head norm first), `mlp` (a head of two layers).
    """
    net = architecture
    size = next((n for n, shape in SIZES.items() if shape == (net.depths, net.dims)), None)
    plain = net.expansion == 4 and net.kernel == 7 and not net.downsample_first  # noqa: PLR2004
    isotropic = len(net.depths) == 1
    if size is None or not plain or isotropic == net.stem_norm or (net.grn and net.layer_scale):
        return "custom"
    if net.stem == "patch" and net.patch != (16 if isotropic else 4):
        return "custom"
    parts = ["v2"] if net.grn else []
    parts.append(size)
    parts += ["ols"] if net.stem != "patch" else []
    parts += ["hnf"] if net.head_norm_first else []
    parts += ["mlp"] if net.head_width else []
    return "-".join(parts)


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
