"""A checkpoint becomes a canonical network.

In: whatever `pipeline.locate` understands. Out: a `Checkpoint` record with its canonical tensors,
and from the two a `ConvNeXt`. Nothing is executed from a file: pickles are read with
`weights_only=True`, and every tensor is checked against the network it claims to be.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.convnext import ConvNeXt, count_macs, count_parameters, empty, variant
from pipeline.dialect import dialect_of
from pipeline.errors import CheckpointError
from pipeline.infer import infer_architecture
from pipeline.loaded import RECORD, TENSORS, read_record
from pipeline.locate import locate
from pipeline.records import IMAGE_CHANNELS, Architecture, Checkpoint, to_json
from pipeline.sidecar import read_sidecar
from pipeline.store import write_atomic
from pipeline.tensorfile import read_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pipeline.dialect import Dialect
    from pipeline.records import Weights
    from pipeline.sidecar import Sidecar
    from pipeline.worker import Progress

METADATA_KEY = "convnext-edge"
NAMED = 3
"""How many names a message shows before it only counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint's record, its tensors, and what was seen of them.

    Attributes:
        record: What it is.
        tensors: float32, under canonical names.
        stored: The same in the file's own dtypes.
        suspicions: What looked odd in the weights.
        not_finite: Names of the tensors that hold NaN or infinities.
    """

    record: Checkpoint
    tensors: dict[str, Tensor]
    stored: dict[str, Tensor]
    suspicions: tuple[str, ...]
    not_finite: tuple[str, ...]


def load(where: str | Path, *, weights: Weights = "auto") -> LoadedCheckpoint:
    """Read and check a checkpoint.

    Args:
        where: What `pipeline.locate.locate` takes: a file, an index of shards, a folder, `hf:...`.
        weights: Which of a training checkpoint's weights: `ema`, `model`, or `auto`, the EMA where
            there is one.

    Returns:
        The record with its tensors.

    Raises:
        CheckpointError: As `examine`; or weights are NaN or infinite.
    """
    loaded = examine(where, weights=weights)
    if loaded.not_finite:
        raise CheckpointError(
            f"{where}: {_some(loaded.not_finite)} hold values that are NaN or infinite",
            allowed="finite weights",
            do="Go back to a checkpoint from before the training diverged",
        )
    return loaded


def examine(where: str | Path, *, weights: Weights = "auto") -> LoadedCheckpoint:
    """Read a checkpoint as `load` does, and take weights that are not finite too.

    Raises:
        CheckpointError: It is missing, damaged, unsafe, or not a ConvNeXt classifier.
    """
    located = locate(where)
    sidecar = read_sidecar(located)
    file = read_tensors(located.files, weights)
    dialect = dialect_of(file.tensors, str(where))
    stored = dialect.canonical(file.tensors)
    tensors = {name: _as_float32(name, tensor, str(where)) for name, tensor in stored.items()}
    traits = dialect.traits(file.tensors)
    metadata = _stated(file.metadata)
    architecture = _architecture(tensors, dialect, traits, sidecar, metadata, str(where))
    _check_against_network(tensors, architecture, _Names(dialect, file.tensors), str(where))
    not_finite = tuple(n for n, t in tensors.items() if not bool(torch.isfinite(t).all()))
    record = Checkpoint(
        path=str(where),
        sha256=located.sha256(),
        dialect=dialect.NAME,
        architecture=architecture,
        variant=variant(architecture),
        labels=_labels(sidecar, metadata, architecture, str(where)),
        found_in=file.wrapper or None,
    )
    return LoadedCheckpoint(
        record=record,
        tensors=tensors,
        stored=stored,
        suspicions=tuple(_suspicions(tensors, not_finite)),
        not_finite=not_finite,
    )


def write(folder: Path, loaded: LoadedCheckpoint) -> None:
    """Write the record and its canonical tensors into an existing folder."""
    (folder / RECORD).write_bytes(to_json(loaded.record))
    safetensors.torch.save_file(loaded.tensors, folder / TENSORS)


def read(folder: Path) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Read what `write` wrote."""
    return read_record(folder), safetensors.torch.load_file(folder / TENSORS)


