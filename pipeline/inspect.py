"""What a checkpoint file holds, for a person and for a program.

In: a path. Out: facts as JSON-like values, and their table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pipeline import checkpoint
from pipeline.convnext import count_macs, count_parameters
from pipeline.sidecar import DEFAULT_INPUT_SIZE, read_sidecar

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def describe(path: Path, input_size: int | None) -> dict[str, Any]:
    """Read a checkpoint and count what it holds.

    Args:
        path: The file.
        input_size: Side of the image in pixels; None takes the sidecar's, else 224.

    Returns:
        Facts, with one row per stage under `stages`.

    Raises:
        CheckpointError: As `pipeline.checkpoint.load` and `check_input`.
    """
    sidecar = read_sidecar(path)
    loaded = checkpoint.load(path, labels=sidecar.labels)
    record, net = loaded.record, loaded.record.architecture
    stated = sidecar.preprocessing.get("input_size", DEFAULT_INPUT_SIZE)
    size = stated if input_size is None else input_size
    checkpoint.check_input(net, size)
    return {
        "path": record.path,
        "sha256": record.sha256,
        "dialect": record.dialect,
        "variant": record.variant,
        "dtypes": list(loaded.dtypes),
        "classes": net.classes,
        "labels": list(record.labels) if record.labels else None,
        "layer_scale": net.layer_scale,
        "params": count_parameters(net),
        "macs": count_macs(net, size),
        "input_size": size,
        "stages": [
            {"stage": i, "depth": depth, "width": width, "resolution": size // net.patch // 2**i}
            for i, (depth, width) in enumerate(zip(net.depths, net.dims, strict=True))
        ],
        "warnings": list(loaded.warnings),
    }


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
    table = Table("stage", "depth", "width", "resolution")
    for row in facts["stages"]:
        table.add_row(*(str(row[name]) for name in ("stage", "depth", "width", "resolution")))
    console.print(table)
    for warning in facts["warnings"]:
        console.print(f"[yellow]odd:[/] {escape(warning)}", highlight=False)
