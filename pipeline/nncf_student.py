"""The network that NNCF's quantizers train: a quantized model with them in it, and back.

In: a `QuantizedModel` with its arrays. Out: the folded network with a fake quantizer of NNCF's at
every site and on the weights of every integer layer, whose logits are those of the integers; and,
whenever asked, the record that it has become.

Where they stand and their scales are what the calibration chose, and stay. NNCF knows no headroom
of pairs, no tie-free scales, no steps of twelve bits and no int32 biases: what it learnt of scales
would not be a record. So weights and biases learn, through NNCF's rounding, and biases are rounded
here. One set of integers is trained, that of the strictest profile, as by this project's engine;
but nothing keeps it within its headroom. What left it is put back when it is read, for the profiles
that ask for it: `full` alone holds what NNCF computed with.

NNCF quantizes no rescaled channels either. Here rescaling is part of the network: an affine in the
LayerNorm, rows divided by a scale and a multiplication behind the site. All sites are per tensor.

`nncf.strip` is not called: it imports torchao, which neither nncf nor this project declares, knows
8 bits alone and leaves fake quantizers, not integers. What it would read is read here, by the same
method of NNCF's quantizers, and held against the record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.grid import along_channels
from calib.learned import BIAS_STEPS
from calib.lsq import replaced
from pipeline.arithmetic import BIAS_LIMIT, BITS, along_rows, quantize_bias, round_weights
from pipeline.errors import UsageError
from pipeline.nncf_quantizers import (
    attach,
    check_called,
    check_mappable,
    compiling,
    exact,
    of_site,
    of_weight,
    quantizer_at,
)
from pipeline.quantize import layer_grid
from pipeline.recipe import NNCF_SCHEMES
from pipeline.records import ACTIVATION_BITS, PROFILES, STRICTEST, Profile, QuantizedModel
from pipeline.student import drop_paths, float_network
from pipeline.trace import Freedom, structure, trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from calib.learned import LearnedLayer
    from pipeline.convnext import ChannelNorm
    from pipeline.nncf_quantizers import Held
    from pipeline.records import Quantization

    Arrays = Mapping[str, NDArray[Any]]
    Exact = NDArray[np.float64]

FREE: Profile = "full"
"""It allows all that NNCF's quantizers give."""


