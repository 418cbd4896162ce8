"""Devices `coreml:UNITS`: what they say off macOS, and their processes as on a Mac."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder

from pipeline.errors import UsageError
from pipeline.worker import silent
from targets.base import DeviceInfo, Job, NotRun, device, devices, runtime, runtimes
from targets.devices.local import DEVICE as LOCAL

NAMES = ("coreml:all", "coreml:cpu", "coreml:cpu-gpu", "coreml:cpu-ne")
MAC = '''
"""Make a process take this system for macOS; CoreML answers with the units that it was told."""

import platform
import sys
from types import ModuleType, SimpleNamespace

import numpy as np

platform.system = lambda: "Darwin"
for unneeded in ("sklearn", "tensorflow", "torch", "transformers"):
    sys.modules[unneeded] = None
MARK = {"ALL": 1, "CPU_ONLY": 2, "CPU_AND_GPU": 3, "CPU_AND_NE": 4}


class Proxy:
    def __init__(self, file, units, *_):
        self.units = units

    @staticmethod
    def maximum_supported_specification_version():
        return 99

    def get_compiled_model_path(self):
        return self.units

    def predict(self, inputs, *_):
        return {"logits": np.full((1, 3), MARK[self.units], np.float32)}

    @staticmethod
    def get_compute_plan(path, units):
        assert path == units
        unit = "MLNeuralEngineComputeDevice" if units.endswith("NE") else "MLCPUComputeDevice"
        operations = [
            SimpleNamespace(preferred_compute_device=type(name, (), {})())
            for name in (unit, unit, "MLCPUComputeDevice")
        ]
        function = SimpleNamespace(block=SimpleNamespace(operations=operations))
        program = SimpleNamespace(functions={"main": function})
        return SimpleNamespace(
            model_structure=SimpleNamespace(program=program),
            get_compute_device_usage_for_mlprogram_operation=lambda usage: usage,
        )


library = ModuleType("coremltools.libcoremlpython")
library._MLModelProxy = library._MLComputePlanProxy = Proxy
sys.modules[library.__name__] = library
'''


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An .mlpackage with the artifact interface: the means of the channels."""

    @Builder.program(
        input_specs=[Builder.TensorSpec(shape=(1, 3, 4, 4))], opset_version=ct.target.iOS17
    )
    def program(image):  # type: ignore[no-untyped-def]
        return Builder.reduce_mean(x=image, axes=[2, 3], keep_dims=False, name="logits")

    path = tmp_path / "model.mlpackage"
    target = ct.target.iOS17
    ct.convert(program, minimum_deployment_target=target, skip_model_load=True).save(str(path))
    return path


def on(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))


def test_off_macos_each_is_listed_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "Linux")
    known = devices()
    assert tuple(name for name in known if name.startswith("coreml:")) == NAMES
    for name in NAMES:
        assert known[name].probe() == NotRun(reason="CoreML is on macOS only, and this is Linux")
        cannot = known[name].can_run(runtime("coreml"))
        assert isinstance(cannot, NotRun)
        assert "macOS runs it" in cannot.reason


def test_on_a_mac_each_names_its_units_and_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "Darwin")
    ends = ("any unit", "the CPU alone", "CPU and GPU", "CPU and Neural Engine")
    here = LOCAL.probe()
    assert isinstance(here, DeviceInfo)
    for name, end in zip(NAMES, ends, strict=True):
        info = device(name).probe()
        assert isinstance(info, DeviceInfo)
        assert (info.name, info.kind, info.isa) == (name, "host", here.isa)
        assert info.description.endswith(f", CoreML on {end}")
        assert info.versions == {"macOS": "15.5"}
        assert info.machine == here.machine  # they are timed in turn


def test_only_coreml_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "Darwin")
    place = device("coreml:cpu")
    for name, one in runtimes().items():
        cannot = place.can_run(one)
        if name == "coreml":
            assert cannot is None
        else:
            assert cannot == NotRun(reason=f"{name} does not run through CoreML")


@pytest.mark.parametrize(("address", "got"), [("gpu", "gpu"), ("", "none named")])
def test_unknown_units_are_one_line_with_what_is_allowed(address: str, got: str) -> None:
    with pytest.raises(UsageError) as caught:
        device(f"coreml:{address}")
    assert str(caught.value) == (
        f"unknown compute units: {got}. Allowed: {', '.join(NAMES)}. Correct --device."
    )


def test_processes_are_told_their_units_and_the_plan_is_kept(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(MAC)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    place, image = device("coreml:cpu-ne"), np.zeros((1, 3, 4, 4), np.float32)
    job = Job(label="float", runtime="coreml", path=artifact)
    logits = place.infer(job, image, batch=1, threads=1, progress=silent)
    assert (logits == 4).all()
    harness, found = place.measure(
        [Job(label="harness", runtime="coreml", path=None), job],
        image,
        rounds=2,
        per_round=3,
        threads=1,
        progress=silent,
    )
    assert len(found.wall_ms) == 6
    assert found.operations_on == {"Neural Engine": 2, "CPU": 1}
    assert harness.operations_on == {}
