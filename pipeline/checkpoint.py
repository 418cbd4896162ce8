"""A checkpoint file becomes a canonical network.

In: a .pth/.pt/.bin or .safetensors file. Out: a `Checkpoint` record with its canonical tensors, and
from the two a `ConvNeXt`. Nothing is executed from a file: pickles are read with
`weights_only=True`, and every tensor is checked against the network it claims to be.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline import dialects
from pipeline.convnext import ConvNeXt, count_macs, count_parameters, empty, variant
from pipeline.errors import CheckpointError
from pipeline.records import Architecture, Checkpoint, to_json
from pipeline.store import sha256_file, write_atomic
from pipeline.tensorfile import damaged, read_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pipeline.worker import Progress

METADATA_KEY = "convnext-edge"
RGB = 3
RECORD, TENSORS = "checkpoint.json", "tensors.safetensors"


class Dialect(Protocol):
    """What a module in pipeline/dialects/ provides."""

    NAME: str
    NORM_EPS: float
    EXPECTED: str

    def matches(self, names: Collection[str]) -> bool:
        """Tell whether these tensor names are of this dialect."""

    def canonical(self, name: str) -> str:
        """Return the canonical name of a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint's record, its tensors (float32, canonical names) and what looked odd in them."""

    record: Checkpoint
    tensors: dict[str, Tensor]
    dtypes: tuple[str, ...]
    warnings: tuple[str, ...]


def all_dialects() -> tuple[Dialect, ...]:
    """Return every dialect, discovered from pipeline/dialects/."""
    found = sorted(info.name for info in pkgutil.iter_modules(dialects.__path__))
    return tuple(
        cast("Dialect", importlib.import_module(f"{dialects.__name__}.{name}"))
        for name in found
        if not name.startswith("_")
    )


def load(path: Path, *, labels: tuple[str, ...] | None = None) -> LoadedCheckpoint:
    """Read and check a checkpoint.

    Args:
        path: The file.
        labels: Class names, in the order of the logits, where the caller knows them.

    Returns:
        The record with its tensors, float32 under canonical names.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe, not a ConvNeXt, or not finite.
    """
    raw, metadata = read_tensors(path)
    dialect = _dialect_of(raw, path)
    tensors = {dialect.canonical(name): tensor for name, tensor in raw.items()}
    dtypes = tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in raw.values()}))
    tensors = {name: _as_float32(name, tensor, path) for name, tensor in tensors.items()}
    architecture = _architecture(tensors, metadata, dialect, path)
    _check_against_network(tensors, architecture, path)
    labels = labels or _stated_labels(metadata)
    if labels is not None and len(labels) != architecture.classes:
        raise CheckpointError(
            f"{path}: {len(labels)} class names for {architecture.classes} classes",
            allowed="one name per row of the head",
            do="Correct `classes` in the sidecar .json",
        )
    record = Checkpoint(
        path=str(path),
        sha256=sha256_file(path),
        dialect=dialect.NAME,
        architecture=architecture,
        variant=variant(architecture),
        labels=labels,
    )
    return LoadedCheckpoint(
        record=record, tensors=tensors, dtypes=dtypes, warnings=tuple(_suspicions(tensors))
    )


def write(folder: Path, loaded: LoadedCheckpoint) -> None:
    """Write the record and its canonical tensors into an existing folder."""
    (folder / RECORD).write_bytes(to_json(loaded.record))
    safetensors.torch.save_file(loaded.tensors, folder / TENSORS)


