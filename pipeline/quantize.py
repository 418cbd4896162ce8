"""Post-training quantization: folded model + statistics -> `QuantizedModel`.

In: the folded network, what every site's channels held, and a sample of images. Out: params.json
and tensors.safetensors, one set of integers per profile; no pickle.

The sample walks through the network once, module by module, in lanes: as the float network computes
it, and as the integers of each profile do. At a site the grid is chosen, at a layer the integers,
with everything in front of it already quantized. All lanes speak the folded network's units.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from calib.batches import some_pixels
from calib.choose import Seen, choose, choose_stream
from calib.collect import load_statistics
from calib.images import select
from calib.layer import IntegerLayer, rounded, unrounded
from calib.probe import Behind, FunctionReader, LayerReader
from pipeline import checkpoint
from pipeline.arithmetic import BITS, FEW_BITS, weight_grid
from pipeline.convnext import ChannelNorm, layer_kind
from pipeline.errors import ArtifactError
from pipeline.fold import fold
from pipeline.placements import PLACEMENTS, POINTWISE, quantized_sites
from pipeline.records import (
    ACTIVATION_BITS,
    PROFILES,
    Calibration,
    Layer,
    Preprocessing,
    Profile,
    QuantizedModel,
    RangeMethod,
    Selection,
    SiteCalibration,
    Wanted,
    to_json,
)
from pipeline.trace import WEIGHTED, Freedom, node_name, structure, trace

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, fx

    from calib.collect import Statistics
    from calib.grid import Rescaling, SiteGrid
    from calib.probe import Reader
    from pipeline.arithmetic import WeightGrid
    from pipeline.convnext import ConvNeXt
    from pipeline.records import Rounding, Scheme
    from pipeline.trace import Place
    from pipeline.worker import Progress

PARAMS, TENSORS = "params.json", "tensors.safetensors"
FLOAT = "float"
"""The lane of the float network."""
FEW_BIT_SCHEMES = frozenset({"w4a8", "w4a4"})
"""Whose pointwise weights have 4 bits."""
SAMPLE_VALUES = 2**22
"""Numbers in the sample of images: what the walk holds in memory follows from it."""
MOST_SAMPLED = 192
FREEDOMS: Mapping[Freedom, Literal["shift", "scale", "none"]] = {
    Freedom.NORM: "shift",
    Freedom.ROWS: "scale",
    Freedom.STREAM: "none",
    Freedom.NONE: "none",
}

Lanes = dict[str, "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a network is quantized from.

    Attributes:
        folded: The folded network, float32.
        statistics: What every site's channels held over all calibration images.
        sample: Some of those images: pixels in [0, 255], float32 (N, C, H, W).
    """

    folded: ConvNeXt
    statistics: Statistics
    sample: NDArray[np.float32]


def quantize(
    given: Given,
    preprocessing: Preprocessing,
    wanted: Wanted | None = None,
    *,
    labels: tuple[str, ...] | None,
    parents: Mapping[str, str],
    progress: Progress | None = None,
) -> tuple[QuantizedModel, dict[str, NDArray[Any]]]:
    """Choose every scale and round every weight, once for all runtimes.

    Args:
        given: What it is made from.
        preprocessing: What the artifacts embed.
        wanted: What it is made for; None is w8a8, every layer, by search.
        labels: Class names in the order of the logits.
        parents: Name to sha256 of what this was made from.
        progress: Called per site and layer.

    Returns:
        The record and its arrays, as `QuantizedModel` describes them.
    """
    wanted = wanted or Wanted()
    walk = _Walk(given, wanted)
    with torch.no_grad():
        walk.run(progress)
    arrays = walk.arrays
    for name, tensor in given.folded.state_dict().items():
        arrays[f"{FLOAT}/{name}"] = tensor.numpy()
    record = QuantizedModel(
        architecture=given.folded.architecture,
        preprocessing=preprocessing,
        labels=labels,
        scheme=wanted.scheme,
        placement=wanted.placement,
        calibration=walk.how,
        float_layers=wanted.float_layers,
        sites={name: grid.parameters for name, grid in walk.grids.items()},
        chosen=walk.chosen,
        parents=dict(parents),
    )
    return record, arrays


