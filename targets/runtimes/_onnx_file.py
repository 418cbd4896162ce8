"""Reading ONNX files: without external data, into a session, and what their weights are.

In: a path. Out: the file as onnx parses it, or a session of onnxruntime, on the CPU where no other
provider is asked for.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError
from pipeline.store import library_versions
from targets.base import INPUT_NAME, OUTPUT_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx

    from targets.base import Image, Logits, Session

    Provider = tuple[str, dict[str, str]]

WEIGHT_INPUT = {"Conv": 1, "Gemm": 1, "MatMulInteger": 1}
UNPACKING_OPS = ("Cast", "DequantizeLinear", "Mul")
CPU = "CPUExecutionProvider"
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
"""Versions of onnxruntime that do not know it ignore it."""


def distribution() -> str:
    """Return the name under which onnxruntime is installed: the one with CUDA has its own."""
    installed = library_versions(("onnxruntime", "onnxruntime-gpu"))
    return next((name for name, version in installed.items() if version), "onnxruntime")


def load(path: Path) -> onnx.ModelProto:
    """Parse a file.

    Raises:
        ArtifactError: It is damaged, or refers to other files.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no public home
        raise ArtifactError(
            f"{path} is not an ONNX file ({type(error).__name__})",
            allowed="an artifact that `convnext-edge export` wrote",
            do="Export it again",
        ) from error
    graphs = [model.graph, *model.functions]
    if any(tensor.external_data for graph in graphs for tensor in constants(graph)):
        raise ArtifactError(
            f"{path} refers to external data",
            allowed="an ONNX file with its weights inside",
            do="Export it again with this project",
        )
    return model


def constants(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """Yield every constant, wherever a file can hide one that names another file."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from constants(inner)


def session(
    path: Path,
    *,
    threads: int,
    provider: Provider = (CPU, {}),
    optimised: Path | None = None,
    profiled: Path | None = None,
) -> Any:
    """Return a session of onnxruntime.

    Args:
        path: The file.
        threads: Of an inference.
        provider: What computes, with its options. Onnxruntime takes the CPU where it cannot have
            it, and for the operations that it lacks: `elsewhere` tells.
        optimised: Takes the graph that it really executes.
        profiled: The beginning of the name of the file that takes the time of every operation.
    """
    # Its sender is a thread beside what is timed, and tells others what is run here.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    if profiled is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profiled)
    if provider[0] != CPU:
        options.add_session_config_entry(RECORD_PLACEMENT, "1")
    return onnxruntime.InferenceSession(
        str(path), options, providers=[provider], enable_fallback=False
    )


def elsewhere(running: Any, provider: str) -> dict[str, int]:
    """Count the operations of a session that another provider than the one asked for computes.

    Args:
        running: As `session` gave it.
        provider: What was asked for.

    Returns:
        Type to number; empty also where this onnxruntime does not tell.
    """
    if not hasattr(running, "get_provider_graph_assignment_info"):
        return {}
    return dict(
        Counter(
            node.op_type
            for part in running.get_provider_graph_assignment_info()
            if part.ep_name != provider
            for node in part.get_nodes()
        )
    )


def as_session(running: Any) -> Session:
    """Return a session of onnxruntime on one of our artifacts as this project calls sessions."""

    def run(image: Image) -> Logits:
        logits: Logits = running.run([OUTPUT_NAME], {INPUT_NAME: image})[0]
        return logits

    return run


def integer_weights(model: onnx.ModelProto) -> int:
    """Count the layers whose weights lie in a file as int8."""
    from onnx import TensorProto

    int8 = {c.name for c in model.graph.initializer if c.data_type == TensorProto.INT8}
    made_by = {name: node for node in model.graph.node for name in node.output}

    def stored(name: str) -> str:
        node = made_by.get(name)
        return name if node is None or node.op_type not in UNPACKING_OPS else stored(node.input[0])

    return sum(
        stored(node.input[WEIGHT_INPUT[node.op_type]]) in int8
        for node in model.graph.node
        if node.op_type in WEIGHT_INPUT
    )
