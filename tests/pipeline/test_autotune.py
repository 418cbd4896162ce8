"""Graph form and placement by measurement: what is tried, who stays, what is taken, and why."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipeline.autotune import MEASURED, Autotuner, Conditions
from pipeline.candidates import Effort, failed, in_order
from pipeline.display import Display
from pipeline.errors import ArtifactError, DeviceError, WorkerError
from pipeline.exports import Exports
from pipeline.layouts import read_layouts
from pipeline.recipe import Recipe
from pipeline.records import (
    Accuracy,
    Architecture,
    Artifact,
    Candidate,
    Export,
    Layout,
    Scheme,
    to_json,
)
from pipeline.stages import Stages
from pipeline.store import Stage
from pipeline.worker import Reply, silent
from reports.document import read_report
from reports.layouts import sentence, ships_float
from targets import base
from targets.base import DeviceInfo, Job, NotRun, Samples, runtimes
from targets.devices.local import host_isa, isa_of

CLI = [sys.executable, "-P", "-m", "pipeline.cli"]
NET = Architecture(depths=(1,), dims=(8,), classes=2)
FLAGS = {"avx2": ("avx2",), "vnni": ("avx2", "avx512_vnni"), "arm": ("asimd",)}


class Stopwatch:
    """A device that takes as long as it is told, by the name of an artifact's folder."""

    name = "stopwatch"

    def __init__(self, times: Mapping[str, float], isa: Sequence[str] = FLAGS[host_isa()]) -> None:
        self.times = times
        self.isa = tuple(isa)
        self.heats: list[list[str]] = []

    def probe(self) -> DeviceInfo | NotRun:
        return DeviceInfo(
            name=self.name, kind="device", isa=self.isa, description="a stopwatch", cores=1
        )

    def can_run(self, wanted: base.Runtime) -> NotRun | None:
        return NotRun(reason="it is not a Mac") if wanted.name == "coreml" else None

    def measure(
        self, jobs: Sequence[Job], image: Any, *, rounds: int, per_round: int, **rest: Any
    ) -> list[Samples]:
        names = [str(job.path) for job in jobs]
        self.heats.append(names)
        return [
            Samples(
                label=job.label,
                wall_ms=(2 * self.times[name],) * (rounds * per_round),
                cpu_ms=(self.times[name],) * (rounds * per_round),
                load_ms=1.0,
                first_ms=1.0,
                peak_memory_bytes=1,
                versions={},
            )
            for name, job in zip(names, jobs, strict=True)
        ]

    def infer(self, job: Job, images: Any, **rest: Any) -> base.Logits:
        raise AssertionError(f"{job.label} was to be timed, not run")


def conditions(
    device: base.Device, effort: Effort = "quick", threads: int = 1, *, counts: bool = False
) -> Conditions:
    return Conditions(
        device=device,
        threads=threads,
        architecture=NET,
        macs=10**8,
        float_layers=(),
        image_shape=(1, 3, 32, 32),
        effort=effort,
        asked=True,
        counts=counts,
    )


def exports_of(name: str, scheme: str = "w8a8", **more: Any) -> list[Export]:
    exports = Exports(Recipe.model_validate({"runtimes": (name,), "scheme": scheme, **more}))
    return exports.exports(exports.targets[0])


# --- who stays ------------------------------------------------------------------------------------


def tuner(device: base.Device, **how: Any) -> Autotuner:
    stages: Any = None
    return Autotuner(
        stages, Exports(Recipe(runtimes=("openvino",))), conditions(device, **how), None
    )


def exports(n: int, n_floats: int) -> list[Export]:
    return [
        Export(
            runtime="openvino",
            scheme="float" if index < n_floats else "w8a8",
            placement=str(index),
            graph_form="f",
            gelu="erf",
            profile=None,
        )
        for index in range(n)
    ]


