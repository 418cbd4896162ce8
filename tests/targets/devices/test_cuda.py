"""The device `cuda`: what it says without a GPU, and that nothing runs on the CPU unseen."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import DeviceError
from pipeline.worker import silent
from targets.base import DeviceInfo, Job, NotRun, device, runtime, runtimes
from targets.devices import cuda
from targets.devices.cuda import PROVIDER, Cuda, Gpu, check_on_gpu, read_gpu
from targets.devices.local import Local
from targets.runtimes import _onnx_file

NVIDIA_SMI = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>535.104.05</driver_version>
  <cuda_version>12.2</cuda_version>
  <attached_gpus>2</attached_gpus>
  <gpu id="00000000:00:04.0">
    <product_name>Tesla T4</product_name>
    <uuid>GPU-1111</uuid>
    <clocks_event_reasons>
      <clocks_event_reason_gpu_idle>Not Active</clocks_event_reason_gpu_idle>
      <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
    </clocks_event_reasons>
    <temperature><gpu_temp>61 C</gpu_temp></temperature>
    <clocks><sm_clock>1590 MHz</sm_clock></clocks>
  </gpu>
  <gpu id="00000000:00:05.0">
    <product_name>NVIDIA A100-SXM4-40GB</product_name>
    <uuid>GPU-2222</uuid>
    <temperature><gpu_temp>N/A</gpu_temp></temperature>
  </gpu>
</nvidia_smi_log>
"""


