"""One artifact: the shared graph laid out by a runtime, with its metadata and its proof.

In: a folder with a `QuantizedModel` and an `Export`. Out: the artifact's file or files in a folder,
and what the runtime says that it executes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from pipeline import quantize
from pipeline.errors import ArtifactError
from pipeline.records import Export, Preprocessing
from pipeline.store import sha256_file, size_bytes
from targets.base import (
    ARTIFACT_STEM,
    INPUT_NAME,
    OUTPUT_NAME,
    check_expressible,
    of_suffix,
    require_installed,
    runtime,
)
from targets.translate import build_graph

if TYPE_CHECKING:
    from pipeline.records import QuantizedModel
    from pipeline.worker import Progress
    from targets.base import Capabilities, Runtime


def export_stage(
    model: str, export: dict[str, Any], folder: str, progress: Progress
) -> dict[str, Any]:
    """Write one artifact into a folder and prove it.

    Args:
        model: Folder with params.json and tensors.safetensors.
        export: An `Export` as JSON.
        folder: Existing, empty; takes the artifact.
        progress: Called before, between and after writing and proving.

    Returns:
        `path` (the name in the folder), `sha256`, `size_bytes`, `files` (name to sha256), `sites`
        and `proof`, as JSON.

    Raises:
        ArtifactError: The runtime does not execute what was written.
    """
    wanted = TypeAdapter(Export).validate_python(export)
    target = runtime(wanted.runtime)
    require_installed(target)
    check_expressible(wanted, target)
    progress(0, 2)
    record, arrays = quantize.read(Path(model))
    graph = build_graph(record, arrays, target.capabilities, wanted)
    path = Path(folder) / f"{ARTIFACT_STEM}{target.capabilities.suffix}"
    target.export(graph, path, metadata(record, wanted, target.capabilities))
    progress(1, 2)
    proof = target.prove(path, graph)
    progress(2, 2)
    if proof.integer_layers != proof.expected_integer_layers:
        raise ArtifactError(
            f"{wanted.runtime} runs {proof.integer_layers} layers in integers, not the "
            f"{proof.expected_integer_layers} that were written",
            allowed="every layer of the placement in integers",
            do="Use the runtime's version in constraints.txt, or report it: this is a bug",
        )
    if proof.integer_weights not in {None, graph.integer_layers}:
        raise ArtifactError(
            f"{path.name} holds {proof.integer_weights} layers' weights in integers, not the "
            f"{graph.integer_layers} that were given",
            allowed="every layer of the placement with integer weights",
            do="Report it: this is a bug",
        )
    files = {item.name: sha256_file(item) for item in sorted(Path(folder).iterdir())}
    return {
        "path": path.name,
        "sha256": sha256_file(path),
        "size_bytes": sum(size_bytes(item) for item in Path(folder).iterdir()),
        "files": files,
        "sites": list(graph.sites),
        "proof": asdict(proof),
    }


def metadata(model: QuantizedModel, export: Export, capabilities: Capabilities) -> str:
    """Return the JSON that goes into an artifact: its interface, labels and provenance."""
    size, channels = model.preprocessing.input_size, model.architecture.in_channels
    shape = [channels, size, size] if capabilities.layout == "NCHW" else [size, size, channels]
    document = {
        "interface": 1,
        "input": {
            "name": INPUT_NAME,
            "dtype": "float32",
            "layout": capabilities.layout,
            "shape": [export.batch, *shape],
            "color": "RGB",
            "range": [0, 255],
        },
        "output": {"name": OUTPUT_NAME, "dtype": "float32"},
        "labels": model.labels,
        "preprocessing": asdict(model.preprocessing),
        "export": asdict(export),
        "parents": model.parents,
    }
    return json.dumps(document, sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """What an artifact says of itself; `labels` is None where it carries none."""

    runtime: Runtime
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    batch: int


def read_metadata(path: Path) -> Stated:
    """Read what an artifact says of itself.

    Args:
        path: The artifact.

    Returns:
        Its runtime, preprocessing, labels and batch (1 where that is dynamic).

    Raises:
        ArtifactError: There is no such artifact, it is damaged, or this project did not make it.
        UsageError: Its ending belongs to no runtime.
    """
    known = of_suffix(path)
    if not path.exists():
        raise ArtifactError(
            f"no such artifact: {path}",
            allowed="the path of an exported artifact",
            do="Look in RUN_DIR/artifacts",
        )
    require_installed(known)
    try:
        document = json.loads(known.read_metadata(path))
        preprocessing = TypeAdapter(Preprocessing).validate_python(document["preprocessing"])
        labels, batch = document["labels"], document["input"]["shape"][0]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} carries no metadata of convnext-edge",
            allowed="an artifact that `convnext-edge export` wrote",
            do="Export it again",
        ) from error
    return Stated(
        runtime=known,
        preprocessing=preprocessing,
        labels=tuple(labels) if labels else None,
        batch=batch if isinstance(batch, int) else 1,
    )