def measured(
    times: Sequence[float], n_floats: int, effort: Effort = "quick"
) -> tuple[list[Candidate], Stopwatch]:
    wanted = exports(len(times), n_floats)
    paths = {one: Path(one.placement) for one in wanted}
    device = Stopwatch({one.placement: time for one, time in zip(wanted, times, strict=True)})
    found: dict[Export, Candidate] = {}
    tuner(device, effort=effort)._heats(paths, found, silent)
    return [found[one] for one in wanted], device


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.1, 100), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 100), min_size=0, max_size=12),
)
def test_the_fastest_of_both_kinds_meet_in_the_last_heat(
    floats: list[float], integers: list[float]
) -> None:
    found, device = measured([*floats, *integers], len(floats))
    last = len(device.heats) - 1
    best = min(floats)
    final = [one for one in found if one.heat == last]
    assert any(one.scheme == "float" and one.cpu_p50_ms == best for one in final)
    if integers:
        taken = found[in_order(found, "cpu")[0]]
        assert taken.cpu_p50_ms == min(integers)
        assert taken.heat == last
        assert taken.cpu_ratio == pytest.approx(min(integers) / best)
    # Halving: the later heats together are no longer than the first and what is always there.
    assert sum(map(len, device.heats[1:])) <= len(found) + 2 * len(device.heats)


def test_a_later_heat_is_longer() -> None:
    found, device = measured([1.0, 2.0, 3.0, 4.0, 5.0], 1)
    assert [len(heat) for heat in device.heats] == [5, 3, 2]
    assert [one.samples for one in found] == [72, 72, 36, 18, 18]


@pytest.mark.parametrize(
    ("times_ms", "effort", "rounds"),
    [
        ([33.0, 66.0, 99.0, 132.0, 165.0], "quick", [6, 8, 16]),  # three of 1.19 s: eight in 10 s
        ([330.0, 660.0, 990.0, 1320.0, 1650.0], "quick", [6, 6, 6]),  # but never fewer
        ([33.0, 66.0, 99.0, 132.0, 165.0], "full", [12, 24, 48]),
    ],
)
def test_a_slow_network_has_shorter_heats_where_nobody_waits(
    times_ms: list[float], effort: Effort, rounds: list[int]
) -> None:
    found, _ = measured(times_ms, 1, effort)
    assert [one.samples for one in found] == [3 * rounds[i] for i in (2, 2, 1, 0, 0)]


@pytest.mark.parametrize(("macs", "inferences"), [(10**12, 2), (10**8, 3), (10**3, 64)])
def test_a_turn_of_a_slow_network_is_short(macs: int, inferences: int) -> None:
    given = replace(conditions(Stopwatch({})), macs=macs)
    assert given.per_round == inferences


def test_an_export_that_dies_takes_no_other_one_and_nobody_waits_while_times_are_taken(
    tmp_path: Path,
) -> None:
    wanted, dying, called = exports(4, 1), "2", list[str]()

    class Hand:
        """One worker for all: it dies of one export."""

        here = False

        def __enter__(self) -> Self:
            Hand.here = True
            return self

        def __exit__(self, *raised: object) -> None:
            Hand.here = False

        def call(self, function: str, *, export: dict[str, Any], **rest: Any) -> Reply:
            assert Hand.here
            called.append(export["placement"])
            if export["placement"] == dying:
                raise WorkerError("ended with signal SIGKILL", allowed="", do="")
            return Reply(value={"path": export["placement"]}, seconds=0.0, peak_memory_bytes=0)

    class Alone(Stopwatch):
        def measure(self, jobs: Sequence[Job], image: Any, **how: Any) -> list[Samples]:
            assert not Hand.here
            self.times = {str(job.path): 1.0 for job in jobs}
            return super().measure(jobs, image, **how)

    class Workers:
        def worker(self, name: str) -> Hand:
            return Hand()

    one = tuner(Alone({}))
    stages: Any = Workers()
    one.stages = stages
    one._measure(one.exports.targets[0], tmp_path, wanted, tmp_path, silent)
    found = TypeAdapter(list[Candidate]).validate_json((tmp_path / MEASURED).read_bytes())
    outcomes = {item.placement: item.outcome for item in found}
    assert outcomes == {"0": "measured", "1": "measured", dying: "failed", "3": "measured"}
    assert called == ["0", "1", dying, "3"]


