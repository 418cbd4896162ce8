"""Post-training quantization: folded model + statistics -> `QuantizedModel`.

In: the folded network and the range of every site. Out: params.json and tensors.safetensors, one
set of integers per profile; no pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pipeline import checkpoint
from pipeline.arithmetic import (
    activation_quantization,
    quantize_bias,
    quantize_weight,
    weight_scales,
)
from pipeline.convnext import ConvNeXt, layers
from pipeline.errors import ArtifactError
from pipeline.fold import fold
from pipeline.records import (
    PROFILES,
    Layer,
    Preprocessing,
    QuantizedModel,
    Range,
    to_json,
)
from pipeline.trace import inputs_of_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pipeline.worker import Progress

PARAMS, TENSORS = "params.json", "tensors.safetensors"


def quantize(
    folded: ConvNeXt,
    ranges: Mapping[str, Range],
    preprocessing: Preprocessing,
    *,
    labels: tuple[str, ...] | None,
    parents: Mapping[str, str],
) -> tuple[QuantizedModel, dict[str, NDArray[Any]]]:
    """Choose every scale and round every weight, once for all runtimes.

    Args:
        folded: The folded network, float32.
        ranges: Site name to what it held over the calibration images.
        preprocessing: What the artifacts embed.
        labels: Class names in the order of the logits.
        parents: Name to sha256 of what this was made from.

    Returns:
        The record and its arrays: `float/NAME` (float32) and, per profile, `PROFILE/LAYER.weight`
        (int8), `.weight_scale` (float32) and `.bias` (int32).
    """
    parameters = {name: activation_quantization(observed) for name, observed in ranges.items()}
    reads = inputs_of_layers(folded)
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind, module in layers(folded):
        depthwise = kind is Layer.DEPTHWISE
        weight = module.weight.detach().numpy()
        bias = (
            np.asarray(module.bias.detach()) if module.bias is not None else np.zeros(len(weight))
        )
        input_scale = parameters[reads[name]].scale
        for profile in PROFILES:
            scales = weight_scales(weight, bias, input_scale, profile, depthwise=depthwise)
            q = quantize_weight(weight, scales, profile, depthwise=depthwise)
            arrays[f"{profile}/{name}.weight"] = q
            arrays[f"{profile}/{name}.weight_scale"] = scales
            arrays[f"{profile}/{name}.bias"] = quantize_bias(bias, input_scale, scales)
    for name, tensor in folded.state_dict().items():
        arrays[f"float/{name}"] = tensor.numpy()
    record = QuantizedModel(
        architecture=folded.architecture,
        preprocessing=preprocessing,
        labels=labels,
        sites=parameters,
        parents=dict(parents),
    )
    return record, arrays


def quantize_stage(
    model: str,
    ranges: str,
    preprocessing: dict[str, Any],
    parents: dict[str, str],
    folder: str,
    progress: Progress,
) -> None:
    """Fold a checkpoint and quantize it.

    Args:
        model: Folder of the checkpoint stage.
        ranges: ranges.json of the calibrate stage.
        preprocessing: A `Preprocessing` as JSON.
        parents: Name to sha256 of what the model is made from.
        folder: Takes params.json and tensors.safetensors.
        progress: Called before and after.
    """
    progress(0, 1)
    record, tensors = checkpoint.read(Path(model))
    how = TypeAdapter(Preprocessing).validate_python(preprocessing)
    observed = TypeAdapter(dict[str, Range]).validate_json(Path(ranges).read_bytes())
    folded = fold(checkpoint.build(record, tensors), how)
    quantized, arrays = quantize(folded, observed, how, labels=record.labels, parents=parents)
    write(Path(folder), quantized, arrays)
    progress(1, 1)


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
