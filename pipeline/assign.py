"""Which layers run in integers and which in float: what is worth trying, and how it is applied.

In: what every layer loses alone, and what it costs in float. Out: the Pareto front of assignments,
and a quantized model with some of its layers left float. The integers of the others do not change.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter
from scipy.optimize import Bounds, LinearConstraint, milp

from pipeline import quantize
from pipeline.records import ACTIVATION_BITS, PROFILES, Assignment, Cost, Sensitivity
from pipeline.sensitivity import reference_export, reference_graph
from targets.export import export_stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.records import Profile, QuantizedModel
    from pipeline.worker import Progress

    Arrays = Mapping[str, NDArray[Any]]

REFERENCE_FOLDER = "reference"
STEP_DB, STEPS = 0.5, 120
"""Each assignment of the front leaves this much less error than the one before, at least."""
BYTES_MORE = 3
"""Of a float32 weight over an int8 one."""
TIE = 1e-4
"""How little the largest error counts beside the largest cost: it settles which of two costs that
are all but equal to take."""


def layer_costs(found: Sequence[Sensitivity], saved_ms: Mapping[str, float]) -> Cost:
    """Return what it costs to leave each layer in float.

    Args:
        found: Every layer's MACs and weights.
        saved_ms: Runtime to how much less time its artifact with every layer in integers takes
            than its float one, milliseconds; empty where nothing was measured.

    Returns:
        Milliseconds, divided by MACs, mean over the runtimes, 0 for those that save none; MACs
        where nothing was measured; bytes where integers save no time anywhere.
    """
    layers = [row for row in found if row.kind == "layer"]
    total = sum(row.macs for row in layers)
    if not saved_ms:
        costs = {row.name: float(row.macs) for row in layers}
        return Cost(unit="MACs", source="no latency was measured", layers=costs)
    saving = [name for name, saved in saved_ms.items() if saved > 0]
    if not saving:
        costs = {row.name: float(BYTES_MORE * row.weights) for row in layers}
        source = f"integers save no time in {', '.join(saved_ms)}"
        return Cost(unit="bytes", source=source, layers=costs)
    saved = fmean(max(saved, 0.0) for saved in saved_ms.values())
    source = f"measured in {', '.join(saving)}"
    if lost := [name for name in saved_ms if name not in saving]:
        source += f"; integers save no time in {', '.join(lost)}"
    costs = {row.name: saved * row.macs / total for row in layers}
    return Cost(unit="ms", source=source, layers=costs)


def front_stage(
    sensitivities: list[dict[str, Any]],
    saved_ms: dict[str, float],
    folder: str,
    progress: Progress,
) -> dict[str, Any]:
    """Price every layer and find the assignments that are worth trying.

    Args:
        sensitivities: As JSON.
        saved_ms: As of `layer_costs`.
        folder: Takes nothing: the result is all there is.
        progress: Called before and after.

    Returns:
        `cost` and `front`, as JSON.
    """
    del folder
    progress(0, 1)
    found = TypeAdapter(tuple[Sensitivity, ...]).validate_python(sensitivities)
    cost = layer_costs(found, saved_ms)
    points = front(found, cost)
    progress(1, 1)
    return {"cost": asdict(cost), "front": [asdict(point) for point in points]}


def front(found: Sequence[Sensitivity], cost: Cost) -> tuple[Assignment, ...]:
    """Return the assignments that are worth trying, cheapest first.

    The errors of layers are added up as though they were independent, so that the cheapest
    assignment within a budget of error is an integer program.

    Args:
        found: Every layer's.
        cost: Of each in float.

    Returns:
        The cheapest assignment for each of a ladder of budgets, from everything in integers to
        the least that is not all float.

    Source: Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021, section 4.
    """
    layers = [row for row in found if row.kind == "layer"]
    errors = np.array([0.0 if r.sqnr_db is None else 10 ** (-r.sqnr_db / 10) for r in layers])
    costs = np.array([cost.layers[row.name] for row in layers])
    points: list[Assignment] = []
    for step in range(STEPS):
        floats = _cheapest(errors, costs, errors.sum() * 10 ** (-STEP_DB * step / 10))
        left = float(errors[~floats].sum())
        if floats.all():
            break
        point = Assignment(
            float_layers=tuple(row.name for row, kept in zip(layers, floats, strict=True) if kept),
            cost=float(costs[floats].sum()),
            predicted_sqnr_db=-10 * math.log10(left) if left else None,
        )
        # A smaller budget at no more cost: what was there is no longer worth trying.
        while points and (
            points[-1].cost >= point.cost or math.isclose(points[-1].cost, point.cost)
        ):
            points.pop()
        points.append(point)
        if not left:
            break
    return tuple(points)


def _cheapest(
    errors: NDArray[np.float64], costs: NDArray[np.float64], most: float
) -> NDArray[np.bool_]:
    """Return which layers to leave in float so that the errors of the others sum to `most`."""
    if errors.sum() <= most:
        return np.zeros(len(errors), bool)
    # Both scaled: a solver's tolerances are absolute.
    value = costs / costs.max() - TIE * errors / errors.max()
    enough = LinearConstraint(errors / most, lb=errors.sum() / most - 1)
    solved = milp(
        value,
        integrality=np.ones(len(errors)),
        bounds=Bounds(0, 1),
        constraints=enough,
        options={"mip_rel_gap": 0.0},
    )
    assert solved.x is not None, "everything in float meets every budget"
    taken: NDArray[np.bool_] = np.round(solved.x).astype(bool)
    return taken


def leave_float(
    record: QuantizedModel, arrays: Arrays, layers: Sequence[str]
) -> tuple[QuantizedModel, dict[str, NDArray[Any]]]:
    """Return a model without the integers of some layers and the sites that only they need."""
    kept = replace(record, float_layers=(*record.float_layers, *layers))
    if record.scheme in ACTIVATION_BITS:
        sites = reference_graph(kept, arrays, PROFILES[0]).sites
        kept = replace(
            kept,
            sites={name: grid for name, grid in record.sites.items() if name in sites},
            chosen={name: found for name, found in record.chosen.items() if name in sites},
        )
    gone = {f"{profile}/{layer}" for profile in PROFILES for layer in layers}
    return kept, {k: v for k, v in arrays.items() if k.rpartition(".")[0] not in gone}


def candidate_stage(
    model: str, float_layers: list[str], profile: Profile, folder: str, progress: Progress
) -> dict[str, Any]:
    """Leave some layers of a quantized model in float, and export that to the reference.

    Args:
        model: Folder with params.json and tensors.safetensors.
        float_layers: Which, besides those that are.
        profile: Which integers the reference takes.
        folder: Takes params.json, tensors.safetensors, and a folder with the artifact.
        progress: As of `export_stage`.

    Returns:
        `path`: of the artifact in the folder, and its `sha256`.
    """
    record, arrays = leave_float(*quantize.read(Path(model)), float_layers)
    quantize.write(Path(folder), record, arrays)
    inner = Path(folder) / REFERENCE_FOLDER
    inner.mkdir()
    export = asdict(reference_export(record, profile))
    made = export_stage(folder, export, str(inner), progress)
    return {"path": f"{REFERENCE_FOLDER}/{made['path']}", "sha256": made["sha256"]}