def test_counts_need_one_heat_and_rank_as_times_do() -> None:
    counts = {"0": 100, "1": 90, "2": 50, "3": 60, "4": 30}

    class Counter(Stopwatch):
        def measure(self, jobs: Sequence[Job], image: Any, **how: Any) -> list[Samples]:
            return [
                replace(one, wall_ms=(), cpu_ms=(), instructions=(counts[job.path.name],) * 3)
                for one, job in zip(super().measure(jobs, image, **how), jobs, strict=True)
                if job.path is not None
            ]

    wanted = exports(len(counts), 2)
    found: dict[Export, Candidate] = {}
    device = Counter(dict.fromkeys(counts, 1.0))
    tuner(device, counts=True)._heats({one: Path(one.placement) for one in wanted}, found, silent)
    assert len(device.heats) == 1
    ranked = [found[one] for one in wanted]
    assert [ranked[i].placement for i in in_order(ranked, "instructions")] == ["4", "2", "3"]
    best = ranked[4]
    assert (best.instructions, best.samples, best.cpu_p50_ms) == (30, 3, None)
    assert best.instruction_ratio == 30 / 90
    assert best.instruction_ratio_ends == (30 / 90, 30 / 90)


def test_a_device_that_tells_no_cpu_time_is_ranked_by_wall_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Phone(Stopwatch):
        def measure(self, jobs: Sequence[Job], image: Any, **how: Any) -> list[Samples]:
            return [replace(one, cpu_ms=()) for one in super().measure(jobs, image, **how)]

    wanted = exports(5, 2)
    times = dict(zip("01234", [9.0, 8.0, 3.0, 1.0, 2.0], strict=True))
    found: dict[Export, Candidate] = {}
    tuner(Phone(times))._heats({one: Path(one.placement) for one in wanted}, found, silent)
    ranked = list(found.values())
    assert ranked[in_order(ranked, "wall")[0]].placement == "3"
    assert found[wanted[3]].wall_ratio == pytest.approx(1 / 8)
    layout = taken([replace(one, placement="pointwise") for one in ranked], monkeypatch)
    assert (layout.clock, layout.scheme) == ("wall", "w8a8")


# --- stage by stage -------------------------------------------------------------------------------

STAGED = Architecture(depths=(1, 1, 1), dims=(8, 8, 8), classes=2)


class Staged(Stopwatch):
    """Its times follow from the stages in float, which stand in the paths."""

    def __init__(self, saved: Mapping[int, float]) -> None:
        super().__init__({})
        self.saved = saved

    def measure(
        self, jobs: Sequence[Job], image: Any, *, rounds: int, per_round: int, **rest: Any
    ) -> list[Samples]:
        for job in jobs:
            word = str(job.path)
            stages = [int(one) for one in word if one.isdecimal()]
            takes = 5.0 if word == "float" else 4.0 - sum(self.saved[one] for one in stages)
            self.times = {**self.times, word: takes}
        return super().measure(jobs, image, rounds=rounds, per_round=per_round, **rest)


def by_stage(
    saved: Mapping[int, float], make: Callable[[Export], Path | Candidate] | None = None
) -> tuple[dict[Export, Candidate], Export, Staged]:
    """Return what is found, and the placement that all layers are in integers in."""
    device = Staged(saved)
    plain, best = (replace(one, placement="p") for one in exports(2, 1))
    paths = {plain: Path("float"), best: Path("all")}
    found: dict[Export, Candidate] = {}
    chooser = tuner(device, effort="full")
    chooser.given = replace(chooser.given, architecture=STAGED)
    chooser._heats(paths, found, silent)

    def path(one: Export) -> Path | Candidate:
        return Path("".join(map(str, one.float_stages)))

    chooser._by_stage(paths, found, make or path, silent)
    return found, best, device