CHANNELS, SIDE = 3, 4


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the artifact interface: a 1x1 convolution and a mean."""
    weight = np.arange(6, dtype=np.float32).reshape(2, CHANNELS, 1, 1)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "weight"], ["y"]),
            helper.make_node("ReduceMean", ["y", "axes"], ["logits"], keepdims=0),
        ],
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, CHANNELS, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
        ],
    )
    path = tmp_path_factory.mktemp("artifact") / "model.onnx"
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def images(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    shape = (n, CHANNELS, SIDE, SIDE)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program called nvidia-smi on the path, and nothing else."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answer.xml").write_text(NVIDIA_SMI)
    install(tmp_path, monkeypatch, f'while read -r l; do echo "$l"; done < {tmp_path}/answer.xml')
    info = device("cuda").probe()
    assert isinstance(info, DeviceInfo)
    assert (info.name, info.kind, info.isa) == ("cuda", "device", ())
    assert info.description == "Tesla T4, driver 535.104.05, CUDA 12.2"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "nvidia-smi is not installed"),
        ("echo 'it could not talk to the driver'; exit 9", "says it could not talk to the driver"),
        ("exit 6", "says nothing"),
        ("echo hello", "answers something else"),
        ("echo '<nvidia_smi_log/>'", "lists none"),
    ],
)
def test_without_a_gpu_it_says_why(
    script: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, script or "")
    if script is None:
        (tmp_path / "nvidia-smi").unlink()
    info = cuda.DEVICE.probe()
    assert isinstance(info, NotRun)
    assert info.reason.startswith("no CUDA GPU here: ")
    assert why in info.reason


def test_an_nvidia_smi_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "exec /bin/sleep 60")
    monkeypatch.setattr(cuda, "PATIENCE_S", 0.2)
    info = cuda.DEVICE.probe()
    assert isinstance(info, NotRun)
    assert "does not answer" in info.reason


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "Tesla T4"),
        ("0", "Tesla T4"),
        ("1,0", "NVIDIA A100-SXM4-40GB"),
        ("GPU-22", "NVIDIA A100-SXM4-40GB"),
        ("", None),
        ("-1", None),
        ("7", None),
        ("MIG-3333", None),
    ],
)
def test_cuda_visible_devices_is_respected(visible: str | None, name: str | None) -> None:
    gpu = read_gpu(NVIDIA_SMI, visible)
    if name is None:
        assert isinstance(gpu, NotRun)
        assert f"CUDA_VISIBLE_DEVICES={visible} names none of 2" in gpu.reason
    else:
        assert isinstance(gpu, Gpu)
        assert gpu.name == name


def test_a_state_has_what_the_driver_tells() -> None:
    first, second = (read_gpu(NVIDIA_SMI, word) for word in ("0", "1"))
    assert isinstance(first, Gpu)
    assert isinstance(second, Gpu)
    assert first.state.frequency_mhz == 1590
    assert first.state.temperatures_c == {"gpu": 61}
    assert first.state.throttled == "sw_power_cap"
    assert second.state.frequency_mhz is None
    assert second.state.temperatures_c == {}
    older = read_gpu(NVIDIA_SMI.replace("clocks_event", "clocks_throttle"), None)
    assert isinstance(older, Gpu)
    assert older.state.throttled == "sw_power_cap"


def test_only_onnx_goes_there() -> None:
    for name, one in runtimes().items():
        cannot = cuda.DEVICE.can_run(one)
        if name != "onnx":
            assert isinstance(cannot, NotRun)
            assert name in cannot.reason


def test_onnx_needs_the_cuda_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    has = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: has)
    cannot = cuda.DEVICE.can_run(runtime("onnx"))
    assert isinstance(cannot, NotRun)
    assert "onnxruntime-gpu" in cannot.reason
    has.insert(0, PROVIDER)
    assert cuda.DEVICE.can_run(runtime("onnx")) is None


class Fallen:
    """A session of onnxruntime that says where it is."""

    def __init__(self, providers: list[str]) -> None:
        self.providers = providers

    def get_providers(self) -> list[str]:
        return self.providers


def test_a_session_on_the_cpu_is_an_error() -> None:
    with pytest.raises(DeviceError, match="fell back to CPUExecutionProvider"):
        check_on_gpu(Fallen(["CPUExecutionProvider"]))
    check_on_gpu(Fallen([PROVIDER, "CPUExecutionProvider"]))  # an onnxruntime that tells no more


def test_an_operation_on_the_cpu_is_an_error(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = _onnx_file.session(artifact, threads=1, provider=(PROVIDER, {}))
    if running.get_providers()[0] == PROVIDER:  # a GPU is here
        assert _onnx_file.elsewhere(running, PROVIDER) == {}
        check_on_gpu(running)
        return
    assert _onnx_file.elsewhere(running, PROVIDER) == {"Conv": 1, "ReduceMean": 1}
    # As if the provider had loaded, and taken nothing.
    monkeypatch.setattr(running, "get_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="on the CPU: 1 Conv, 1 ReduceMean"):
        check_on_gpu(running)
    monkeypatch.setattr(cuda, "ON_THE_CPU", {"Conv", "ReduceMean"})
    check_on_gpu(running)


def test_nothing_runs_unseen_on_the_cpu(artifact: Path) -> None:
    """The whole way: a worker that cannot have the GPU raises; one that can gives logits."""
    job = Job(label="float", runtime="onnx", path=artifact)
    pixels = images(3)
    expected = Local().infer(job, pixels, batch=1, threads=1, progress=silent)
    if cuda.DEVICE.can_run(runtime("onnx")) is None and isinstance(cuda.DEVICE.probe(), DeviceInfo):
        found = cuda.DEVICE.infer(job, pixels, batch=1, threads=1, progress=silent)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        return
    with pytest.raises(DeviceError, match="fell back"):
        cuda.DEVICE.infer(job, pixels, batch=1, threads=1, progress=silent)
    with pytest.raises(DeviceError, match="fell back"):
        cuda.DEVICE.measure([job], pixels[:1], rounds=1, per_round=1, threads=1, progress=silent)


def test_samples_say_how_the_gpu_stood(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "loader", Local.loader)
    states = iter((NVIDIA_SMI, NVIDIA_SMI.replace("61 C", "83 C")))
    monkeypatch.setattr(cuda, "find_gpu", lambda: read_gpu(next(states), "0"))
    jobs = [Job(label="harness", runtime="onnx", path=None)]
    jobs.append(Job(label="float", runtime="onnx", path=artifact))
    found = cuda.DEVICE.measure(jobs, images(1), rounds=2, per_round=3, threads=1, progress=silent)
    assert [item.label for item in found] == ["harness", "float"]
    for item in found:
        assert len(item.wall_ms) == 6
        assert item.before is not None
        assert item.after is not None
        assert item.before.temperatures_c == {"gpu": 61}
        assert item.after.temperatures_c == {"gpu": 83}


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        ({"onnxruntime": "1.2", "onnxruntime-gpu": None}, "onnxruntime"),
        ({"onnxruntime": None, "onnxruntime-gpu": "1.2"}, "onnxruntime-gpu"),
        ({"onnxruntime": None, "onnxruntime-gpu": None}, "onnxruntime"),
    ],
)
def test_the_gpu_s_onnxruntime_counts_as_installed(
    installed: dict[str, str | None], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_onnx_file, "library_versions", lambda _: installed)
    assert _onnx_file.distribution() == named
