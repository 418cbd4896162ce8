"""What CoreML itself says of an artifact: on which unit each operation runs, and how long.

In: an .mlpackage, on macOS 14.4 or later. Out: units from CoreML's compute plan, and times from
coremltools' perf_utils: CoreML times no single operation, so a prediction's time is divided by the
weights that the plan gives to its operations.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from targets.base import INPUT_NAME, OpTime
from targets.runtimes._coreml_units import compute_units, load_model
from targets.runtimes._mil_file import FUNCTION, main_block, read_spec
from targets.runtimes._op_kinds import kind_of

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.records import OpKind
    from targets.base import Image

UNITS = {
    "MLCPUComputeDevice": "CPU",
    "MLGPUComputeDevice": "GPU",
    "MLNeuralEngineComputeDevice": "Neural Engine",
}
"""By coremltools' classes."""
KINDS: dict[str, OpKind] = {
    "quantize": "quantize",
    "dequantize": "quantize",
    "transpose": "layout",
}
"""Of the operations whose own type tells; of the others it is their names."""


def preferred_units(path: Path) -> Counter[str]:
    """Return how many operations CoreML's plan puts on each unit that this process may use."""
    from coremltools.models.compute_plan import MLComputePlan

    model = load_model(path)  # what it compiled lives as long as it does
    plan = MLComputePlan.load_from_path(
        model.get_compiled_model_path(), compute_units=compute_units()
    )
    usages = (
        plan.get_compute_device_usage_for_mlprogram_operation(op)
        for op in plan.model_structure.program.functions[FUNCTION].block.operations
    )
    return Counter(unit for usage in usages if (unit := _unit(usage)))


def op_times(path: Path, image: Image, inferences: int) -> list[OpTime]:
    """Return what the operations take, in the program's order: shares of the median prediction."""
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

    measured = asyncio.run(
        MLModelBenchmarker(load_model(path)).benchmark_operation_execution(
            inputs={INPUT_NAME: image}, iterations=inferences, warmup=True
        )
    )
    _, block = main_block(path, read_spec(path))
    order = [op.outputs[0].name for op in block.operations]
    told = [one for one in measured if one.measurement.statistics is not None]
    times = [
        OpTime(
            kind=_kind(one.spec.type, one.spec.outputs[0].name),
            op=f"{one.spec.type} on {_unit(one.compute_device_usage) or 'no unit it names'}",
            name=one.spec.outputs[0].name,
            ms=one.measurement.statistics.median,
        )
        for one in told
    ]
    return sorted(times, key=lambda one: order.index(one.name))


def _unit(usage: Any) -> str | None:
    if usage is None:
        return None
    name = type(usage.preferred_compute_device).__name__
    return UNITS.get(name, name)


def _kind(op: str, name: str) -> OpKind:
    return KINDS.get(op) or kind_of([name.replace("_", ".")])