def test_the_stages_that_pay_are_float_together() -> None:
    found, best, device = by_stage({0: 0.5, 1: -0.5, 2: 0.25})
    one = list(found.values())[in_order(list(found.values()), "cpu")[0]]
    assert (one.float_stages, one.cpu_p50_ms) == ((0, 2), 3.25)
    assert one.cpu_ratio == pytest.approx(3.25 / 5)
    assert device.heats[-1] == ["float", "all", "02"]
    assert found[replace(best, float_stages=(1,))].cpu_p50_ms == 4.5


@pytest.mark.parametrize("saved", [0.0, -1.0])
def test_where_no_stage_pays_all_stay(saved: float) -> None:
    found, best, device = by_stage(dict.fromkeys(range(3), saved))
    ranked = list(found.values())
    assert ranked[in_order(ranked, "cpu")[0]] == found[best]
    assert device.heats[-1] == ["float", "all", "0", "1", "2"]


def test_where_every_stage_pays_float_itself_is_faster_and_is_there_already() -> None:
    found, _, _ = by_stage(dict.fromkeys(range(3), 1.0))
    assert max(len(one.float_stages) for one in found.values()) == 1


def test_a_stage_that_cannot_be_exported_is_left_out() -> None:
    def make(one: Export) -> Path | Candidate:
        if one.float_stages == (0,):
            return failed(one, "drift")
        return Path("".join(map(str, one.float_stages)))

    found, best, _ = by_stage({0: 1.0, 1: 0.5, 2: -1.0}, make)
    assert found[replace(best, float_stages=(0,))].outcome == "failed"
    ranked = list(found.values())
    assert ranked[in_order(ranked, "cpu")[0]].float_stages == (1,)


# --- what is taken --------------------------------------------------------------------------------


def candidate(scheme: Scheme, form: str, ratio: float, spread: float = 0.0, heat: int = 1) -> Any:
    return Candidate(
        scheme=scheme, placement="pointwise" if scheme != "float" else "none", graph_form=form,
        outcome="measured", heat=heat, samples=48, wall_p50_ms=ratio, cpu_p50_ms=ratio,
        wall_ratio=ratio, wall_ratio_ci95=(ratio - spread, ratio + spread),
        cpu_ratio=ratio, cpu_ratio_ci95=(ratio - spread, ratio + spread),
    )  # fmt: skip


FORMS = runtimes()["openvino"].capabilities.graph_forms
FLOAT = candidate("float", FORMS[1], 1.0)


def taken(
    found: Sequence[Candidate],
    monkeypatch: pytest.MonkeyPatch,
    keeps: Callable[[Artifact], tuple[bool, Accuracy]] | None = None,
    scheme: Scheme = "w8a8",
) -> Layout:
    device = Stopwatch({})
    stages: Any = None
    exports = Exports(Recipe(runtimes=("openvino",), scheme=scheme))
    monkeypatch.setattr(Exports, "one", lambda *given: given[-1])
    chooser = Autotuner(stages, exports, conditions(device), keeps)
    info = device.probe()
    assert isinstance(info, DeviceInfo)
    return chooser._chosen(exports.targets[0], Path(), info, found)


def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = candidate("w8a8", FORMS[0], 0.4), candidate("w8a8", FORMS[1], 0.5)
    layout = taken([slow, FLOAT, fast], monkeypatch)
    assert (layout.scheme, layout.placement, layout.graph_form) == ("w8a8", "pointwise", FORMS[0])
    assert layout.float_form == FORMS[1]
    assert not ships_float(layout)
    assert "0.40 (0.40 to 0.40) of the best float one's cpu time" in sentence(layout)