def load_stage(
    where: str, weights: Weights, input_size: int, channels: int, folder: str, progress: Progress
) -> dict[str, Any]:
    """Read a checkpoint and keep its record and tensors in a folder.

    Args:
        where: What `load` takes.
        weights: As `load`.
        input_size: Side of the image in pixels, for counting.
        channels: Of the images: 3, or 1 for grey.
        folder: Takes checkpoint.json and tensors.safetensors.
        progress: Called before and after.

    Returns:
        `params`, `macs`, and `warnings`: what looked odd in the weights.

    Raises:
        CheckpointError: As `load`; or the network cannot take such images.
    """
    progress(0, 1)
    loaded = load(where, weights=weights)
    architecture = loaded.record.architecture
    check_input(architecture, input_size)
    check_channels(architecture, channels)
    write(Path(folder), loaded)
    progress(1, 1)
    return {
        "warnings": list(loaded.suspicions),
        "params": count_parameters(architecture),
        "macs": count_macs(architecture, input_size),
    }


def check_input(architecture: Architecture, input_size: int) -> None:
    """Check that the network can take images of this size.

    Raises:
        CheckpointError: It cannot.
    """
    stride = architecture.stride
    if not isinstance(input_size, int) or input_size < 1:  # a sidecar can state anything
        raise CheckpointError(
            f"input size {input_size!r} is not a number of pixels",
            allowed=f"multiples of {stride}",
            do="Correct input_size in the sidecar .json or give --input-size",
        )
    if input_size % stride:
        below = input_size // stride * stride
        near = [str(size) for size in (below, below + stride) if size]
        raise CheckpointError(
            f"input size {input_size} is not a multiple of {stride}",
            allowed=f"multiples of {stride}",
            do=f"Give --input-size {' or '.join(near)}",
        )


def check_channels(architecture: Architecture, channels: int) -> None:
    """Check that the network takes images of as many channels as the preprocessing makes.

    Raises:
        CheckpointError: It does not.
    """
    takes = architecture.in_channels
    if takes not in IMAGE_CHANNELS:
        raise CheckpointError(
            f"the network takes {takes} channels",
            allowed="3, for RGB images, or 1, for grey ones",
            do="Give a checkpoint trained on images",
        )
    if takes != channels:
        raise CheckpointError(
            f"the network takes {takes} channels, mean and std are of {channels}",
            allowed="as many numbers in mean and std as the network takes channels",
            do="Give --mean and --std as it was trained"
            + (", such as --mean 0.5 --std 0.5" if takes == 1 else ""),
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
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = own_metadata(model.architecture, labels)
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def own_metadata(architecture: Architecture, labels: tuple[str, ...] | None) -> dict[str, str]:
    """Return what a safetensors file of the own dialect states of itself."""
    stated = {"architecture": asdict(architecture), "labels": labels and list(labels)}
    return {METADATA_KEY: json.dumps(stated)}


def load_model(path: str | Path) -> ConvNeXt:
    """Load any supported checkpoint as the canonical network.

    Args:
        path: A .pth, .pt, .bin or .safetensors file, an index of shards, a Hugging Face folder, or
            `hf:owner/name`.

    Returns:
        The network in eval mode: float32 NCHW of shape (N, in_channels, H, W), normalised by the
        mean and std it was trained with, to logits (N, classes).

    Raises:
        CheckpointError: It is missing, damaged, unsafe, not a ConvNeXt classifier, or not finite.
    """
    loaded = load(path)
    return build(loaded.record, loaded.tensors)


def _as_float32(name: str, tensor: Tensor, where: str) -> Tensor:
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{where}: {name} is {tensor.dtype}",
            allowed="floating-point weights",
            do="Give the float checkpoint, not a quantized one",
        )
    return tensor.detach().to(torch.float32).contiguous()


def _architecture(
    tensors: Mapping[str, Tensor],
    dialect: Dialect,
    traits: Collection[str],
    sidecar: Sidecar,
    stated: Mapping[str, Any],
    where: str,
) -> Architecture:
    claimed = _claimed_architecture(stated, where)
    if claimed is not None:
        norm_eps, head_norm_eps = claimed.norm_eps, claimed.head_norm_eps
        traits = _traits_of(claimed)
    else:
        norm_eps, head_norm_eps = dialect.norm_eps(tensors)
        norm_eps = sidecar.norm_eps or norm_eps
        head_norm_eps = sidecar.head_norm_eps or head_norm_eps
    inferred = infer_architecture(
        tensors, norm_eps=norm_eps, head_norm_eps=head_norm_eps, traits=traits, where=where
    )
    # Before a network of the stated size is built: a damaged or hostile file can state any.
    if claimed is not None and claimed != inferred:
        raise CheckpointError(
            f"{where} states {claimed}, but its tensors are of {inferred}",
            allowed="metadata that agrees with the tensors",
            do="Save the checkpoint again",
        )
    return inferred


