"""Where the time goes: every operation has its kind, and the floor holds the pointwise layers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from calib.collect import collect
from pipeline.convnext import seeded
from pipeline.errors import ArtifactError
from pipeline.fold import fold
from pipeline.quantize import Given, quantize, read, write
from pipeline.records import Architecture, Breakdown, Export, OpKind, Preprocessing, Scheme
from pipeline.worker import silent
from reports import breakdowns
from targets.base import NotRun, OpTime, Runtime, placement_of, runtime, runtimes
from targets.breakdown import breakdown_stage, in_turns, macs_of, pointwise_alone
from targets.export import export_stage
from targets.graph import Graph, Linear, QuantizePair
from targets.runtimes._op_kinds import kind_of
from targets.translate import build_graph

NET = Architecture(depths=(1, 2), dims=(16, 32), classes=5)
BLOCKS, SIZE = 3, 64
PROFILED = ("onnx", "openvino", "tflite")
FORMS = [
    (name, form, scheme)
    for name in PROFILED
    for form in runtime(name).capabilities.graph_forms
    for scheme in ("float", "w8a8")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pixels = 255 * torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).numpy()
    how = Preprocessing(input_size=SIZE)
    folded = fold(seeded(NET, 0), how)
    given = Given(folded=folded, statistics=collect(folded, [pixels]), sample=pixels)
    write(folder, *quantize(given, how, labels=None, parents={}))
    return folder


def export_of(name: str, scheme: Scheme, form: str | None = None, placement: str = "all") -> Export:
    can = runtime(name).capabilities
    return Export(
        runtime=name,
        scheme=scheme,
        placement="none" if scheme == "float" else placement_of(runtime(name), placement),
        graph_form=form or can.graph_forms[0],
        gelu=can.gelu,
        profile=None if scheme == "float" else "full",
    )


def artifact(model: Path, export: Export, folder: Path) -> Path:
    made = export_stage(str(model), asdict(export), str(folder), silent)
    return folder / str(made["path"])


@pytest.mark.parametrize(("name", "form", "scheme"), FORMS)
def test_every_operation_has_its_kind(
    model: Path, name: str, form: str, scheme: Scheme, tmp_path: Path
) -> None:
    path = artifact(model, export_of(name, scheme, form), tmp_path)
    image = np.zeros((1, 3, SIZE, SIZE), np.float32)
    found = runtime(name).op_times(path, image, threads=1, inferences=3)
    assert not isinstance(found, NotRun)
    kinds = Counter(one.kind for one in found)
    assert kinds["pointwise"] >= 2 * BLOCKS
    assert kinds["depthwise"] >= BLOCKS
    assert kinds["convolution"] == 2
    # BLOCKS, the stem's, the downsample's and the head's, each of one operation or of many.
    assert kinds["layernorm"] >= BLOCKS + 3
    # OpenVINO fuses it into the layer in front, or into what adds that one's bias.
    assert kinds["gelu"] == (0 if name == "openvino" else BLOCKS)
    assert all(one.ms >= 0 for one in found)
    assert sum(one.ms for one in found) > 0
    unnamed = [one.name for one in found if one.kind == "other" and "head" not in one.name]
    known = ("rescaled", "Multiply", "logits")
    assert all(any(word in one for word in known) for one in unnamed), unnamed


def test_two_runs_name_the_same_operations(model: Path, tmp_path: Path) -> None:
    path = artifact(model, export_of("onnx", "w8a8"), tmp_path)
    image = np.zeros((1, 3, SIZE, SIZE), np.float32)
    runs = [runtime("onnx").op_times(path, image, threads=1, inferences=n) for n in (1, 4)]
    first, second = ([(o.op, o.name, o.kind) for o in run] for run in runs if isinstance(run, list))
    assert first == second


def graph_of(model: Path, export: Export) -> Graph:
    record, arrays = read(model)
    return build_graph(record, arrays, runtime(export.runtime).capabilities, export)


@pytest.mark.parametrize("name", PROFILED)
@pytest.mark.parametrize("placement", ["pointwise", "all"])
def test_the_floor_is_the_pointwise_layers_with_their_integers(
    model: Path, name: str, placement: str, tmp_path: Path
) -> None:
    whole = graph_of(model, export_of(name, "w8a8", placement=placement))
    alone = pointwise_alone(whole)
    assert len(alone) == len(NET.depths)
    layers = [op for graph in alone for op in graph.weighted]
    wanted = [op for op in whole.weighted if isinstance(op, Linear) and ".blocks." in op.name]
    assert [op.name for op in layers] == [op.name for op in wanted]
    assert all(a.integers is b.integers for a, b in zip(layers, wanted, strict=True))
    for index, graph in enumerate(alone):
        # A site in front of every layer, so that each computes in integers here too.
        assert all(isinstance(graph[op.inputs[0]], QuantizePair) for op in graph.weighted)
        target = runtime(name)
        path = tmp_path / f"{index}{target.capabilities.suffix}"
        target.export(graph, path, "{}")
        assert target.prove(path, graph).integer_layers == len(graph.weighted)


def test_multiply_accumulates_are_counted(model: Path) -> None:
    graph = graph_of(model, export_of("onnx", "float"))
    macs = {op.name: macs_of(op) for op in graph.weighted}
    places = (SIZE // 4) ** 2
    assert macs["stem.conv"] == 16 * 3 * 16 * places
    assert macs["stages.0.blocks.0.depthwise"] == 16 * 49 * places
    assert macs["stages.0.blocks.0.pw1"] == 16 * 64 * places
    assert macs["head.fc"] == 32 * 5


@pytest.mark.parametrize("name", PROFILED)
def test_the_stage_tells_kinds_floor_and_bound(model: Path, name: str, tmp_path: Path) -> None:
    path = artifact(model, export_of(name, "w8a8", placement="pointwise"), tmp_path)
    said: dict[str, Any] = breakdown_stage(
        name, str(path), str(model), (1, 3, SIZE, SIZE), str(tmp_path), silent
    )
    where = {"runtime": name, "scheme": "w8a8", "device": "local"}
    found = TypeAdapter(Breakdown).validate_python(where | said)
    assert found.outcome == "measured"
    assert found.ms is not None
    assert found.ops is not None
    assert found.ms.keys() == found.ops.keys()
    total = breakdowns.total_ms(found)
    assert found.floor_ms is not None
    assert found.bound_ms is not None
    assert found.floor_ms > 0
    assert found.bound_ms > 0
    assert sum(share for _, _, share, _ in breakdowns.rows(found)) == pytest.approx(1)
    assert found.unprofiled_ms is not None
    assert 0 < found.unprofiled_ms < 1000
    told = " ".join(breakdowns.sentences(replace(found, unprofiled_ms=total)))
    assert f"{total / found.floor_ms:.2f} times" in told
    assert (breakdowns.draw([replace(found, unprofiled_ms=total)]) or "").count("<svg") == 1
    assert {one.name for one in tmp_path.iterdir()} == {path.name, *beside(path)}


def test_whole_and_parts_take_turns_and_one_slow_turn_changes_nothing() -> None:
    whole, part = Path("whole"), Path("part")
    slow = [2.0, 2.0, 9.0, 9.0, 1.0, 1.0]  # the machine is disturbed for one turn of both
    asked = list[Path]()

    class Told:
        def op_times(self, path: Path, image: Any, **how: Any) -> list[OpTime]:
            ms = slow[len(asked)] * {whole: 4.0, part: 3.0}[path]
            asked.append(path)
            return [OpTime(kind="pointwise", op="Gemm", name=f"{path}.{i}", ms=ms) for i in (1, 2)]

    told: Any = Told()
    image = np.zeros((1, 3, 8, 8), np.float32)
    found = in_turns(told, lambda: [(whole, image), (part, image)], silent)
    assert asked == [whole, part] * 3
    assert [[(one.name, one.ms) for one in ops] for ops in found if isinstance(ops, list)] == [
        [("whole.1", 8.0), ("whole.2", 8.0)],
        [("part.1", 6.0), ("part.2", 6.0)],
    ]


def test_parts_that_the_profiler_does_not_tell_leave_the_whole_its_times() -> None:
    class Told:
        def op_times(self, path: Path, image: Any, **how: Any) -> list[OpTime] | NotRun:
            if path.name == "part":
                return NotRun(reason="other operations than the file has")
            return [OpTime(kind="gelu", op="Gelu", name="gelu", ms=1.0)]

    told: Any = Told()
    image = np.zeros((1, 3, 8, 8), np.float32)
    artifacts = [(Path("whole"), image), (Path("part"), image)]
    whole, part = in_turns(told, lambda: artifacts, silent)
    assert isinstance(whole, list)
    assert isinstance(part, NotRun)

    def part_first() -> Iterator[tuple[Path, Any]]:
        yield artifacts[1]
        pytest.fail("where the whole is not told, its parts are not even made")

    assert in_turns(told, part_first, silent) == [part]


def test_turns_that_tell_other_operations_tell_nothing() -> None:
    kinds: Iterator[OpKind] = iter(["gelu", "add", "gelu"])

    class Told:
        def op_times(self, path: Path, image: Any, **how: Any) -> list[OpTime]:
            return [OpTime(kind=next(kinds), op="Op", name="name", ms=1.0)]

    told: Any = Told()
    artifact = (Path("whole"), np.zeros((1, 3, 8, 8), np.float32))
    [found] = in_turns(told, lambda: [artifact], silent)
    assert isinstance(found, NotRun)
    assert "other operations" in found.reason


def test_the_floor_of_float16_is_in_float16(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = runtimes()["openvino"], list[str]()
    whole = type(target).op_times

    def op_times(self: Runtime, path: Path, image: Any, **how: Any) -> Any:
        seen.append(json.loads(self.read_metadata(path))["export"]["scheme"])
        return whole(self, path, image, **how)

    monkeypatch.setattr(type(target), "op_times", op_times)
    path = artifact(model, export_of("openvino", "float16"), tmp_path)
    breakdown_stage("openvino", str(path), str(model), (1, 3, SIZE, SIZE), str(tmp_path), silent)
    assert len(seen) > 1
    assert set(seen) == {"float16"}


def test_times_that_are_the_profiler_s_own_are_not_held_against_anything() -> None:
    found = Breakdown(
        runtime="onnx", scheme="w8a8", device="local", outcome="measured", method="m",
        inferences=1, ms={"gelu": 1.29}, ops={"gelu": 1}, unprofiled_ms=0.12, floor_ms=0.1,
        bound_ms=0.01, macs_per_second=1e9, bytes_per_second=1e9,
    )  # fmt: skip
    said = " ".join(breakdowns.sentences(found))
    assert "Without the profiler it takes 0.12 ms" in said
    assert "times that" not in said
    assert "roofline" not in said
    alike = replace(found, unprofiled_ms=0.7)
    said = " ".join(breakdowns.sentences(alike))
    assert "layers alone take 0.1 ms in this runtime: the whole is 12.90 times that" in said
    assert "roofline" in said
    assert "fall back" not in said
    left = replace(alike, fallback_ops=6, fallback_ms=0.25)
    assert "6 of its operations fall back" in " ".join(breakdowns.sentences(left))
    assert "0.25 ms" in " ".join(breakdowns.sentences(left))
    assert breakdowns.draw([found]) is None
    assert breakdowns.draw([alike]) is not None


def test_several_devices_are_named_in_the_drawing() -> None:
    one = Breakdown(
        runtime="onnx", scheme="w8a8", device="cpu:avx2", outcome="measured", method="m",
        inferences=1, ms={"gelu": 1.0}, ops={"gelu": 1},
    )  # fmt: skip
    other = replace(one, device="cpu:avx512")
    assert "cpu:avx2" not in (breakdowns.draw([one]) or "")
    both = breakdowns.draw([one, other]) or ""
    assert "cpu:avx2" in both
    assert "cpu:avx512" in both


def beside(path: Path) -> set[str]:
    return {path.with_suffix(".bin").name} if path.suffix == ".xml" else set()


def test_without_the_integers_there_is_no_floor(model: Path, tmp_path: Path) -> None:
    path = artifact(model, export_of("onnx", "float"), tmp_path)
    said = breakdown_stage("onnx", str(path), None, (1, 3, SIZE, SIZE), str(tmp_path), silent)
    assert said["outcome"] == "measured"
    assert "floor_ms" not in said


@pytest.mark.parametrize("name", sorted(set(runtimes()) - set(PROFILED)))
def test_who_has_no_profiler_says_so(name: str, tmp_path: Path) -> None:
    said = breakdown_stage(name, "nothing", None, (1, 3, 8, 8), str(tmp_path), silent)
    assert said["outcome"] == "not_run"
    found = TypeAdapter(Breakdown).validate_python(
        {"runtime": name, "scheme": "float", "device": "local", **said}
    )
    assert breakdowns.sentences(found) == (f"{name} float on local: not run: {said['reason']}",)
    assert breakdowns.draw([found]) is None


def test_a_damaged_file_is_refused_by_the_profiler(tmp_path: Path) -> None:
    from targets.runtimes._litert_profiler import profile

    (tmp_path / "model.tflite").write_bytes(b"\0" * 64)
    with pytest.raises(ArtifactError, match="LiteRT's profiler: LiteRtCreateModelFromFile answers"):
        profile(tmp_path / "model.tflite", 1, warm_up=0, inferences=1)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["stages.0.blocks.1.norm.mean"], "layernorm"),
        (["stages.1.downsample.norm"], "layernorm"),
        (["stages.1.downsample.conv"], "convolution"),
        (["Multiply_9210", "stages.0.blocks.0.pw1", "stages.0.blocks.0.gelu"], "pointwise"),
        (["stages.0.blocks.0.depthwise.2"], "depthwise"),
        (["head.pool"], "other"),
        ([], "other"),
    ],
)
def test_a_name_tells_the_kind(names: list[str], kind: str) -> None:
    assert kind_of(names) == kind
