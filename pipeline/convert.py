"""The way back: a checkpoint in another project's names and shapes.

In: any checkpoint and a dialect. Out: a file, or for Hugging Face a folder, that the other project
loads. Values and dtypes are the checkpoint's own, bit for bit.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from pipeline.checkpoint import LoadedCheckpoint, load, own_metadata
from pipeline.dialect import all_dialects
from pipeline.errors import UsageError
from pipeline.locate import locate
from pipeline.sidecar import DEFAULT_INPUT_SIZE, read_sidecar
from pipeline.store import write_atomic, writing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipeline.dialect import Dialect
    from pipeline.records import Weights

PICKLED = (".pth", ".pt", ".bin")
SAFE = ".safetensors"
OWN, HF = "own", "hf"
HF_FILES = ("config.json", "model.safetensors")


def convert(where: str | Path, to: str, out: Path, *, weights: Weights = "auto") -> list[str]:
    """Write a checkpoint in another dialect, whole or not at all.

    Args:
        where: What `pipeline.checkpoint.load` takes.
        to: A dialect: meta, timm, torchvision, hf, or own.
        out: A .safetensors, .pth, .pt or .bin file; for hf a folder too.
        weights: As `pipeline.checkpoint.load`.

    Returns:
        What the new file cannot carry, one sentence each.

    Raises:
        UsageError: There is no such dialect, `out` ends in something else, or what is not a
            checkpoint would be replaced.
        CheckpointError: The checkpoint cannot be read, or the dialect cannot express it.
    """
    known = all_dialects()
    if to not in known:
        raise UsageError(
            f"--to {to}", allowed=", ".join(known), do="Name the project that is to load the file"
        )
    as_folder = to == HF and not out.suffix
    # Only safetensors hold what own states of itself: eps, class names, variants.
    endings = (SAFE,) if to == OWN else (SAFE, *PICKLED)
    if not as_folder and out.suffix not in endings:
        raise UsageError(
            f"--out {out}",
            allowed=f"for {to} a file ending in {', '.join(endings)}"
            + (" or a folder" if to == HF else ""),
            do="Correct --out",
        )
    _check_place(out, as_folder=as_folder)
    loaded = load(where, weights=weights)
    architecture = loaded.record.architecture
    original = known[to].original(loaded.stored, architecture)
    tensors = {name: tensor.contiguous() for name, tensor in original.items()}
    metadata = own_metadata(architecture, loaded.record.labels) if to == OWN else {"format": "pt"}
    if as_folder:
        _write_folder(out, _hf_config(loaded, where), tensors, metadata)
    elif out.suffix == SAFE:
        write_atomic(out, safetensors.torch.save(tensors, metadata))
    else:
        buffer = io.BytesIO()
        torch.save({"model": tensors} if to == "meta" else tensors, buffer)
        write_atomic(out, buffer.getvalue())
    lost = _lost(known[to], loaded, to, as_folder=as_folder)
    if read_sidecar(locate(where)).preprocessing:
        lost.append("how images are prepared has no place in it: keep the file that says so")
    return lost


def _check_place(out: Path, *, as_folder: bool) -> None:
    """Refuse to replace what `convert` did not write: a rename takes all of it away."""
    if not out.is_dir():
        return
    strange = sorted(item.name for item in out.iterdir() if item.name not in HF_FILES)
    if as_folder and not strange and out.name:
        return
    holds = f", which holds {strange[0]}" if strange else ""
    raise UsageError(
        f"--out {out} is a folder that is there{holds}",
        allowed="a new name, or a checkpoint that is to be written over",
        do="Give another --out",
    )


def _lost(dialect: Dialect, loaded: LoadedCheckpoint, to: str, *, as_folder: bool) -> list[str]:
    """Say what the new file leaves out."""
    if to == OWN:
        return []
    net, lost = loaded.record.architecture, []
    norm_eps, head_norm_eps = dialect.norm_eps(loaded.tensors)
    states_head = as_folder  # config.json has the head's eps
    if norm_eps != net.norm_eps:
        lost.append(f"LayerNorm eps is {net.norm_eps:g}, {to} computes with {norm_eps:g}")
    ours, theirs = net.head_norm_eps or net.norm_eps, head_norm_eps or norm_eps
    if ours != theirs and not states_head:
        lost.append(f"the head's LayerNorm eps is {ours:g}, {to} computes with {theirs:g}")
    if loaded.record.labels and not as_folder:
        lost.append("class names have no place in the file")
    if loaded.record.labels and len(set(loaded.record.labels)) < len(loaded.record.labels):
        lost.append("class names that stand for several classes: label2id has the last of each")
    return lost


def _hf_config(loaded: LoadedCheckpoint, where: str | Path) -> dict[str, Any]:
    net = loaded.record.architecture
    family, kind = ("ConvNextV2", "convnextv2") if net.grn else ("ConvNext", "convnext")
    labels = loaded.record.labels or tuple(f"LABEL_{i}" for i in range(net.classes))
    size = read_sidecar(locate(where)).preprocessing.get("input_size", DEFAULT_INPUT_SIZE)
    config: dict[str, Any] = {
        "architectures": [f"{family}ForImageClassification"],
        "model_type": kind,
        "num_channels": net.in_channels,
        "patch_size": net.patch,
        "num_stages": len(net.depths),
        "depths": list(net.depths),
        "hidden_sizes": list(net.dims),
        "hidden_act": "gelu",
        "layer_norm_eps": net.head_norm_eps or net.norm_eps,
        "image_size": size,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "dtype": str(loaded.stored["stem.conv.weight"].dtype).removeprefix("torch."),
    }
    if not net.grn:
        # transformers has LayerScale where this is above 0; the value itself is trained over.
        config["layer_scale_init_value"] = 1e-6 if net.layer_scale else 0.0
    return config


def _write_folder(
    out: Path,
    config: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
) -> None:
    with writing(out) as folder:
        folder.mkdir()
        (folder / HF_FILES[0]).write_text(json.dumps(config, indent=2) + "\n")
        safetensors.torch.save_file(tensors, folder / HF_FILES[1], metadata)