def _traits_of(architecture: Architecture) -> frozenset[str]:
    has = {
        "overlap_act": architecture.stem == "overlap_act",
        "head_norm_first": architecture.head_norm_first,
    }
    return frozenset(trait for trait, present in has.items() if present)


def _stated(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        stated = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):  # more digits, or deeper, than Python reads
        return {}
    return stated if isinstance(stated, dict) else {}


def _claimed_architecture(stated: Mapping[str, Any], where: str) -> Architecture | None:
    if "architecture" not in stated:
        return None
    try:
        return Architecture(**stated["architecture"])
    except (ValidationError, TypeError) as error:
        raise CheckpointError(
            f"{where} states an architecture that is none ({type(error).__name__})",
            allowed="metadata as `convnext-edge convert` writes it",
            do="Save the checkpoint again",
        ) from error


def _labels(
    sidecar: Sidecar, stated: Mapping[str, Any], architecture: Architecture, where: str
) -> tuple[str, ...] | None:
    own = stated.get("labels")
    labels = sidecar.labels or (tuple(map(str, own)) if isinstance(own, list) else None)
    if odd := [label for label in labels or () if not label.isprintable()]:
        raise CheckpointError(
            f"{where}: the class name {odd[0]!r} cannot be shown",
            allowed="printable names",
            do="Correct `classes` in the sidecar .json, or id2label in config.json",
        )
    if labels is not None and len(labels) != architecture.classes:
        raise CheckpointError(
            f"{where}: {len(labels)} class names for {architecture.classes} classes",
            allowed="one name per row of the head",
            do="Correct `classes` in the sidecar .json, or id2label in config.json",
        )
    return labels


class _Names:
    """What a checkpoint file calls the tensors of the network."""

    def __init__(self, dialect: Dialect, stored: Mapping[str, Tensor]) -> None:
        self.dialect = dialect
        self.stored = stored

    def of(self, name: str, tensor: Tensor, architecture: Architecture) -> str:
        """Return the file's name of a tensor, whether it is in the file or should be."""
        for own, one in self.stored.items():
            if name in self.dialect.canonical({own: one}):
                return own
        try:
            [own] = self.dialect.original({name: tensor}, architecture)
        except CheckpointError:  # it has no word for that network, of which something is missing
            return f"{name} (canonical name)"
        return own


def _check_against_network(
    tensors: Mapping[str, Tensor], architecture: Architecture, names: _Names, where: str
) -> None:
    whole = empty(architecture).state_dict()
    expected = {name: tuple(t.shape) for name, t in whole.items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found == expected:
        return
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])

    def called(name: str) -> str:
        return names.of(name, tensors[name] if name in tensors else whole[name], architecture)

    parts = [
        *(f"missing {called(name)}" for name in missing[:NAMED]),
        *(f"unknown {called(name)}" for name in extra[:NAMED]),
        *(
            f"{called(name)} has shape {found[name]}, not {expected[name]}"
            for name in wrong[:NAMED]
        ),
    ]
    raise CheckpointError(
        f"{where} is not a ConvNeXt known here: {'; '.join(parts)}"
        f" ({len(missing)} missing, {len(extra)} unknown, {len(wrong)} misshapen)",
        allowed="exactly the tensors of a ConvNeXt classifier",
        do="Check that the file is whole and that nothing was added to the network",
    )


def _suspicions(tensors: Mapping[str, Tensor], not_finite: Collection[str]) -> list[str]:
    zero, constant = [], []
    for name, tensor in tensors.items():
        if name.endswith(".weight") and not bool(tensor.any()):
            zero.append(name)
        elif name.endswith(".scale.weight") and bool((tensor == tensor[0]).all()):
            constant.append(name)
    found = [f"{_some(not_finite)}: NaN or infinite"] if not_finite else []
    found += [f"{_some(zero)}: all zero"] if zero else []
    if constant:
        value = float(tensors[constant[0]][0])
        found.append(
            f"{_some(constant)}: constant at {value:g}, as LayerScale is initialised: untrained?"
        )
    return found


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
