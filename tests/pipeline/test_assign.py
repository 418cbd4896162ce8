"""Assignments: the front is the cheapest there is; what stays in integers does not change."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipeline.assign import candidate_stage, front, front_stage, layer_costs, leave_float
from pipeline.quantize import PARAMS, TENSORS, read, write
from pipeline.records import Assignment, Cost, QuantizedModel, Sensitivity
from pipeline.worker import silent
from targets.base import runtime

Model = tuple[QuantizedModel, dict[str, Any]]
errors = st.floats(1e-6, 1e-1)
costs = st.integers(1, 50).map(float)


def layer(name: str, sqnr_db: float | None, macs: int = 100, weights: int = 10) -> Sensitivity:
    return Sensitivity(
        kind="layer", name=name, layers=(name,), sites=(), macs=macs, weights=weights,
        sqnr_db=sqnr_db, kl=0.0,
    )  # fmt: skip


def left(point: Assignment, found: list[Sensitivity]) -> float:
    return sum(
        10 ** (-row.sqnr_db / 10)
        for row in found
        if row.sqnr_db is not None and row.name not in point.float_layers
    )


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(errors, costs), min_size=2, max_size=7))
def test_no_assignment_loses_less_at_no_more_cost(pairs: list[tuple[float, float]]) -> None:
    found = [layer(f"l{i}", -10 * math.log10(error)) for i, (error, _) in enumerate(pairs)]
    cost = Cost(unit="ms", source="", layers={f"l{i}": c for i, (_, c) in enumerate(pairs)})
    points = front(found, cost)
    assert points[0].float_layers == ()
    assert [p.cost for p in points] == sorted({p.cost for p in points})
    for point in points:
        for size in range(len(pairs) + 1):
            for kept in itertools.combinations(range(len(pairs)), size):
                total = sum(pairs[i][1] for i in kept)
                rest = sum(pairs[i][0] for i in range(len(pairs)) if i not in kept)
                # A hair of tolerance: a solver's own.
                cheaper = total < point.cost * (1 - 1e-6)
                assert not (cheaper and rest <= left(point, found) * (1 - 1e-6))
                no_dearer = total <= point.cost * (1 + 1e-9)
                much = 0.02 * max(error for error, _ in pairs)
                assert not (no_dearer and rest < left(point, found) - much)
        assert point.predicted_sqnr_db == pytest.approx(-10 * math.log10(left(point, found)))


def test_a_layer_that_loses_nothing_is_never_left_float() -> None:
    found = [layer("a", 30.0), layer("free", None), layer("b", 20.0)]
    points = front(found, layer_costs(found, {}))
    assert [point.float_layers for point in points] == [(), ("b",), ("a", "b")]
    assert points[-1].predicted_sqnr_db is None


def test_of_equal_costs_the_one_that_helps_more_is_taken() -> None:
    for worst in range(6):
        found = [layer(str(i), 17.0 if i == worst else 20.0) for i in range(6)]
        assert front(found, layer_costs(found, {}))[1].float_layers == (str(worst),)


def test_no_layer_left_is_no_assignment() -> None:
    assert front([layer("a", 20.0)], layer_costs([layer("a", 20.0)], {}))[0].float_layers == ()


def test_a_runtime_that_saves_nothing_is_named_and_counts_as_zero() -> None:
    found = [layer("a", 30.0)]
    cost = layer_costs(found, {"onnx": 4.0, "tflite": -9.0})
    assert (cost.unit, cost.layers) == ("ms", {"a": 2.0})
    assert cost.source == "measured in onnx; integers save no time in tflite"


def test_costs_are_milliseconds_where_integers_save_any() -> None:
    found = [layer("a", 30.0, macs=300), layer("b", 20.0, macs=100)]
    cost = layer_costs(found, {"onnx": 3.0, "tflite": 1.0})
    assert (cost.unit, cost.layers) == ("ms", {"a": 1.5, "b": 0.5})
    assert cost.source == "measured in onnx, tflite"


def test_costs_are_macs_unmeasured_and_bytes_where_nothing_is_saved() -> None:
    found = [layer("a", 30.0, macs=300, weights=7), layer("b", 20.0, macs=100, weights=9)]
    assert layer_costs(found, {}).layers == {"a": 300.0, "b": 100.0}
    slower = layer_costs(found, {"onnx": -0.5})
    assert (slower.unit, slower.layers) == ("bytes", {"a": 21.0, "b": 27.0})


def test_the_stage_returns_what_the_functions_do(tmp_path: Path) -> None:
    found = [layer("a", 30.0), layer("b", 20.0)]
    rows = [TypeAdapter(Sensitivity).dump_python(row) for row in found]
    made = front_stage(rows, {"onnx": 2.0}, str(tmp_path), silent)
    cost = TypeAdapter(Cost).validate_python(made["cost"])
    assert cost == layer_costs(found, {"onnx": 2.0})
    points = TypeAdapter(tuple[Assignment, ...]).validate_python(made["front"])
    assert points == front(found, cost)


# --- applied --------------------------------------------------------------------------------------

FLOATS = ("stages.0.blocks.0.pw1", "stages.1.downsample.conv")


def test_the_other_layers_keep_their_integers(small_model: Model) -> None:
    record, arrays = small_model
    kept, rest = leave_float(record, arrays, FLOATS)
    assert kept.float_layers == FLOATS
    gone = set(arrays) - set(rest)
    assert {name.split("/", 1)[1].rpartition(".")[0] for name in gone} == set(FLOATS)
    assert all(np.array_equal(arrays[name], rest[name]) for name in rest)


def test_sites_that_nothing_reads_are_gone(small_model: Model) -> None:
    record, arrays = small_model
    kept, _ = leave_float(record, arrays, FLOATS)
    gone = set(record.sites) - set(kept.sites)
    assert "stages.0.blocks.0.ln_out" in gone
    assert set(kept.chosen) == set(kept.sites) & set(record.chosen)


def test_nothing_left_float_is_the_same_files(small_model: Model, tmp_path: Path) -> None:
    for name in ("base", "same"):
        (tmp_path / name).mkdir()
    write(tmp_path / "base", *small_model)
    candidate_stage(str(tmp_path / "base"), [], "full", str(tmp_path / "same"), silent)
    for name in (PARAMS, TENSORS):
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_a_candidate_is_what_the_reference_runs(small_model: Model, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "base", *small_model)
    made = candidate_stage(
        str(tmp_path / "base"), list(FLOATS), "full", str(tmp_path / "mixed"), silent
    )
    record, _ = read(tmp_path / "mixed")
    assert record.float_layers == FLOATS
    session = runtime("reference").load(tmp_path / "mixed" / made["path"], threads=1)
    assert session(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 6)
