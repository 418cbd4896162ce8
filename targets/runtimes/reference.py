"""The reference: the contract's arithmetic, run by torch in float32.

In: a `Graph`. Out: one .safetensors file with the quantized model and the export in its metadata.
Every other runtime is held against this one: `evaluate` runs any runtime's graph, so that the same
integers at the same sites can be compared.

Where a runtime quantizes activations itself (w8a8-dynamic) the reference computes them in float:
only the weights are the record's. In w8 that is all there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.arithmetic import dequantize, quantize
from pipeline.errors import ArtifactError
from pipeline.records import SCHEMES, Export, Proof, QuantizedModel, to_json
from targets import graph as g
from targets.base import METADATA_KEY, Capabilities, NotRun, require_installed
from targets.runtimes._counts import computing_layers
from targets.translate import build_graph

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from targets.base import Image, Logits, OpTime, Session


class Reference:
    """The runtime `reference`."""

    name = "reference"
    capabilities = Capabilities(
        suffix=".reference.safetensors",
        layout="NCHW",
        extra="reference",
        distributions=("torch",),
        schemes=SCHEMES,
        graph_forms=("eager",),
        gelu="erf",
        default_isa="arm",
    )

    def export(self, graph: g.Graph, path: Path, metadata: str) -> None:
        """Write the graph's own model and arrays; see `targets.base.Runtime`."""
        arrays = {name: np.ascontiguousarray(array) for name, array in graph.arrays.items()}
        stated = {
            METADATA_KEY: metadata,
            "model": to_json(graph.model).decode(),
            "export": to_json(graph.export).decode(),
        }
        save_file(arrays, path, stated)

    def prove(self, path: Path, graph: g.Graph) -> Proof:
        """Count in the graph itself, which is what this runtime runs."""
        read = _read(path)
        kinds = [type(op).__name__ for op in read.ops]
        return Proof(
            method="operations of the graph, which torch evaluates one by one",
            integer_layers=sum(_reads_integers(op, read) for op in read.weighted),
            expected_integer_layers=computing_layers(graph),
            weighted_layers=len(graph.weighted),
            transposes_per_block=0.0,
            quantize_ops_per_block=len(graph.sites) / graph.blocks,
            op_counts={kind: kinds.count(kind) for kind in sorted(set(kinds))},
            integer_weights=read.integer_layers,
        )

    def read_metadata(self, path: Path) -> str:
        """Return the metadata entry."""
        return _open(path)[0].get(METADATA_KEY, "")

    def can_run(self) -> NotRun | None:
        """The reference runs wherever torch is installed."""
        require_installed(self)
        return None

    def op_times(
        self, path: Path, image: Image, *, threads: int, inferences: int
    ) -> list[OpTime] | NotRun:
        """Return that its time tells nothing."""
        return NotRun(reason="the reference is made to be right, not fast")

    def load(self, path: Path, threads: int) -> Session:
        """Return a session that evaluates the graph."""
        import torch

        torch.set_num_threads(threads)
        graph = _read(path)

        def run(image: Image) -> Logits:
            return evaluate(graph, image)

        return run


def _open(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), arrays
    except (SafetensorError, OSError) as error:
        raise _not_an_artifact(path, error) from error


def _read(path: Path) -> g.Graph:
    metadata, arrays = _open(path)
    try:
        model = TypeAdapter(QuantizedModel).validate_json(metadata["model"])
        export = TypeAdapter(Export).validate_json(metadata["export"])
    except (KeyError, ValidationError) as error:
        raise _not_an_artifact(path, error) from error
    return build_graph(model, arrays, Reference.capabilities, export)


def _reads_integers(op: g.Weighted, graph: g.Graph) -> bool:
    return op.integers is not None and isinstance(graph[op.inputs[0]], g.QuantizePair)


def _not_an_artifact(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path} is not a reference artifact ({type(error).__name__})",
        allowed="an artifact that `convnext-edge export` wrote",
        do="Export it again",
    )


def evaluate(graph: g.Graph, image: Image) -> Logits:
    """Run a graph by the contract.

    Args:
        graph: Of any runtime.
        image: float32 (N, C, H, W), pixels in [0, 255]; of float64 all is computed in float64.

    Returns:
        Logits of the image's type, (N, classes).
    """
    import torch
    from torch.nn import functional

    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, image.dtype))

    def step(op: g.Op, x: list[torch.Tensor]) -> torch.Tensor:
        match op:
            case g.Input():
                return tensor(image)
            case g.Conv():
                weight, bias = map(tensor, op.values())
                return functional.conv2d(
                    x[0], weight, bias, op.stride, op.padding, groups=op.groups
                )
            case g.Linear():
                weight, bias = map(tensor, op.values())
                return functional.linear(x[0].movedim(1, -1), weight, bias).movedim(-1, 1)
            case g.Norm():
                gamma, beta = (None if a is None else tensor(a) for a in (op.weight, op.bias))
                y = functional.layer_norm(x[0].movedim(1, -1), op.shape[:1], gamma, beta, op.eps)
                return y.movedim(-1, 1)
            case g.Gelu():
                return functional.gelu(x[0], approximate=graph.export.gelu.replace("erf", "none"))
            case g.ResponseNorm():
                response = torch.linalg.vector_norm(x[0], dim=(2, 3), keepdim=True)
                relative = response / (response.mean(dim=1, keepdim=True) + op.eps)
                factor: torch.Tensor = 1 + relative * tensor(op.weight)[:, None, None]
                return x[0] * factor
            case g.Scale():
                return x[0] * tensor(op.weight).reshape(1, -1, *[1] * (len(op.shape) - 1))
            case g.Shift():
                return x[0] + tensor(op.bias)[:, None, None]
            case g.Add():
                return x[0] + x[1]
            case g.Mean():
                return x[0].mean(dim=(2, 3))
            case g.QuantizePair():
                q = quantize(x[0].numpy(), op.parameters)
                return tensor(dequantize(q, op.parameters))
        msg = f"{type(op).__name__} has no meaning here"
        raise NotImplementedError(msg)

    values: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for op in graph.ops:
            values[op.name] = step(op, [values[name] for name in op.inputs])
    return values[graph.ops[-1].name].numpy()


RUNTIME = Reference()