def read(folder: Path) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Read what `write` wrote."""
    return read_record(folder), safetensors.torch.load_file(folder / TENSORS)


def read_record(folder: Path) -> Checkpoint:
    """Read the record alone."""
    return TypeAdapter(Checkpoint).validate_json((folder / RECORD).read_bytes())


def load_stage(
    path: str, labels: list[str] | None, input_size: int, folder: str, progress: Progress
) -> dict[str, Any]:
    """Read a checkpoint and keep its record and tensors in a folder.

    Args:
        path: The checkpoint file.
        labels: Class names where the sidecar states them.
        input_size: Side of the image in pixels, for counting.
        folder: Takes checkpoint.json and tensors.safetensors.
        progress: Called before and after.

    Returns:
        `params`, `macs`, and `warnings`: what looked odd in the weights.

    Raises:
        CheckpointError: As `load`; or the network cannot take images of this size.
    """
    progress(0, 1)
    loaded = load(Path(path), labels=tuple(labels) if labels else None)
    check_input(loaded.record.architecture, input_size)
    write(Path(folder), loaded)
    progress(1, 1)
    return {
        "warnings": list(loaded.warnings),
        "params": count_parameters(loaded.record.architecture),
        "macs": count_macs(loaded.record.architecture, input_size),
    }


def check_input(architecture: Architecture, input_size: int) -> None:
    """Check that the network can take RGB images of this size.

    Raises:
        CheckpointError: It cannot.
    """
    if architecture.in_channels != RGB:
        raise CheckpointError(
            f"the network takes {architecture.in_channels} channels",
            allowed=f"{RGB}, for RGB images",
            do="Give a checkpoint trained on RGB images",
        )
    if not isinstance(input_size, int) or input_size < 1:  # a sidecar can state anything
        raise CheckpointError(
            f"input size {input_size!r} is not a number of pixels",
            allowed=f"multiples of {architecture.stride}",
            do="Correct input_size in the sidecar .json or give --input-size",
        )
    if input_size % architecture.stride:
        below = input_size // architecture.stride * architecture.stride
        near = [str(size) for size in (below, below + architecture.stride) if size]
        raise CheckpointError(
            f"input size {input_size} is not a multiple of {architecture.stride}",
            allowed=f"multiples of {architecture.stride}",
            do=f"Give --input-size {' or '.join(near)}",
        )


def build(record: Checkpoint, tensors: Mapping[str, Tensor]) -> ConvNeXt:
    """Return the network with these tensors, in eval mode, taking normalised float NCHW."""
    model = empty(record.architecture).to_empty(device="cpu")
    model.load_state_dict(dict(tensors))
    return model.eval()


def save(path: Path, model: ConvNeXt, *, labels: tuple[str, ...] | None) -> None:
    """Write a network in this project's own dialect, whole or not at all.

    Args:
        path: A .safetensors file; its metadata carries the architecture and the labels.
        model: The network, unfolded.
        labels: Class names in the order of the logits.
    """
    stated = {"architecture": asdict(model.architecture), "labels": labels and list(labels)}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(stated)}))


def load_model(path: str | Path) -> ConvNeXt:
    """Load any supported checkpoint as the canonical network.

    Args:
        path: A .pth, .pt, .bin or .safetensors file.

    Returns:
        The network in eval mode: float32 NCHW of shape (N, 3, H, W), normalised by the mean and
        std it was trained with, to logits (N, classes).

    Raises:
        CheckpointError: The file is missing, damaged, unsafe, not a ConvNeXt, or not finite.
    """
    loaded = load(Path(path))
    return build(loaded.record, loaded.tensors)


def infer_architecture(
    tensors: Mapping[str, Tensor], *, norm_eps: float, path: Path
) -> Architecture:
    """Read depths, dims, classes and layer scale off canonical tensors.

    Args:
        tensors: Canonical names to tensors.
        norm_eps: LayerNorm eps, as the dialect defines it.
        path: For messages.

    Raises:
        CheckpointError: A tensor that gives the shape is missing or has the wrong rank.
    """
    blocks: dict[int, set[int]] = {}
    for name in tensors:
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    stem = _tensor(tensors, "stem.conv.weight", 4, path)
    depthwise = _tensor(tensors, "stages.0.blocks.0.depthwise.weight", 4, path)
    pw1 = _tensor(tensors, "stages.0.blocks.0.pw1.weight", 2, path)
    head = _tensor(tensors, "head.fc.weight", 2, path)
    dims = [stem.shape[0]]
    for stage in range(1, len(blocks)):
        name = f"stages.{stage}.downsample.conv.weight"
        dims.append(_tensor(tensors, name, 4, path).shape[0])
    try:
        return Architecture(
            depths=tuple(len(blocks[stage]) for stage in range(len(blocks))),
            dims=tuple(dims),
            classes=head.shape[0],
            layer_scale="stages.0.blocks.0.scale.weight" in tensors,
            in_channels=stem.shape[1],
            patch=stem.shape[2],
            kernel=depthwise.shape[2],
            expansion=pw1.shape[0] // max(pw1.shape[1], 1),
            norm_eps=norm_eps,
        )
    except (KeyError, ValidationError) as error:
        raise CheckpointError(
            f"{path}: stages {sorted(blocks)} do not make a ConvNeXt",
            allowed="stages numbered from 0 without gaps",
            do="Check that the file is a whole ConvNeXt classifier",
        ) from error


def _dialect_of(raw: Mapping[str, Tensor], path: Path) -> Dialect:
    known = all_dialects()
    for dialect in known:
        if dialect.matches(raw):
            return dialect
    some = ", ".join(list(raw)[:3]) or "none"
    raise CheckpointError(
        f"{path} is not a ConvNeXt known here: its {len(raw)} tensors begin with {some}",
        allowed="names like " + "; or ".join(f"{d.EXPECTED} ({d.NAME})" for d in known),
        do="Convert the names, or check that this is a ConvNeXt classifier",
    )


def _as_float32(name: str, tensor: Tensor, path: Path) -> Tensor:
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}",
            allowed="floating-point weights",
            do="Give the float checkpoint, not a quantized one",
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{path}: {name} is a {'meta' if tensor.is_meta else tensor.layout} tensor",
            allowed="dense tensors with values",
            do="Save it again with the weights loaded and dense",
        )
    value = tensor.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise CheckpointError(
            f"{path}: {name} has {bad} values that are NaN or infinite",
            allowed="finite weights",
            do="Go back to a checkpoint from before the training diverged",
        )
    return value


def _architecture(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dialect: Dialect, path: Path
) -> Architecture:
    stated = _stated_architecture(metadata, path)
    norm_eps = stated.norm_eps if stated else dialect.NORM_EPS
    inferred = infer_architecture(tensors, norm_eps=norm_eps, path=path)
    # Before a network of the stated size is built: a damaged or hostile file can state any.
    if stated is not None and stated != inferred:
        raise CheckpointError(
            f"{path} states {stated}, but its tensors are of {inferred}",
            allowed="metadata that agrees with the tensors",
            do="Save the checkpoint again",
        )
    return inferred


def _stated_architecture(metadata: Mapping[str, str], path: Path) -> Architecture | None:
    stated = _metadata(metadata)
    if "architecture" not in stated:
        return None
    try:
        return Architecture(**stated["architecture"])
    except (ValidationError, TypeError) as error:
        raise damaged(path, error) from error


def _stated_labels(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    labels = _metadata(metadata).get("labels")
    return tuple(map(str, labels)) if isinstance(labels, list) else None


def _metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        stated = json.loads(metadata.get(METADATA_KEY, "{}"))
    except json.JSONDecodeError:
        return {}
    return stated if isinstance(stated, dict) else {}


def _tensor(tensors: Mapping[str, Tensor], name: str, rank: int, path: Path) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != rank:
        got = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise CheckpointError(
            f"{path}: {name} (canonical name) is {got}",
            allowed=f"a tensor of rank {rank} there",
            do="Check that the file is a whole ConvNeXt classifier, head included",
        )
    return tensor


def _check_against_network(
    tensors: Mapping[str, Tensor], architecture: Architecture, path: Path
) -> None:
    expected = {name: tuple(t.shape) for name, t in empty(architecture).state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found == expected:
        return
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])
    parts = [
        *(f"missing {name}" for name in missing[:3]),
        *(f"unknown {name}" for name in extra[:3]),
        *(f"{name} has shape {found[name]}, not {expected[name]}" for name in wrong[:3]),
    ]
    raise CheckpointError(
        f"{path} is not a ConvNeXt known here: {'; '.join(parts)}"
        f" ({len(missing)} missing, {len(extra)} unknown, {len(wrong)} misshapen)",
        allowed="exactly the tensors of a ConvNeXt classifier (canonical names above)",
        do="Check the architecture; V2, MLP heads and other variants are not read yet",
    )


def _suspicions(tensors: Mapping[str, Tensor]) -> list[str]:
    found = []
    for name, tensor in tensors.items():
        if name.endswith(".weight") and not bool(tensor.any()):
            found.append(f"{name} is all zero")
        elif name.endswith("scale.weight") and bool((tensor == tensor[0]).all()):
            found.append(f"{name} is constant at {float(tensor[0]):g}: untrained?")
    return found
