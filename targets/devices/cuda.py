"""This machine's NVIDIA GPU, by onnxruntime's CUDA provider.

In: ONNX artifacts and images. Out: raw times and logits, taken as those of `local` are. A time goes
from pixels in this machine's memory to logits there: it contains both copies. A session that
onnxruntime would run on the CPU after all is an error. What the GPU is, and how it stands, is what
`nvidia-smi` says.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from pipeline.errors import DeviceError
from pipeline.records import DeviceState
from targets.base import HOST, DeviceInfo, NotRun
from targets.devices.local import Local, available_cores
from targets.runtimes._onnx_file import as_session, elsewhere, load, session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.worker import Progress
    from targets.base import Image, Job, Runtime, Samples, Session

PROVIDER = "CUDAExecutionProvider"
# By default it multiplies float32 in TF32: a float artifact's logits would be another function's.
FLOAT32 = {"use_tf32": "0"}
ON_THE_CPU = frozenset({"DequantizeLinear"})
"""Types that may stay there: onnxruntime has no CUDA kernel for int32, which biases are stored in.
Where it computes on the GPU they are constants."""
PATIENCE_S = 30
NO_GPU = "no CUDA GPU here: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, and how it stands."""

    name: str
    driver: str
    cuda: str
    state: DeviceState

    @property
    def description(self) -> str:
        """Its name with the driver's version, and the newest CUDA that this driver runs."""
        return f"{self.name}, driver {self.driver}, CUDA {self.cuda}"


class Cuda(Local):
    """The device `cuda`."""

    name = "cuda"
    loader = f"{__name__}:load_on_gpu"

    def probe(self) -> DeviceInfo | NotRun:
        """Describe the first GPU that CUDA may use."""
        gpu = find_gpu()
        if isinstance(gpu, NotRun):
            return gpu
        return DeviceInfo(
            name=self.name,
            kind="device",
            isa=(),
            description=gpu.description,
            hardware=gpu.name,
            cores=available_cores(),
            machine=HOST,
            accelerated=True,
        )

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Take onnx alone, where its CUDA provider is installed."""
        if wanted.name != "onnx":
            return NotRun(reason=f"{wanted.name} has no way to an NVIDIA GPU here; onnx has one")
        cannot = wanted.can_run()
        if cannot is not None:
            return cannot
        import onnxruntime

        available = onnxruntime.get_available_providers()
        if PROVIDER in available:
            return None
        return NotRun(
            reason=f"onnxruntime {onnxruntime.__version__} here has no {PROVIDER}, but "
            f"{', '.join(available)}: install onnxruntime-gpu in its place"
        )

    def measure(
        self,
        jobs: Sequence[Job],
        image: Image,
        *,
        rounds: int,
        per_round: int,
        threads: int,
        progress: Progress,
    ) -> list[Samples]:
        """Time the jobs as `local` does, and say how the GPU stood before and after.

        The energy of the CPU's packages is left out: it is not what an inference takes.
        """
        before = _state()
        samples = super().measure(
            jobs, image, rounds=rounds, per_round=per_round, threads=threads, progress=progress
        )
        after = _state()
        return [replace(item, before=before, after=after, energy_mj=None) for item in samples]


def load_on_gpu(name: str, path: Path, threads: int) -> Session:
    """Load an artifact for the GPU; see `targets.devices.local.load_artifact`.

    Raises:
        DeviceError: Onnxruntime does not compute it there.
    """
    assert name == "onnx", "can_run takes no other"
    load(path)  # refuses a damaged file and external data outside its folder
    count_as_nvidia_smi()
    try:
        running = session(path, threads=threads, provider=(PROVIDER, FLOAT32))
    except RuntimeError as error:
        raise DeviceError(
            f"onnxruntime makes no session on {PROVIDER}: {error}",
            allowed="a session on the GPU",
            do="Install the CUDA and cuDNN that this onnxruntime-gpu is built for",
        ) from error
    check_on_gpu(running)
    return as_session(running)


def check_on_gpu(running: object) -> None:
    """Check that onnxruntime computes where it was asked to.

    Args:
        running: Its session.

    Raises:
        DeviceError: It fell back to the CPU, with all of it or with some operations.
    """
    providers: list[str] = running.get_providers()  # type: ignore[attr-defined]
    if providers[0] != PROVIDER:
        raise DeviceError(
            f"onnxruntime fell back to {', '.join(providers)}",
            allowed=f"a session on {PROVIDER}",
            do="Install onnxruntime-gpu, and the CUDA and cuDNN that it is built for",
        )
    strays = {k: n for k, n in elsewhere(running, PROVIDER).items() if k not in ON_THE_CPU}
    if strays:
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(strays.items()))
        raise DeviceError(
            f"onnxruntime computes on the CPU: {listed}",
            allowed="all of an artifact on the GPU",
            do="Measure the float artifact, or a scheme whose operations CUDA has",
        )


def count_as_nvidia_smi() -> None:
    """Let CUDA number the GPUs as `nvidia-smi` lists them; before this process first uses it."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"


