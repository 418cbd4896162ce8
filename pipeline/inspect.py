"""What a checkpoint file holds, for a person and for a program.

In: a path. Out: facts as JSON-like values, and their table.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pipeline import checkpoint
from pipeline.convnext import count_macs, count_parameters
from pipeline.errors import printable
from pipeline.locate import locate
from pipeline.records import Architecture
from pipeline.sidecar import DEFAULT_INPUT_SIZE, read_sidecar

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from pipeline.records import Weights

USUAL = asdict(Architecture(depths=(1,), dims=(1,), classes=1))


def describe(
    where: str | Path, input_size: int | None, *, weights: Weights = "auto"
) -> dict[str, Any]:
    """Read a checkpoint and count what it holds.

    Args:
        where: What `pipeline.checkpoint.load` takes.
        input_size: Side of the image in pixels; None takes the sidecar's, else 224, or what is
            nearest to it among the multiples of the network's stride.
        weights: Which of a training checkpoint's.

    Returns:
        Facts, with one row per stage under `stages`. Weights that are not finite are a warning.

    Raises:
        CheckpointError: As `pipeline.checkpoint.examine` and `check_input`.
    """
    sidecar = read_sidecar(locate(where))
    loaded = checkpoint.examine(where, weights=weights)
    record, net = loaded.record, loaded.record.architecture
    stated = sidecar.preprocessing.get("input_size") or _default_size(net)
    size = stated if input_size is None else input_size
    checkpoint.check_input(net, size)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in loaded.stored.values()})
    return {
        "path": record.path,
        "sha256": record.sha256,
        "dialect": record.dialect,
        "found_in": record.found_in,
        "variant": record.variant,
        "dtypes": dtypes,
        "classes": net.classes,
        "labels": list(record.labels) if record.labels else None,
        "layer_scale": net.layer_scale,
        "architecture": asdict(net),
        "params": count_parameters(net),
        "macs": count_macs(net, size),
        "input_size": size,
        "preprocessing": sidecar.preprocessing,
        "preprocessing_source": sidecar.source,
        "stages": [
            {"stage": i, "depth": depth, "width": width, "resolution": size // net.reduction(i)}
            for i, (depth, width) in enumerate(zip(net.depths, net.dims, strict=True))
        ],
        "warnings": list(loaded.suspicions),
    }


def _default_size(net: Architecture) -> int:
    return max(round(DEFAULT_INPUT_SIZE / net.stride), 1) * net.stride


def show(facts: dict[str, Any], console: Console) -> None:
    """Print the facts as a table."""
    console.print(
        f"{escape(facts['path'])}: {facts['dialect']} dialect, ConvNeXt {facts['variant']}, "
        f"{facts['params'] / 1e6:.2f} M parameters, {facts['macs'] / 1e9:.3f} G MACs at "
        f"{facts['input_size']} px, {facts['classes']} classes, {', '.join(facts['dtypes'])}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f"sha256 {facts['sha256']}", highlight=False)
    if facts["found_in"]:
        found_in = escape(printable(facts["found_in"]))
        console.print(f"weights found in: {found_in}", highlight=False)
    if features := _features(facts["architecture"]):
        console.print(f"features: {', '.join(features)}", highlight=False)
    table = Table("stage", "depth", "width", "resolution")
    for row in facts["stages"]:
        table.add_row(*(str(row[name]) for name in ("stage", "depth", "width", "resolution")))
    console.print(table)
    for warning in facts["warnings"]:
        console.print(f"[yellow]odd:[/] {escape(printable(warning))}", highlight=False)


def _features(net: dict[str, Any]) -> list[str]:
    """Name what differs from the plain ConvNeXt of 2022."""
    eps, head_eps = net["norm_eps"], net["head_norm_eps"]
    found = {
        "GRN (V2)": net["grn"],
        "no LayerScale": not net["layer_scale"],
        "overlapping stem": net["stem"] == "overlap",
        "overlapping stem with GELU": net["stem"] == "overlap_act",
        "no norm in the stem (isotropic)": not net["stem_norm"],
        "the head normalises before it pools": net["head_norm_first"],
        f"hidden layer of {net['head_width']} in the head": net["head_width"],
        f"patch {net['patch']}": net["stem"] == "patch" and net["patch"] != USUAL["patch"],
        f"kernel {net['kernel']}": net["kernel"] != USUAL["kernel"],
        f"expansion {net['expansion']}": net["expansion"] != USUAL["expansion"],
        f"{net['in_channels']} input channels": net["in_channels"] != USUAL["in_channels"],
        f"LayerNorm eps {eps:g}": eps != USUAL["norm_eps"],
        f"LayerNorm eps {head_eps or 0:g} in the head": head_eps is not None,
    }
    return [name for name, present in found.items() if present]