class _Walk:
    """The sample's way through the network."""

    def __init__(self, given: Given, wanted: Wanted) -> None:
        self.given = given
        self.wanted = wanted
        self.how = wanted.calibration
        if len(given.sample) == 1:
            # What is fitted to one image cannot be judged by another.
            self.how = Calibration(
                method="min-max", rounding="nearest", rescale=False, correct_bias=False
            )
        self.bits = ACTIVATION_BITS.get(wanted.scheme)
        """Of activations; None where the scheme quantizes none beforehand."""
        self.graph, self.modules = trace(given.folded)
        self.structure = structure(self.graph, self.modules)
        placement = PLACEMENTS[wanted.placement]
        self.integer = {
            name
            for name in self.structure.reads
            if layer_kind(name) in placement.layers and name not in wanted.float_layers
        }
        self.quantized = quantized_sites(placement, self.structure, self.integer)
        searches = self.how.method == "search"
        self.lanes: tuple[str, ...] = (FLOAT, *PROFILES) if searches else (FLOAT,)
        self.grids: dict[str, SiteGrid] = {}
        self.chosen: dict[str, SiteCalibration] = {}
        self.streams: dict[str, Rescaling] = {}
        self.arrays: dict[str, NDArray[Any]] = {}
        self.values: dict[fx.Node, Lanes] = {}

    def run(self, progress: Progress | None) -> None:
        if self.how.method == "search" and self.how.rescale and self.bits:
            self._choose_streams()
        left = {node: len(node.users) for node in self.graph.nodes}
        total = len(left)
        for done, node in enumerate(self.graph.nodes):
            if progress is not None:
                progress(done, total)
            if node.op == "output":
                continue
            self.values[node] = self._step(node)
            for source in node.all_input_nodes:
                left[source] -= 1
                if not left[source]:
                    del self.values[source]
        for stage, rescaling in self.streams.items():
            self.arrays[f"rescale/{stage}.scale"] = rescaling.scale.numpy()

    def _step(self, node: fx.Node) -> Lanes:
        if node.op == "placeholder":
            return dict.fromkeys(self.lanes, torch.from_numpy(self.given.sample))
        sources = node.all_input_nodes
        inputs = [self.values[source] for source in sources]
        if node.op != "call_module":
            return _once(torch.add, *inputs)
        name = node_name(node)
        if name in self.structure.places:
            return self._site(name, inputs[0], node_name(sources[0]))
        if name in self.integer:
            written = (node_name(user) for user in node.users)
            site = next((user for user in written if user in self.quantized), None)
            return self._layer(name, inputs[0], site)
        return _once(self.modules[name], inputs[0])

    # --- sites ---------------------------------------------------------------------------------

    def _site(self, name: str, x: Lanes, source: str) -> Lanes:
        """Pass a site; one outside the placement is not there."""
        if name not in self.quantized:
            return x
        if source in self.grids:
            # It quantizes what is quantized already: a second grid could only lose.
            self.grids[name] = self.grids[source]
            if source in self.chosen:
                self.chosen[name] = self.chosen[source]
        grid = self._grid(name, x[FLOAT])
        if self.bits is None:
            return x
        integer = {lane: value for lane, value in x.items() if lane != FLOAT}
        return {FLOAT: x[FLOAT]} | _once(grid, integer)

    def _grid(self, name: str, x: Tensor) -> SiteGrid:
        """Return a site's grid, chosen where it is asked for first.

        That is at the layer that writes it, whose weights' scales follow from it; else at the site.
        """
        if name in self.grids:
            return self.grids[name]
        place, seen = self.structure.places[name], self._seen(name, x)
        how, free = self.how, FREEDOMS[place.freedom]
        methods: tuple[RangeMethod, ...] = get_args(RangeMethod)
        if self.bits is None:
            # The runtime takes a tensor's own ends (w8a8-dynamic), or no grid at all (w8).
            methods = ("min-max",)
            if self.wanted.scheme == "w8" or place.freedom is not Freedom.NORM:
                how = Calibration(method="min-max")
        bits, given = self.bits or BITS, self._of_stream(name, place)
        grid, found = choose(seen, how, bits, free=free, given=given, methods=methods)
        if self.bits is not None:
            self.chosen[name] = found
            if place.freedom in {Freedom.NORM, Freedom.ROWS}:
                grid = grid.in_steps()
            elif place.writer in self.integer:
                grid = grid.with_short_step()
        self.grids[name] = grid
        if not grid.rescaling.changes_nothing and place.freedom is not Freedom.STREAM:
            self.arrays[f"rescale/{name}.scale"] = grid.rescaling.scale.numpy()
            if place.freedom is Freedom.NORM:
                self.arrays[f"rescale/{name}.shift"] = grid.rescaling.shift.numpy()
        return grid

    def _of_stream(self, name: str, place: Place) -> Rescaling | None:
        if place.freedom is not Freedom.STREAM or name not in self.quantized:
            return None
        return self.streams.get(str(place.stage))

    def _seen(self, name: str, x: Tensor) -> Seen:
        reader = self._reader(name, x.shape[1])
        return Seen(x=x, channels=self.given.statistics[name], reader=reader)

    def _reader(self, name: str, channels: int) -> Reader:
        """Return what reads a site, and what follows that: LayerNorm or GELU, and how it counts."""
        readers = self.structure.places[name].readers
        if len(readers) == 1 and isinstance(self.modules[readers[0]], WEIGHTED):
            layer = cast("nn.Conv2d | nn.Linear", self.modules[readers[0]])
            grid = self._weight_grid(readers[0], "full")
            written = self.structure.writes.get(readers[0])
            after = self.structure.places[written].readers if written else ()
            behind = self._behind(after, len(layer.weight))
            return LayerReader(layer=layer, grid=grid, behind=behind)
        return FunctionReader(behind=self._behind(readers, channels))

    def _behind(self, readers: Sequence[str], channels: int) -> Behind:
        """Return the function that is all that reads a site, with its reader's column norms."""
        module = self.modules[readers[0]] if len(readers) == 1 else None
        if not isinstance(module, nn.GELU | ChannelNorm):
            return Behind(function=nn.Identity(), weight=torch.ones(channels))
        weight = torch.ones(channels)
        for place in self.structure.places.values():
            if place.writer == readers[0] and len(place.readers) == 1:
                reader = self.modules[place.readers[0]]
                if isinstance(reader, nn.Linear):
                    weight = reader.weight.detach().norm(dim=0)
        return Behind(function=module, weight=weight)

    def _choose_streams(self) -> None:
        """Settle the residual streams first: each is read and written at many sites."""
        assert self.bits is not None
        of_stage: dict[str, list[str]] = {}
        for name, place in self.structure.places.items():
            if place.freedom is Freedom.STREAM and name in self.quantized:
                of_stage.setdefault(str(place.stage), []).append(name)
        wanted = {name for names in of_stage.values() for name in names}
        held = _observed(self.given, wanted)
        for stage, names in of_stage.items():
            seen = [self._seen(name, held[name]) for name in names]
            best = choose_stream(seen, self.bits)
            if not best.changes_nothing:
                self.streams[stage] = best

    # --- layers --------------------------------------------------------------------------------

    def _layer(self, name: str, x: Lanes, behind: str | None) -> Lanes:
        """Choose a layer's integers; `behind` is the quantized site that it writes."""
        module = cast("nn.Conv2d | nn.Linear", self.modules[name])
        site = self.grids[self.structure.reads[name]]
        scale = site.parameters.scale if self.bits else None
        how = self._rounding()
        out = {FLOAT: module(x[FLOAT])}
        written = None
        if behind is not None and self.bits:
            grid_behind = self._grid(behind, out[FLOAT])
            rows = grid_behind.rescaling.scale.double().numpy()
            written = rows * grid_behind.parameters.scale
        plain = unrounded(module, site.rescaling, scale, written)
        made: dict[tuple[int, WeightGrid], tuple[IntegerLayer, Tensor]] = {}
        for profile in PROFILES:
            grid = self._weight_grid(name, profile)
            if profile not in self.lanes:
                self._keep(name, profile, rounded(plain, grid, how))
                continue
            inputs = x[profile]
            # As long as profiles have the same integers, they are one.
            key = (id(inputs), grid)
            if key not in made:
                layer = rounded(plain, grid, how, x[FLOAT], inputs)
                y = layer(inputs)
                made[key] = layer.corrected(out[FLOAT], y) if self.how.correct_bias else (layer, y)
            layer, out[profile] = made[key]
            self._keep(name, profile, layer)
        return out

    def _rounding(self) -> Rounding:
        """Return how a layer's weights are rounded."""
        return "gptq" if self.how.rounding == "auto" else self.how.rounding

    def _weight_grid(self, name: str, profile: Profile) -> WeightGrid:
        shape = tuple(cast("nn.Conv2d", self.modules[name]).weight.shape)
        return layer_grid(self.wanted.scheme, name, shape, profile)

    def _keep(self, name: str, profile: Profile, layer: IntegerLayer) -> None:
        self.arrays[f"{profile}/{name}.weight"] = layer.weight
        self.arrays[f"{profile}/{name}.weight_scale"] = layer.scales
        self.arrays[f"{profile}/{name}.bias"] = layer.bias