class NncfStudent(nn.Module):
    """A quantized model that NNCF's quantizers train.

    Takes pixels in [0, 255], (N, C, H, W), and returns logits (N, classes), as the artifacts do.

    Args:
        record: Where training begins: w8a8, w4a8 or w8.
        arrays: Its arrays.
        dtype: What is computed in; float64 is for proofs.

    Raises:
        UsageError: NNCF has no quantizers for the scheme.
        MissingRuntimeError: nncf is not installed.
        TrainingError: NNCF did not put its quantizers where they were asked for.
    """

    def __init__(
        self, record: QuantizedModel, arrays: Arrays, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if record.scheme not in NNCF_SCHEMES:
            raise UsageError(
                f"engine nncf cannot train scheme {record.scheme}",
                allowed="w8a8, w4a8 or w8",
                do="Give --engine own, or another --scheme",
            )
        self.record, self.start, self.dtype = record, arrays, dtype
        self.layers: dict[str, LearnedLayer] = {}
        """None of this project's."""
        self.network = float_network(record, arrays).to(dtype)
        graph, modules = trace(self.network)
        self.structure = structure(graph, modules)
        self.sites = record.sites if record.scheme in ACTIVATION_BITS else {}
        self.trained: dict[str, NncfLayer] = {}
        self.places: dict[str, Held] = {}
        """By the name of NNCF's hook."""
        for name in self.structure.reads:
            if f"{STRICTEST}/{name}.weight" in arrays:
                self._add_layer(name, cast("nn.Conv2d | nn.Linear", modules[name]))
        for name, parameters in self.sites.items():
            self._add_site(name, parameters)
        attach(self.network, self.places)
        net = record.architecture
        side = net.stride
        image = torch.zeros(1, net.in_channels, side, side, dtype=dtype)
        check_called(self.network, self.places, image)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        # NNCF would round a range to bfloat16: eight bits of integer need more.
        with torch.autocast(image.device.type, enabled=False), compiling():
            logits: Tensor = self.network(image)
        return logits

    # --- the network -------------------------------------------------------------------------

    def _scale(self, site: str | None) -> Exact | None:
        """Return what a quantized site's channels are divided by, where they are rescaled."""
        if site not in self.sites:
            return None
        place = self.structure.places[site]
        key = place.stage if place.freedom is Freedom.STREAM else site
        scale = self.start.get(f"rescale/{key}.scale")
        return None if scale is None else scale.astype(np.float64)

    def _add_layer(self, name: str, module: nn.Conv2d | nn.Linear) -> None:
        weight, scales, bias = self._arrays_of(name)
        site = self.sites.get(self.structure.reads[name])
        of_bias = 1.0 if site is None else scales * site.scale
        divisor = self._scale(self.structure.writes.get(name))
        rows = np.ones(1) if divisor is None else divisor
        layer = NncfLayer(
            module,
            weight=self._tensor(weight),
            unit=self._tensor(scales / rows),
            bias=self._tensor(bias * of_bias / rows),
            input_scale=None if site is None else site.scale,
        )
        self.trained[name] = layer
        self.network.set_submodule(name, layer)
        grid = layer_grid(self.record.scheme, name, weight.shape, FREE)
        held = of_weight(scales / rows, weight.ndim, grid.bits)
        self.places[f"pre_hooks.{layer.operation(name)}__1.0"] = held

    def _arrays_of(self, layer: str) -> tuple[NDArray[np.int8], Exact, Exact]:
        names = ("weight", "weight_scale", "bias")
        weight, scales, bias = (self.start[f"{STRICTEST}/{layer}.{name}"] for name in names)
        return weight, scales.astype(np.float64), bias.astype(np.float64)

    def _add_site(self, name: str, parameters: Quantization) -> None:
        place, scale = self.structure.places[name], self._scale(name)
        reader = next((layer for layer in place.readers if layer in self.trained), None)
        if scale is not None and place.freedom is Freedom.NORM:
            norm = cast("ChannelNorm", self.network.get_submodule(str(place.writer)))
            shift = self.start[f"rescale/{name}.shift"].astype(np.float64)
            affine = self._tensor(1 / scale), self._tensor(-shift / scale)
            norm.weight, norm.bias = (nn.Parameter(v, requires_grad=False) for v in affine)
        elif scale is not None:
            # A layer that reads the residual stream takes it divided; all else takes it whole.
            factor = self._tensor(scale if reader is None else 1 / scale)
            self.network.set_submodule(name, Multiplied(factor))
        if reader is not None:
            hook = f"pre_hooks.{self.trained[reader].operation(reader)}__0.0"
        else:
            writer = str(place.writer)
            hook = f"post_hooks.{self.trained[writer].operation(writer)}__0.0"
        self.places[hook] = of_site(parameters)

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype)

    # --- for the training loop ---------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Eight, whatever the weights have: NNCF's ranges need all of float32."""
        return BITS

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the weights, which may decay, and the biases, which do not."""
        layers = self.trained.values()
        return [layer.weight for layer in layers], [layer.bias for layer in layers]

    def network_of(self) -> nn.Module:
        """Return the network."""
        return self

    def drop_paths(self, rate: float, generator: torch.Generator, part: tuple[int, int]) -> None:
        """Let images skip blocks while training; see `pipeline.student.drop_paths`."""
        drop_paths(self.network, rate, generator, part)

    # --- the way back ------------------------------------------------------------------------

    @torch.no_grad()
    def quantized(self) -> tuple[QuantizedModel, dict[str, NDArray[Any]]]:
        """Return the record that the network has become, and its arrays.

        The integers of `full` are those that `forward` computes with.

        Raises:
            TrainingError: NNCF holds something that is not the record's.
        """
        check_mappable(self.network, self.places)
        arrays = dict(self.start)
        for name, layer in self.trained.items():
            self._read(name, layer, arrays)
        return self.record, arrays

    def _read(self, name: str, layer: NncfLayer, arrays: dict[str, NDArray[Any]]) -> None:
        quantizer = quantizer_at(self.network, f"pre_hooks.{layer.operation(name)}__1.0")
        values, bias = (exact(tensor) for tensor in layer.values(quantizer))
        integers = np.rint(values / along_rows(exact(layer.unit), values.ndim))
        scales = self.start[f"{STRICTEST}/{name}.weight_scale"]
        site = self.sites.get(self.structure.reads[name])
        divisor = self._scale(self.structure.writes.get(name))
        bias = bias if divisor is None else bias * divisor
        for profile in PROFILES:
            grid = layer_grid(self.record.scheme, name, integers.shape, profile)
            arrays[f"{profile}/{name}.weight"] = round_weights(integers, grid).astype(np.int8)
            arrays[f"{profile}/{name}.weight_scale"] = scales
            arrays[f"{profile}/{name}.bias"] = (
                bias.astype(np.float32) if site is None else quantize_bias(bias, site.scale, scales)
            )


class NncfLayer(nn.Module):
    """A convolution or a linear map over channels whose weights NNCF quantizes as it reads them.

    What is learnt is relative to the calibration's steps, as in `calib.learned.LearnedLayer`: the
    same learning rates suit both.

    Args:
        module: The float layer: its kind, stride, padding and groups.
        weight: Integers as floats, (out, in / groups, ...).
        unit: What they count in, (out,).
        bias: In the units of what the layer writes, (out,).
        input_scale: scale_x; None where the layer reads floats.
    """

    unit: Tensor
    origin: Tensor
    step: Tensor

    def __init__(
        self,
        module: nn.Conv2d | nn.Linear,
        *,
        weight: Tensor,
        unit: Tensor,
        bias: Tensor,
        input_scale: float | None,
    ) -> None:
        super().__init__()
        self.how: dict[str, Any] | None = None
        """Of a convolution."""
        if isinstance(module, nn.Conv2d):
            names = ("stride", "padding", "groups")
            self.how = {name: getattr(module, name) for name in names}
        self.reads_integers = input_scale is not None
        self.register_buffer("unit", unit)
        self.register_buffer("origin", bias)
        self.register_buffer("step", unit * (1.0 if input_scale is None else input_scale))
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros_like(bias))

    def operation(self, name: str) -> str:
        """Return NNCF's name of the function that a layer of this name calls."""
        return f"{name.replace('.', '/')}/{'linear' if self.how is None else 'conv2d'}/0"

    def values(self, quantizer: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Return weight and bias, the weight quantized or not, in the units of what is written."""
        weight = self.weight * self.unit.reshape(-1, *[1] * (self.weight.ndim - 1))
        bias = self.origin + self.bias * (BIAS_STEPS * self.step)
        if self.reads_integers:
            whole = (bias.detach() / self.step).round().clamp(-BIAS_LIMIT, BIAS_LIMIT)
            bias = replaced(bias, whole * self.step)
        return weight if quantizer is None else quantizer(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (N, in, ...) to (N, out, ...)."""
        weight, bias = self.values()
        if self.how is not None:
            return functional.conv2d(x, weight, bias, **self.how)
        return functional.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


class Multiplied(nn.Module):
    """A factor per channel that is not learnt."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        """Scale (N, C, ...)."""
        return x * along_channels(self.factor, x.ndim)