@pytest.mark.parametrize(("ratio", "spread"), [(1.2, 0.05), (0.99, 0.05), (1.0, 0.001)])
def test_integers_not_shown_to_be_faster_are_not_shipped(
    ratio: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = taken([candidate("w8a8", FORMS[0], ratio, spread), FLOAT], monkeypatch)
    assert (layout.scheme, layout.placement, layout.graph_form) == ("float", None, FORMS[1])
    assert ships_float(layout)
    assert "float is shipped" in sentence(layout)
    assert f"no integers are shown to be faster: pointwise in form {FORMS[0]} takes" in sentence(
        layout
    )


def test_the_next_is_taken_where_the_first_is_not_shown_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    doubtful = candidate("w8a8", FORMS[0], 0.98, 0.05, heat=2)
    layout = taken([doubtful, FLOAT, candidate("w8a8", FORMS[1], 0.9, 0.02, heat=0)], monkeypatch)
    assert (layout.scheme, layout.graph_form) == ("w8a8", FORMS[1])


@pytest.mark.parametrize(
    ("kept", "expected"), [([True], 0), ([False, True], 1), ([False] * 2, None)]
)
def test_what_loses_too_much_gives_way_to_the_next(
    kept: list[bool], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [candidate("w8a8", form, 0.4 + i / 10) for i, form in enumerate(FORMS)]
    asked: list[Any] = []

    def keeps(artifact: Any) -> tuple[bool, Accuracy]:
        asked.append(artifact.graph_form)
        return kept[len(asked) - 1], Accuracy(outcome="measured", n=10, drop_pp=1.0)

    layout = taken([*found, FLOAT], monkeypatch, keeps)
    assert asked == list(FORMS[: len(kept)])
    assert [one.accuracy is not None for one in layout.candidates[:2]] == [True, len(kept) == 2]
    if expected is None:
        assert ships_float(layout)
        assert "keeps to the accuracy budget" in layout.reason
    else:
        assert layout.graph_form == FORMS[expected]


def test_float16_that_is_fastest_is_shipped_without_a_placement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = replace(candidate("w8a8", FORMS[0], 0.5), scheme="float16", placement="none")
    layout = taken([half, candidate("w8a8", FORMS[0], 0.8), FLOAT], monkeypatch)
    assert (layout.scheme, layout.placement) == ("float16", None)
    assert sentence(layout).startswith("openvino: float16 is shipped, ")
    assert not ships_float(layout)


@pytest.mark.parametrize("scheme", ["float", "float16"])
def test_what_is_asked_without_integers_need_not_be_faster(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = replace(candidate("w8a8", FORMS[0], 1.0, 0.01), scheme="float16", placement="none")
    found = [half, FLOAT] if scheme == "float16" else [FLOAT]
    layout = taken(found, monkeypatch, scheme=scheme)
    assert (layout.asked, layout.scheme, layout.placement) == (scheme, scheme, None)
    assert not ships_float(layout)


def test_integers_that_cannot_be_exported_are_no_reason_to_ship_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Candidate(
        scheme="w8a8", placement="pointwise", graph_form=FORMS[0], outcome="failed", reason="drift"
    )
    layout = taken([broken, FLOAT], monkeypatch)
    assert (layout.source, layout.scheme) == ("default", "w8a8")
    assert not ships_float(layout)
    assert not ships_float(replace(layout, scheme="float", candidates=(broken, FLOAT)))


def test_what_failed_is_tried_again_when_measuring_is_asked_for(tmp_path: Path) -> None:
    lost = [True, False]

    def measure(*given: Any) -> None:
        broken = Candidate(
            scheme="w8a8", placement="pointwise", graph_form=FORMS[0], outcome="failed", reason="x"
        )
        best = broken if lost.pop(0) else candidate("w8a8", FORMS[0], 0.4)
        (given[-2] / MEASURED).write_bytes(to_json((best, FLOAT)))

    def run(*, asked: bool) -> tuple[str, str]:
        exports, given = Exports(Recipe(runtimes=("openvino",))), conditions(Stopwatch({}))
        stages = Stages(tmp_path, Display(), cores=1)
        layout = Autotuner(stages, exports, replace(given, asked=asked), None).run(Path())[
            "openvino"
        ]
        return layout.source, layout.scheme

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "_measure", measure)
        assert run(asked=True) == ("default", "w8a8")
        assert run(asked=False) == ("default", "w8a8")
        assert len(lost) == 1
        assert run(asked=True) == ("measured", "w8a8")
        assert run(asked=True) == ("measured", "w8a8")
        assert not lost


# --- where it holds -------------------------------------------------------------------------------


class Emulated(Stopwatch):
    """A stand-in for ARM: it counts, and tells how often it was asked."""

    name = "emulated-arm64:phone"

    def probe(self) -> DeviceInfo | NotRun:
        found = super().probe()
        assert isinstance(found, DeviceInfo)
        return replace(found, kind="emulated")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    device = Emulated({}, FLAGS["arm"])
    monkeypatch.setattr(base, "device", {"emulated-arm64:phone": device}.__getitem__)
    return device


@pytest.mark.parametrize(
    ("name", "device", "how", "reason"),
    [
        ("openvino", Stopwatch({}), {"effort": "off"}, "--tune off"),
        ("coreml", Stopwatch({}), {}, "it is not a Mac"),
        ("openvino", Stopwatch({}, ("asimd",)), {}, "and stopwatch has arm"),
        ("openvino", Stopwatch({}, ()), {}, "and stopwatch has none it names"),
        (
            "tflite",
            Stopwatch({}, ("avx2",)),
            {},
            "its artifacts are for arm, and stopwatch has avx2",
        ),
    ],
)
def test_elsewhere_a_default_is_taken_and_said(
    name: str,
    device: Stopwatch,
    how: dict[str, Any],
    reason: str,
    stand_in: Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stand_in, "probe", lambda: NotRun(reason="its sysroot is not built"))
    stages: Any = None
    exports = Exports(Recipe(runtimes=(name,)))
    layouts = Autotuner(stages, exports, conditions(device, **how), None).run(Path())
    layout = layouts[name]
    assert layout.source == "default"
    assert reason in layout.reason
    assert not device.heats
    assert exports.laid_out(layouts).exports(exports.targets[0]) == exports_of(name)


def tuned_beside(name: str, here: Stopwatch, **how: Any) -> tuple[Layout, list[Autotuner]]:
    """Return a runtime's layout and who measured it."""
    by: list[Autotuner] = []
    exports = Exports(Recipe(runtimes=(name,)))

    def measured(self: Autotuner, target: base.Runtime, _: Path) -> Layout:
        by.append(self)
        return self.exports.default_layout(target, "measured")

    stages: Any = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "_measured", measured)
        given = replace(conditions(here), **how)
        layouts = Autotuner(stages, exports, given, None).run(Path())
    return layouts[name], by


def test_a_device_of_its_own_isa_stands_in_and_counts(stand_in: Emulated) -> None:
    layout, by = tuned_beside("tflite", Stopwatch({}, FLAGS["avx2"]), threads=2)
    assert layout.reason == "measured"
    (one,) = by
    assert one.given.device is stand_in
    assert (one.given.clock, one.given.threads) == ("instructions", 1)


def test_what_is_for_this_device_is_measured_here(stand_in: Emulated) -> None:
    here = Stopwatch({}, FLAGS["arm"])
    _, by = tuned_beside("tflite", here)
    assert [one.given.device for one in by] == [here]
    assert stand_in is not here


@pytest.mark.usefixtures("stand_in")
def test_what_is_switched_off_is_off_there_too() -> None:
    layout, by = tuned_beside("tflite", Stopwatch({}, FLAGS["avx2"]), effort="off")
    assert (layout.reason, by) == ("--tune off", [])


class Shelf:
    """Stages of which the one that measures is finished, or not."""

    def __init__(self, done: str, folder: Path) -> None:
        (folder / MEASURED).write_text("[]")
        self.folder = folder if done == "finished" else None
        self.taken: list[str] = []

    def finished(self, _: Stage) -> Path | None:
        return self.folder

    def do_here(self, stage: Stage, _: Any, *, anew: bool) -> Path:
        assert not anew
        self.taken.append(stage.name)
        raise DeviceError("it is here", allowed="anything", do="Nothing")


@pytest.mark.parametrize("shelf", ["finished", "empty"])
@pytest.mark.usefixtures("stand_in")
def test_nobody_waits_minutes_for_what_nobody_asked(shelf: str, tmp_path: Path) -> None:
    stages: Any = Shelf(shelf, tmp_path)
    given = replace(conditions(Stopwatch({}, FLAGS["avx2"])), macs=2 * 10**9)
    exports = Exports(Recipe(runtimes=("tflite",)))
    layout = Autotuner(stages, exports, given, None).run(Path())["tflite"]
    if shelf == "empty":
        assert "`convnext-edge tune RUN_DIR --effort full` waits for it" in layout.reason
    else:
        # What somebody did wait for is taken.
        assert stages.taken == ["tune-emulated-arm64-phone-tflite"]


def test_who_names_a_device_waits_for_it_and_hears_that_it_failed(tmp_path: Path) -> None:
    stages: Any = Shelf("empty", tmp_path)
    here = Emulated({}, FLAGS["arm"])
    given = replace(conditions(here, counts=True), macs=2 * 10**9)
    exports = Exports(Recipe(runtimes=("tflite",)))
    with pytest.raises(DeviceError, match="it is here"):
        Autotuner(stages, exports, given, None).run(Path())
    assert stages.taken == ["tune-emulated-arm64-phone-tflite"]


@pytest.mark.usefixtures("stand_in")
def test_a_full_search_takes_its_time() -> None:
    here = Stopwatch({}, FLAGS["avx2"])
    _, by = tuned_beside("tflite", here, macs=10**10, effort="full")
    assert len(by) == 1


def test_a_stand_in_that_is_not_set_up_says_so(
    stand_in: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "probe", lambda: NotRun(reason="its sysroot is not built"))
    layout, by = tuned_beside("tflite", Stopwatch({}, FLAGS["avx2"]))
    assert layout.reason == (
        "its artifacts are for arm, and stopwatch has avx2; "
        "emulated-arm64:phone: its sysroot is not built"
    )
    assert not by


@pytest.mark.parametrize("isa", FLAGS)
def test_flags_tell_the_isa(isa: str) -> None:
    assert isa_of(FLAGS[isa]) == isa


def test_a_layout_is_what_is_exported() -> None:
    exports = Exports(Recipe(runtimes=("openvino",)))
    target = exports.targets[0]
    layout = replace(
        exports.default_layout(target, ""),
        placement="pointwise-io", graph_form=FORMS[1], float_form=FORMS[0],
    )  # fmt: skip
    base_, quantized = exports.laid_out({"openvino": layout}).exports(target)
    assert (base_.scheme, base_.graph_form) == ("float", FORMS[0])
    assert (quantized.placement, quantized.graph_form) == ("pointwise-io", FORMS[1])
    only = replace(layout, scheme="float", placement=None)
    assert exports.laid_out({"openvino": only}).exports(target) == [base_]


# --- as a user types it ---------------------------------------------------------------------------


def test_a_run_folder_is_tuned_and_its_measurements_are_kept(tmp_path: Path) -> None:
    def cli(*words: str) -> str:
        done = subprocess.run(
            [*CLI, *words], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    words = ("--runtimes", "onnx", "--calibration-images", "32", "--eval-images", "60")
    said = cli("run", *words, "--tune", "quick", "--out", "run")
    report = read_report(tmp_path / "run")
    (layout,) = report.layouts
    assert layout.source == "measured"
    assert layout.isa == host_isa()
    assert layout.versions is not None
    assert layout.versions["onnxruntime"]
    assert sum(one.scheme == "float" for one in layout.candidates) == 2
    assert sum(one.scheme == "w8a8" for one in layout.candidates) == 3
    assert all(one.outcome == "measured" for one in layout.candidates)
    assert sentence(layout) in " ".join(said.split())
    shipped = [row for row in report.artifacts if row.scheme == layout.scheme]
    assert [row.graph_form for row in shipped] == [layout.graph_form]
    page = (tmp_path / "run" / "pages" / "index.html").read_text()
    assert "Candidates of onnx" in page
    assert "Where the time goes" in page
    assert [one.scheme for one in report.breakdowns] == [row.scheme for row in report.artifacts]
    assert all(one.floor_ms for one in report.breakdowns)
    said = cli("explain", "--latency", "run/artifacts/onnx-float/model.onnx")
    # So short a model may take less than its profiler does, and which it is differs by machine.
    assert ("pointwise layers alone take" in said) != ("Without the profiler it takes" in said)
    assert "depthwise" in said
    assert re.search(r"reused:[^.]*tune-local-onnx", cli("tune", "run"))
    assert read_report(tmp_path / "run").layouts == (layout,)
    # Only `run` and `tune` choose: what measures again keeps to what was chosen.
    assert "tune-local" not in cli("bench", "run", "--threads", "2")
    again = read_report(tmp_path / "run")
    assert again.layouts == (layout,)
    assert [row.sha256 for row in again.artifacts] == [row.sha256 for row in report.artifacts]
    # A folder made where there are more cores can be verified here.
    recipe = tmp_path / "run" / "recipe.json"
    assert '"threads": 2' in recipe.read_text()
    recipe.write_text(recipe.read_text().replace('"threads": 2', '"threads": 999'))
    cli("verify", "run")
    recipe.write_text(recipe.read_text().replace('"threads": 999', '"threads": 2'))
    (tmp_path / "run" / "layouts.json").write_text('{"onnx": {}}')
    done = subprocess.run(
        [*CLI, "bench", "run"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "layouts.json tells no layouts" in done.stderr
    kept = [row.sha256 for row in read_report(tmp_path / "run").artifacts]
    assert kept == [row.sha256 for row in report.artifacts]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tune", "nowhere", "--effort", "off"), "--effort is 'off'. Allowed: quick, full"),
        (("tune", "nowhere"), "nowhere is not a run folder"),
        (("run", "--threads", "999", "--out", "x"), "--threads 999 on local, which has"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = subprocess.run([*CLI, *words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode in {1, 2}
    assert said in done.stderr
    assert not (tmp_path / "x" / "recipe.json").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"graph_form": "sideways"},
        {"placement": "nowhere"},
        {"graph_form": "1x1 convolution", "placement": "pointwise"},
        {"runtime": "tflite"},
        {"scheme": "w4a8"},
        {"scheme": "w8a16", "asked": "w8a16"},
        {"placement": None},
        {"scheme": "float"},
        {"float_stages": (4,)},
        {"float_stages": (-1,)},
    ],
)
def test_layouts_that_a_runtime_does_not_have_are_refused(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    exports = Exports(Recipe(runtimes=("onnx",)))
    right = exports.default_layout(exports.targets[0], "")
    file = tmp_path / "layouts.json"
    assert read_layouts(file, 4) == {}
    file.write_bytes(to_json({"onnx": right}))
    assert read_layouts(file, 4) == {"onnx": right}
    file.write_bytes(to_json({"onnx": replace(right, **wrong)}))
    with pytest.raises(ArtifactError, match=r"layouts\.json tells no layouts"):
        read_layouts(file, 4)
