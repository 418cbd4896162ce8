"""What each layer and each block loses when it alone runs in integers.

In: a quantized model and calibration images. Out: one `Sensitivity` per layer and per block: the
reference's logits against its own with every layer in float.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import TypeAdapter

from calib.batches import some_pixels
from calib.images import select
from pipeline import quantize
from pipeline.records import Export, Preprocessing, Selection, Sensitivity
from pipeline.statistics import divergence, sqnr_db
from targets.base import runtime
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.records import Profile, QuantizedModel
    from pipeline.worker import Progress
    from targets.graph import Graph

    Arrays = Mapping[str, NDArray[Any]]
    Group = tuple[Literal["layer", "block"], str, tuple[str, ...]]

REFERENCE = "reference"
BATCH = 32


def sensitivity_stage(
    model: str,
    selection: dict[str, Any],
    preprocessing: dict[str, Any],
    profile: Profile,
    folder: str,
    progress: Progress,
) -> dict[str, Any]:
    """Quantize one group of layers at a time.

    Args:
        model: Folder with params.json and tensors.safetensors.
        selection: The calibration images, a `Selection` as JSON.
        preprocessing: A `Preprocessing` as JSON.
        profile: Which integers.
        folder: Takes nothing: the result is all there is.
        progress: Called per group.

    Returns:
        `images`: how many were looked at; `sensitivities`: as JSON.
    """
    del folder
    record, arrays = quantize.read(Path(model))
    how = TypeAdapter(Preprocessing).validate_python(preprocessing)
    images = select(TypeAdapter(Selection).validate_python(selection))
    tried = quantize.sample_size(how)
    # Not those that the calibration tried its choices on, where there are others.
    pixels = some_pixels(images, how, math.ceil(tried / 2), after=tried)
    found = sensitivities(record, arrays, profile, pixels, progress)
    return {"images": len(pixels), "sensitivities": [asdict(row) for row in found]}


def sensitivities(
    record: QuantizedModel,
    arrays: Arrays,
    profile: Profile,
    pixels: NDArray[np.float32],
    progress: Progress,
) -> list[Sensitivity]:
    """Return what every layer, and then every block of several layers, loses alone.

    Args:
        record: The model.
        arrays: Its tensors.
        profile: Which integers.
        pixels: float32 (N, C, H, W) in [0, 255].
        progress: Called per group.
    """
    whole = reference_graph(record, arrays, profile)
    integer = tuple(op.name for op in whole.weighted if op.integers is not None)
    macs = {op.name: math.prod(op.shape) * op.weight[0].size for op in whole.weighted}
    weights = {op.name: op.weight.size for op in whole.weighted}

    def alone(layers: Sequence[str]) -> Graph:
        floats = tuple(name for name in integer if name not in layers)
        kept = replace(record, float_layers=(*record.float_layers, *floats))
        return reference_graph(kept, arrays, profile)

    nothing = _logits(alone(()), pixels)
    groups = list(_groups(integer))
    rows: list[Sensitivity] = []
    for done, (kind, name, layers) in enumerate(groups):
        progress(done, len(groups))
        graph = alone(layers)
        logits = _logits(graph, pixels)
        rows.append(
            Sensitivity(
                kind=kind,
                name=name,
                layers=layers,
                sites=graph.sites,
                macs=sum(macs[layer] for layer in layers),
                weights=sum(weights[layer] for layer in layers),
                sqnr_db=sqnr_db(nothing, logits),
                kl=divergence(nothing, logits),
            )
        )
    progress(len(groups), len(groups))
    return rows


def reference_graph(record: QuantizedModel, arrays: Arrays, profile: Profile) -> Graph:
    """Return what the reference runs of a model, at the model's own placement."""
    export = reference_export(record, profile)
    return build_graph(record, arrays, runtime(REFERENCE).capabilities, export)


def reference_export(record: QuantizedModel, profile: Profile) -> Export:
    """Return the export of a model, at the model's own placement, to the reference."""
    can = runtime(REFERENCE).capabilities
    return Export(
        runtime=REFERENCE,
        scheme=record.scheme,
        placement=record.placement,
        graph_form=can.graph_forms[0],
        gelu=can.gelu,
        profile=profile,
        batch="dynamic",
    )


def _groups(layers: Sequence[str]) -> Iterator[Group]:
    """Yield every layer, then every block that has several of them."""
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        yield "layer", layer, (layer,)
        blocks.setdefault(layer.rpartition(".")[0], []).append(layer)
    for block, inside in blocks.items():
        if len(inside) > 1:
            yield "block", block, tuple(inside)


def _logits(graph: Graph, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    starts = range(0, len(pixels), BATCH)
    return np.concatenate([evaluate(graph, pixels[start : start + BATCH]) for start in starts])