def layer_grid(scheme: Scheme, name: str, shape: tuple[int, ...], profile: Profile) -> WeightGrid:
    """Say what a layer's integer weights may be.

    Args:
        scheme: Of the model.
        name: Of the layer.
        shape: Of its weight.
        profile: What the integers are made for.
    """
    kind = layer_kind(name)
    few = scheme in FEW_BIT_SCHEMES and kind in POINTWISE
    bits = FEW_BITS if few else BITS
    return weight_grid(shape, profile, depthwise=kind is Layer.DEPTHWISE, bits=bits)


def _once(function: Callable[..., Tensor], *inputs: Lanes) -> Lanes:
    """Apply a function in every lane, once for all lanes that hold the same tensors."""
    made: dict[tuple[int, ...], Tensor] = {}
    found: Lanes = {}
    for lane in inputs[0]:
        given = [values[lane] for values in inputs]
        key = tuple(map(id, given))
        if key not in made:
            made[key] = function(*given)
        found[lane] = made[key]
    return found


def _observed(given: Given, names: Collection[str]) -> dict[str, Tensor]:
    """Return what sites hold on the sample in the float network."""
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            held[name] = output

        return hook

    modules = dict(given.folded.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        given.folded(torch.from_numpy(given.sample))
    finally:
        for handle in handles:
            handle.remove()
    return held


def sample_size(preprocessing: Preprocessing) -> int:
    """Return how many images the walk looks at: fewer of larger ones."""
    values = preprocessing.channels * preprocessing.input_size**2
    return min(MOST_SAMPLED, max(8, SAMPLE_VALUES // values))


def sample(selection: Selection, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return the pixels of some images of a selection.

    Returns:
        float32 (N, C, H, W) in [0, 255], N at most `sample_size`.
    """
    return some_pixels(select(selection), preprocessing, sample_size(preprocessing))


def quantize_stage(
    model: str,
    statistics: str,
    selection: dict[str, Any],
    preprocessing: dict[str, Any],
    wanted: dict[str, Any],
    parents: dict[str, str],
    folder: str,
    progress: Progress,
) -> dict[str, Any]:
    """Fold a checkpoint and quantize it.

    Args:
        model: Folder of the checkpoint stage.
        statistics: What the calibrate stage wrote.
        selection: The calibration images, a `Selection` as JSON.
        preprocessing: A `Preprocessing` as JSON.
        wanted: A `Wanted` as JSON.
        parents: Name to sha256 of what the model is made from.
        folder: Takes params.json and tensors.safetensors.
        progress: Called per site and layer.

    Returns:
        `sample`: how many images the choices were tried on.
    """
    record, tensors = checkpoint.read(Path(model))
    how = TypeAdapter(Preprocessing).validate_python(preprocessing)
    given = Given(
        folded=fold(checkpoint.build(record, tensors), how),
        statistics=load_statistics(Path(statistics)),
        sample=sample(TypeAdapter(Selection).validate_python(selection), how),
    )
    quantized, arrays = quantize(
        given,
        how,
        TypeAdapter(Wanted).validate_python(wanted),
        labels=record.labels,
        parents=parents,
        progress=progress,
    )
    write(Path(folder), quantized, arrays)
    return {"sample": len(given.sample)}


def write(folder: Path, record: QuantizedModel, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write params.json and tensors.safetensors into an existing folder."""
    (folder / PARAMS).write_bytes(to_json(record))
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, folder / TENSORS)


def read(folder: Path) -> tuple[QuantizedModel, dict[str, NDArray[Any]]]:
    """Read what `write` wrote.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    try:
        record = TypeAdapter(QuantizedModel).validate_json((folder / PARAMS).read_bytes())
        return record, load_file(folder / TENSORS)
    except (OSError, ValidationError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} holds no quantized model ({type(error).__name__})",
            allowed=f"a folder with {PARAMS} and {TENSORS}",
            do="Run `convnext-edge quantize` again",
        ) from error
