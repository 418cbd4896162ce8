"""CoreML here, and as on a Mac: coremltools' own code, with what the system answers made up."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.models import compute_device, compute_plan
from coremltools.models import model as models
from coremltools.models.ml_program.experimental import perf_utils
from numpy.typing import NDArray

from calib.collect import collect
from pipeline.convnext import seeded
from pipeline.fold import fold
from pipeline.quantize import Given, quantize
from pipeline.records import Architecture, Export, Preprocessing, Scheme, Wanted
from pipeline.statistics import sqnr_db
from targets.base import InProcesses, NotRun, device, kind_here, runtimes
from targets.breakdown import breakdown_stage
from targets.devices.local import DEVICE
from targets.graph import Graph
from targets.runtimes import _coreml_plan, coreml
from targets.runtimes._mil import Interpreter
from targets.runtimes._mil_file import read_program
from targets.runtimes.coreml import RUNTIME
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

HOW = Preprocessing(input_size=32)
NET = Architecture(depths=(1, 1), dims=(8, 16), classes=5)
TYPES = {
    "CPU": compute_device.MLCPUComputeDevice,
    "Neural Engine": compute_device.MLNeuralEngineComputeDevice,
}
MS = 2.0


def pictures(n: int = 8) -> NDArray[np.float32]:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, 3, 5, 5, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    return fine.clamp(0, 255).numpy()


def graph_of(scheme: Scheme, batch: Any = 1) -> Graph:
    folded = fold(seeded(NET, 3), HOW)
    sample = pictures()
    given = Given(folded=folded, statistics=collect(folded, [sample]), sample=sample)
    wanted = Wanted(scheme="w8a8" if scheme == "float" else scheme)
    record, arrays = quantize(given, HOW, wanted, labels=None, parents={})
    export = Export(
        runtime="coreml",
        scheme=scheme,
        placement="none" if scheme == "float" else "all",
        graph_form="1x1 convolution",
        gelu="erf",
        profile=None if scheme == "float" else "full",
        batch=batch,
    )
    return build_graph(record, arrays, RUNTIME.capabilities, export)


def written(graph: Graph, folder: Path) -> Path:
    path = folder / "model.mlpackage"
    RUNTIME.export(graph, path, "{}")
    return path


@pytest.fixture(scope="module")
def in_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(graph_of("float"), tmp_path_factory.mktemp("float"))


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")


# --- off macOS ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("elsewhere")
def test_only_coreml_is_interpreted() -> None:
    kinds = {name: kind_here(target) for name, target in runtimes().items()}
    assert kinds.pop("coreml") == "interpreted"
    assert set(kinds.values()) == {"host"}
    assert RUNTIME.can_run() is None


@pytest.mark.usefixtures("elsewhere")
def test_what_is_interpreted_has_no_time(tmp_path: Path) -> None:
    cannot = DEVICE.can_run(RUNTIME)
    assert cannot == NotRun(reason="interpreted here, which tells no time: macOS runs it")
    said = breakdown_stage(
        "coreml", "nothing.mlpackage", None, (1, 3, 32, 32), str(tmp_path), lambda *_: None
    )
    assert said == {
        "outcome": "not_run",
        "reason": "CoreML tells where its time goes on macOS only",
    }


@pytest.mark.usefixtures("elsewhere")
def test_a_dynamic_batch_takes_any_number(tmp_path: Path) -> None:
    session = RUNTIME.load(written(graph_of("w8a8", "dynamic"), tmp_path), threads=1)
    for n in (1, 2, 7):
        alone = np.concatenate([session(image[None]) for image in pictures(n)])
        np.testing.assert_allclose(session(pictures(n)), alone, rtol=1e-4, atol=1e-5)


def of_ours(folder: Path) -> tuple[Path, NDArray[np.float32]]:
    """Our own program in float16, and what float32 makes of the images."""
    graph = graph_of("float")
    return half(coreml._Emitter(graph).program(), folder), evaluate(graph, pictures())


def of_coremltools(folder: Path) -> tuple[Path, NDArray[np.float32]]:
    """The same network as coremltools lays it out by itself, without a line of ours."""
    network = seeded(NET, 3).eval()
    with torch.inference_mode():
        expected = network(torch.from_numpy(pictures())).numpy()
    exported = torch.export.export(network, (torch.zeros(1, 3, 32, 32),)).run_decompositions({})
    return half(exported, folder), expected


def half(program: Any, folder: Path) -> Path:
    target = ct.target.iOS17
    path = folder / "half.mlpackage"
    ct.convert(program, minimum_deployment_target=target, skip_model_load=True).save(str(path))
    return path


@pytest.mark.parametrize("made", [of_ours, of_coremltools])
def test_float16_costs_what_float16_costs(made: Any, tmp_path: Path) -> None:
    path, expected = made(tmp_path)
    program = Interpreter(read_program(path))
    (given,) = program.program.inputs
    logits = [next(iter(program(**{given: one[None]}).values())) for one in pictures()]
    reached = sqnr_db(expected, np.concatenate(logits))
    assert reached is not None
    # Eleven bits are 66 dB; what a network of many operations loses of them is not half.
    assert 40 < reached < 80


# --- on macOS -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mac")
def test_on_a_mac_coreml_runs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (kind_here(RUNTIME), DEVICE.can_run(RUNTIME)) == ("host", None)
    asked: list[dict[str, Any]] = []

    def predict(_: Any, data: dict[str, Any]) -> dict[str, Any]:
        asked.append(data)
        return {"logits": np.ones((1, 5), np.float32)}

    monkeypatch.setattr(ct.models.MLModel, "predict", predict)
    graph = graph_of("float")
    session = RUNTIME.load(written(graph, tmp_path), threads=1)
    assert (session(pictures(1)) == 1).all()
    assert list(asked[0]) == ["image"]


@pytest.mark.skipif(platform.system() != "Darwin", reason="CoreML is on macOS only")
@pytest.mark.parametrize("scheme", ["float", "w8a8", "w4a8"])
def test_the_interpreter_computes_what_coreml_computes(scheme: Scheme, tmp_path: Path) -> None:
    path = written(graph_of(scheme), tmp_path)
    real, ours = (load(path, threads=1) for load in (RUNTIME.load, coreml.interpreted))
    expected, found = (np.concatenate([f(i[None]) for i in pictures()]) for f in (real, ours))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < (1e-4 if scheme == "float" else 0.02)


def structure(spec: Any) -> compute_plan.MLModelStructure:
    """A program as CoreML describes what it compiled."""
    function = spec.mlProgram.functions["main"]
    operations = [
        compute_plan.MLModelStructureProgramOperation(
            inputs={},
            operator_name=f"ios17.{op.type}",
            outputs=[SimpleNamespace(name=out.name) for out in op.outputs],
            blocks=[],
            __proxy__=None,
        )
        for op in function.block_specializations[function.opset].operations
    ]
    block = compute_plan.MLModelStructureProgramBlock(
        inputs=[], operations=operations, output_names=["logits"]
    )
    program = compute_plan.MLModelStructureProgram(
        functions={"main": compute_plan.MLModelStructureProgramFunction(inputs=[], block=block)}
    )
    return compute_plan.MLModelStructure(neuralnetwork=None, program=program, pipeline=None)


class Plan:
    """Convolutions on the Neural Engine, the rest on the CPU; a tenth of the time for each."""

    def __init__(self, spec: Any) -> None:
        self.model_structure = structure(spec)

    def get_compute_device_usage_for_mlprogram_operation(self, op: Any) -> Any:
        kind = op.operator_name.removeprefix("ios17.")
        if kind.startswith("const"):
            return None
        unit = TYPES["Neural Engine" if kind == "conv" else "CPU"]
        return SimpleNamespace(preferred_compute_device=object.__new__(unit))

    def get_estimated_cost_for_mlprogram_operation(self, op: Any) -> Any:
        known = self.get_compute_device_usage_for_mlprogram_operation(op)
        return SimpleNamespace(weight=0.1) if known else None


class Loaded:
    """A model that CoreML has loaded, every prediction of which takes 2 ms."""

    last_predict_duration_in_nano_seconds = int(MS * 1e6)

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def make_state_if_needed(self) -> None:
        return None

    async def predict(self, inputs: dict[str, Any], state: None) -> dict[str, Any]:
        assert list(inputs) == ["image"]
        return {}

    async def retrieve_compute_plan(self) -> Plan:
        return Plan(self.spec)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = written(graph_of("w8a8"), tmp_path)
    spec = ct.utils.load_spec(str(path))

    async def loaded(*, model: Any, **_: Any) -> Loaded:
        return Loaded(model.get_spec())

    monkeypatch.setattr(perf_utils.MLModelBenchmarker, "_create_loaded_model", staticmethod(loaded))
    monkeypatch.setattr(ct.models.MLModel, "get_compiled_model_path", lambda _: "m.mlmodelc")
    plan = classmethod(lambda *_, **__: Plan(spec))
    monkeypatch.setattr(compute_plan.MLComputePlan, "load_from_path", plan)
    return path


@pytest.mark.usefixtures("mac")
def test_a_proof_tells_the_plan_s_units(planned: Path) -> None:
    proof = RUNTIME.prove(planned, graph_of("w8a8"))
    convolutions = proof.op_counts["conv"]
    others = sum(n for op, n in proof.op_counts.items() if not op.startswith("const"))
    assert proof.method.endswith(
        f"CoreML's plan: {others - convolutions} operations on CPU, "
        f"{convolutions} operations on Neural Engine"
    )


@pytest.mark.usefixtures("mac")
def test_op_times_are_the_plan_s_shares_in_the_program_s_order(planned: Path) -> None:
    found = RUNTIME.op_times(planned, pictures(1), threads=1, inferences=3)
    assert not isinstance(found, NotRun)
    assert [one.ms for one in found] == pytest.approx([MS / 10] * len(found))
    names = [one.name for one in found]
    assert names.index("stem_conv") < names.index("stages_0_blocks_0_pw1") < names.index("logits")
    by_name = {one.name: one for one in found}
    assert by_name["stages_0_blocks_0_pw1"].kind == "pointwise"
    assert by_name["stages_0_blocks_0_pw1"].op == "conv on Neural Engine"
    assert by_name["stages_0_blocks_0_depthwise"].kind == "depthwise"
    assert by_name["stages_0_blocks_0_norm"].op == "layer_norm on CPU"
    assert sum(one.kind == "quantize" for one in found) == sum(
        one.op.startswith(("quantize", "dequantize")) for one in found
    )


class Proxy:
    """What coremltools calls CoreML by; notes the units that it is told."""

    told: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, _: str, units: str, *__: Any) -> None:
        self.told.append(("model", units))

    @staticmethod
    def maximum_supported_specification_version() -> int:
        return 99

    def get_compiled_model_path(self) -> str:
        return "m.mlmodelc"

    @classmethod
    def get_compute_plan(cls, _: str, units: str) -> Any:
        cls.told.append(("plan", units))
        program = SimpleNamespace(
            functions={"main": SimpleNamespace(block=SimpleNamespace(operations=[]))}
        )
        return SimpleNamespace(model_structure=SimpleNamespace(program=program))


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("local", "ALL"),
        ("coreml:all", "ALL"),
        ("coreml:cpu", "CPU_ONLY"),
        ("coreml:cpu-gpu", "CPU_AND_GPU"),
        ("coreml:cpu-ne", "CPU_AND_NE"),
    ],
)
def test_a_device_s_units_reach_the_model_the_plan_and_the_profiler(
    name: str, units: str, in_float: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (models, compute_plan):
        monkeypatch.setattr(module, "_MLModelProxy", Proxy)
    monkeypatch.setattr(Proxy, "told", [])
    place = device(name)
    assert isinstance(place, InProcesses)
    for key, value in place.environment().items():
        monkeypatch.setenv(key, value)
    RUNTIME.load(in_float, threads=1)
    assert Proxy.told == [("model", units)]
    _coreml_plan.preferred_units(in_float)
    assert Proxy.told[1:] == [("model", units), ("plan", units)]

    async def loaded(*, model: Any, **_: Any) -> Loaded:
        Proxy.told.append(("profiler", model.compute_unit.name))
        return Loaded(model.get_spec())

    monkeypatch.setattr(perf_utils.MLModelBenchmarker, "_create_loaded_model", staticmethod(loaded))
    RUNTIME.op_times(in_float, pictures(1), threads=1, inferences=1)
    assert Proxy.told[-1] == ("profiler", units)


def test_an_export_leaves_nothing_beside_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, place = tmp_path / "temporary", tmp_path / "place"
    for folder in (elsewhere, place):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    RUNTIME.export(graph_of("w8a8"), place / "model.mlpackage", "{}")
    assert [one.name for one in place.iterdir()] == ["model.mlpackage"]
    assert list(elsewhere.iterdir()) == []