def find_gpu() -> Gpu | NotRun:
    """Ask `nvidia-smi` for the first GPU that CUDA may use."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-q", "-x"],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    except FileNotFoundError:
        return NotRun(reason=f"{NO_GPU}nvidia-smi is not installed")
    except (OSError, subprocess.TimeoutExpired) as error:
        return NotRun(reason=f"{NO_GPU}nvidia-smi does not answer ({type(error).__name__})")
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        return NotRun(reason=f"{NO_GPU}nvidia-smi says {said[0]}")
    return read_gpu(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_gpu(answer: str, visible: str | None) -> Gpu | NotRun:
    """Read the first GPU that CUDA may use from `nvidia-smi -q -x`.

    Args:
        answer: The XML.
        visible: The value of CUDA_VISIBLE_DEVICES; None where it is not set.
    """
    try:
        root = ET.fromstring(answer)  # noqa: S314 - the driver's own program wrote it
    except ET.ParseError:
        return NotRun(reason=f"{NO_GPU}nvidia-smi answers something else than its XML")
    gpus = root.findall("gpu")
    if not gpus:
        return NotRun(reason=f"{NO_GPU}nvidia-smi lists none")
    first = "0" if visible is None else visible.split(",")[0].strip()
    uuids = [gpu.findtext("uuid", "") for gpu in gpus]
    chosen = next(
        (
            gpu
            for index, (gpu, uuid) in enumerate(zip(gpus, uuids, strict=True))
            if first == str(index) or (first.startswith("GPU-") and uuid.startswith(first))
        ),
        None,
    )
    if chosen is None:
        return NotRun(reason=f"{NO_GPU}CUDA_VISIBLE_DEVICES={visible} names none of {len(gpus)}")
    return Gpu(
        name=chosen.findtext("product_name", "a GPU without a name"),
        driver=root.findtext("driver_version", "unknown"),
        cuda=root.findtext("cuda_version", "unknown"),
        state=_read_state(chosen),
    )


def _read_state(gpu: ET.Element) -> DeviceState:
    """Return how a GPU stands; older drivers call the reasons `throttle`, newer ones `event`."""
    degrees, clock = (_number(gpu.findtext(k)) for k in ("temperature/gpu_temp", "clocks/sm_clock"))
    reasons = [
        reason.tag.partition("_reason_")[2]
        for word in ("clocks_event_reasons", "clocks_throttle_reasons")
        for reason in gpu.iterfind(f"{word}/*")
        if reason.text == "Active"
    ]
    return DeviceState(
        frequency_mhz=clock,
        temperatures_c={} if degrees is None else {"gpu": degrees},
        throttled=", ".join(reasons) or None,
    )


def _number(text: str | None) -> float | None:
    """Return the number before a unit; None for what `nvidia-smi` calls N/A."""
    first = (text or "").partition(" ")[0]
    return float(first) if first.isdecimal() else None


def _state() -> DeviceState | None:
    gpu = find_gpu()
    return None if isinstance(gpu, NotRun) else gpu.state


DEVICE = Cuda()
