"""What is worth measuring, who stays, and who is faster."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.candidates import Effort, candidates, faster_half, is_faster, timed
from pipeline.exports import Exports
from pipeline.placements import PLACEMENTS
from pipeline.recipe import Recipe
from pipeline.records import Candidate, Export
from targets import base
from targets.base import Samples, runtimes


def exports_of(name: str, scheme: str = "w8a8", **more: Any) -> list[Export]:
    exports = Exports(Recipe.model_validate({"runtimes": (name,), "scheme": scheme, **more}))
    return exports.exports(exports.targets[0])


@pytest.mark.parametrize("name", sorted(runtimes()))
@pytest.mark.parametrize("effort", ["quick", "full"])
def test_every_candidate_can_be_expressed_and_quick_needs_no_other_integers(
    name: str, effort: Effort
) -> None:
    target, defaults = runtimes()[name], exports_of(name)
    found = candidates(target.capabilities, defaults, effort)
    assert len(found) == len(set(found))
    assert set(defaults) <= set(found)
    for one in found:
        base.check_expressible(one, target)
    layers = {PLACEMENTS[one.placement].layers for one in found if one.scheme != "float"}
    assert (len(layers) == 1) == (effort == "quick")
    forms = {one.graph_form for one in found if one.scheme == "float"}
    assert forms == set(target.capabilities.graph_forms)


def test_placements_of_one_function_are_tried_once() -> None:
    target = runtimes()["onnx"]
    found = candidates(target.capabilities, exports_of("onnx", "w8a8-dynamic"), "quick")
    assert [one.placement for one in found if one.scheme != "float"] == ["pointwise"]


@pytest.mark.parametrize("placement", ["pointwise", "all"])
@pytest.mark.parametrize("effort", ["quick", "full"])
def test_a_placement_that_is_asked_for_stays(placement: str, effort: Effort) -> None:
    wanted = exports_of("openvino", placement=placement)
    found = candidates(runtimes()["openvino"].capabilities, wanted, effort, asked=True)
    assert {one.placement for one in found if one.scheme != "float"} == {placement}


def test_float16_is_tried_where_the_cpu_computes_in_it_and_there_is_time() -> None:
    can = runtimes()["openvino"].capabilities
    halves = [
        {one.graph_form for one in found if one.scheme == "float16"}
        for found in (
            candidates(can, exports_of("openvino"), "full", flags=["avx2", "avx512_fp16"]),
            candidates(can, exports_of("openvino"), "quick", flags=["avx2", "avx512_fp16"]),
            candidates(can, exports_of("openvino"), "full", flags=["avx2"]),
            candidates(can, exports_of("openvino", "float"), "full", flags=["avx512_fp16"]),
        )
    ]
    assert halves == [set(can.graph_forms), set(), set(), set()]


def test_half_of_each_kind_stays_and_at_least_one() -> None:
    heat = [
        Candidate(
            scheme="float" if i < 2 else "w8a8", placement=str(i), graph_form="f",
            outcome="measured", cpu_p50_ms=ms, wall_p50_ms=-ms,
        )
        for i, ms in enumerate([9.0, 8.0, 1.0, 2.0, 3.0])
    ]  # fmt: skip
    assert [one.placement for one in faster_half(heat, "cpu")] == ["1", "2"]
    assert [one.placement for one in faster_half(heat, "wall")] == ["0", "4"]


def samples(cpu: tuple[float, ...] = (), counts: tuple[int, ...] = ()) -> Samples:
    return Samples(
        label="one",
        wall_ms=cpu,
        cpu_ms=cpu,
        load_ms=None,
        first_ms=None,
        peak_memory_bytes=None,
        versions={},
        instructions=counts,
    )


def test_times_are_faster_where_the_interval_says_so() -> None:
    slow, fast = (samples((ms,) * 60) for ms in (2.0, 1.0))
    noisy = samples(((1.0,) * 6 + (2.9,) * 6) * 5)  # turn by turn; its median lies below 2
    assert is_faster(fast, slow, "cpu", 6)
    assert not is_faster(slow, fast, "cpu", 6)
    assert not is_faster(noisy, slow, "wall", 6)


def test_counts_are_fewer_where_all_are() -> None:
    assert is_faster(samples(counts=(9, 9)), samples(counts=(10,)), "instructions", 1)
    assert not is_faster(samples(counts=(9, 11)), samples(counts=(10,)), "instructions", 1)


def test_a_job_that_failed_is_a_candidate_that_did() -> None:
    wanted = exports_of("openvino")
    gave = [samples((1.0,) * 60), Samples(label="x", error="it broke")]
    found = timed(wanted, gave, "cpu", per_round=6, heat=0)
    assert [one.outcome for one in found.values()] == ["measured", "failed"]
    assert found[wanted[1]].reason == "it broke"
    none = timed(wanted, gave[::-1], "cpu", per_round=6, heat=0)[wanted[1]]
    assert (none.outcome, none.cpu_ratio) == ("measured", None)


def test_one_that_failed_in_a_heat_is_out_and_no_measure_for_others() -> None:
    slow, broken = samples((4.0,) * 60), Samples(label="x", error="it broke")
    assert not is_faster(broken, slow, "cpu", 6)
    assert not is_faster(samples((1.0,) * 60), broken, "cpu", 6)
    counted = samples(counts=(9,))
    assert not is_faster(broken, counted, "instructions", 1)
    assert not is_faster(counted, broken, "instructions", 1)
