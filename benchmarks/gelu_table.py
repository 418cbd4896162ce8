"""GELU as a lookup: onnxruntime's Gather in a table of 256 values beside its own Gelu.

In: how many rows of how many channels. Out: one table with the CPU time of one inference of each,
one thread, in turns. A lookup reads and writes the integers of a grid, so what it would replace is
Gelu and the QuantizeLinear behind it.

    python benchmarks/gelu_table.py --rows 3136 --channels 384
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from pipeline.statistics import percentile
from targets.devices.local import cpu_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Run = Callable[[NDArray[Any]], NDArray[Any]]

TURNS, SCALE, ZERO = 31, 0.05, 128
GELU, TABLE = "Gelu, QuantizeLinear", "Cast, Gather"


def models(shape: Sequence[int]) -> dict[str, Run]:
    """Return what takes float values, and what takes their integers, to the integers of GELU."""
    floats = [_info("x", TensorProto.FLOAT, shape)]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [SCALE])
    zero = helper.make_tensor("zero", TensorProto.UINT8, [], [ZERO])
    nodes = [
        helper.make_node("Gelu", ["x"], ["g"]),
        helper.make_node("QuantizeLinear", ["g", "scale", "zero"], ["y"]),
    ]
    gelu = _session(nodes, floats, [scale, zero], shape)
    values = ((np.arange(256) - ZERO) * SCALE).astype(np.float32)
    entries = _session(nodes, [_info("x", TensorProto.FLOAT, [256])], [scale, zero], [256])(values)
    table = helper.make_tensor("table", TensorProto.UINT8, [256], entries.tolist())
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "i"], ["y"]),
    ]
    lookup = _session(nodes, [_info("x", TensorProto.UINT8, shape)], [table], shape)
    return {GELU: gelu, TABLE: lookup}


def inputs(shape: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Return the same values for both: integers, and what these stand for."""
    integers = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return {GELU: ((integers.astype(np.float32) - ZERO) * SCALE), TABLE: integers}


def _info(name: str, kind: int, shape: Sequence[int]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _session(nodes: list[Any], given: list[Any], constants: list[Any], shape: Sequence[int]) -> Run:
    graph = helper.make_graph(
        nodes, "gelu", given, [_info("y", TensorProto.UINT8, shape)], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})[0]


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=3136)
    parser.add_argument("--channels", type=int, default=384)
    options = parser.parse_args()
    shape = (options.rows, options.channels)
    runs, given = models(shape), inputs(shape)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name in [name for _ in range(TURNS) for name in runs]:
        begin = time.process_time_ns()
        runs[name](given[name])
        samples[name].append((time.process_time_ns() - begin) / 1e6)
    table = Table(title=f"{options.rows} x {options.channels}, {cpu_name()}")
    table.add_column("operations")
    table.add_column("CPU ms", justify="right")
    for name, times in samples.items():
        table.add_row(name, f"{percentile(times[1:], 50):.2f}")  # the first is a warm-up
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main()
