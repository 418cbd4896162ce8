"""What a runtime and a device provide, and how they are found.

In: modules in targets/runtimes/ and targets/devices/. Out: a registry by word. One file is one
format or one place to run; a name that begins with _ is not discovered. Nothing here imports a
framework: a runtime imports its own inside its methods.
"""

from __future__ import annotations

import importlib
import pkgutil
import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from pipeline.errors import EdgeError, MissingRuntimeError, UsageError
from pipeline.placements import PLACEMENTS
from pipeline.records import FLOATING, DeviceState, Kind
from pipeline.store import library_versions
from pipeline.worker import ending

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.records import Export, Isa, Layer, OpKind, Proof, Scheme
    from pipeline.worker import Progress
    from targets.graph import Graph

    Logits = NDArray[np.float32]
    Image = NDArray[np.float32]

INPUT_NAME, OUTPUT_NAME, METADATA_KEY = "image", "logits", "convnext_edge"
NO_FOUR_BITS = "it has no kernel for 4-bit activations; the reference computes what they would give"
"""Why no runtime but the reference expresses w4a4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a runtime can express, as data.

    Attributes:
        suffix: Ending of its artifacts.
        layout: Layout of the artifact's image input: `NCHW` or `NHWC`.
        extra: The extra of convnext-edge that installs it.
        distributions: What must be installed to export to it and to run it.
        schemes: Schemes it can express.
        placements: Placements it can express; the first is the default.
        graph_forms: Forms it can emit; the first is the default.
        placements_of_form: Those of a form that cannot express all of `placements`.
        gelu: The form of GELU it emits: tanh or erf.
        float_layers: Layers that compute in floats whatever the placement, with the reason. Where
            the site that they read is quantized, it is with the placement's integers, dequantized:
            the function is that of every other runtime.
        unsupported_schemes: Schemes it cannot express, with the reason.
        default_isa: The ISA an artifact is made for when none is asked; None is this host's.
        half_flags: Those of CPUs on which it computes its float16 artifacts in float16.
        accelerated: Whether something else than the CPU may execute its artifacts.
        native_on: The one system that executes its artifacts; elsewhere the runtime interprets
            them. None where every system executes them.
    """

    suffix: str
    layout: str
    extra: str
    distributions: tuple[str, ...]
    schemes: tuple[Scheme, ...] = ("float", "w8a8", "w4a8")
    placements: tuple[str, ...] = tuple(PLACEMENTS)
    graph_forms: tuple[str, ...]
    placements_of_form: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gelu: Literal["tanh", "erf"]
    float_layers: Mapping[Layer, str] = field(default_factory=dict)
    unsupported_schemes: Mapping[Scheme, str] = field(default_factory=dict)
    half_flags: frozenset[str] = frozenset()
    default_isa: Isa | None = None
    accelerated: bool = False
    native_on: str | None = None

    def placements_in(self, form: str) -> tuple[str, ...]:
        """Return the placements that a graph form can express."""
        return self.placements_of_form.get(form, self.placements)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRun:
    """Something that cannot happen on this machine, and why."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTime:
    """One operation that a runtime executes.

    Attributes:
        kind: What it computes.
        op: Its type there.
        name: Its name there.
        ms: Milliseconds.
        is_fallback: Whether the runtime has no fast kernel for it.
    """

    kind: OpKind
    op: str
    name: str
    ms: float
    is_fallback: bool = False


class Session(Protocol):
    """A loaded artifact, ready to run."""

    def __call__(self, image: Image) -> Logits:
        """Run one batch: float32 pixels in [0, 255], NCHW, to float32 logits (N, classes)."""


class Runtime(Protocol):
    """One format. A module in targets/runtimes/ provides an instance named `RUNTIME`."""

    name: str
    capabilities: Capabilities

    def export(self, graph: Graph, path: Path, metadata: str) -> None:
        """Write the artifact: input `image`, output `logits`, the JSON metadata inside."""

    def prove(self, path: Path, graph: Graph) -> Proof:
        """Count, on the finished artifact, what the runtime really executes."""

    def read_metadata(self, path: Path) -> str:
        """Return the JSON metadata that `export` put in; empty where there is none."""

    def can_run(self) -> NotRun | None:
        """Return why an artifact cannot run on this machine, or None where it can.

        It may run by interpretation, which tells its logits but not its time: `kind_here`.
        """

    def load(self, path: Path, threads: int) -> Session:
        """Load an artifact with this many threads."""

    def op_times(
        self, path: Path, image: Image, *, threads: int, inferences: int
    ) -> list[OpTime] | NotRun:
        """Ask the runtime's own profiler what each operation takes: medians, in order."""


ARTIFACT_STEM = "model"
"""What the names of an artifact's files are before their ending."""
HOST = "host"
"""The machine that this project runs on, as `DeviceInfo.machine`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What a device is.

    Attributes:
        name: As `--device` takes it.
        kind: What its measurements are.
        isa: Its flags, as far as kernels are chosen by them.
        description: For a person.
        hardware: What of it no upgrade changes; empty where that is all.
        cores: That runtimes may use.
        machine: What it is timed on: devices of one machine are measured in turn. Empty where it
            is a machine of its own.
        versions: Of what runs there, as far as it is not this environment's: they belong to the
            key of what was measured.
        accelerated: Whether something else than its CPU computes.
    """

    name: str
    kind: Kind
    isa: tuple[str, ...]
    description: str
    cores: int
    hardware: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    accelerated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One artifact to time. `path` is None for the null job: the harness alone."""

    label: str
    runtime: str
    path: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What one job gave, inference by inference, in the order in which they ran.

    Attributes:
        label: The job's.
        wall_ms: Milliseconds per inference; empty where the device's clock says nothing.
        cpu_ms: The same of CPU time, of all threads.
        load_ms: Import of the runtime and loading of the artifact.
        first_ms: First inference.
        peak_memory_bytes: Of the job's process.
        versions: Of the runtime's distributions, on the device.
        instructions: Guest instructions per inference; empty where none were counted.
        instruction_kinds: Of those, per inference: `dot_product` and `i8mm`.
        symbols: Of those, per inference, by kernel symbol, or by library where it keeps none.
        energy_mj: Per inference, of the whole CPU package, idle included; None where no counter
            tells.
        operations_on: Where a runtime spreads an artifact over units, how many of its operations
            each of them gets: `CPU`, `GPU`, `Neural Engine`.
        before: How the device stood before the first sample of the run.
        after: How it stood after the last one.
        error: Why the job gave nothing, in a line; None where it did.
    """

    label: str
    wall_ms: tuple[float, ...] = ()
    cpu_ms: tuple[float, ...] = ()
    load_ms: float | None = None
    first_ms: float | None = None
    peak_memory_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    instructions: tuple[int, ...] = ()
    instruction_kinds: dict[str, int] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    energy_mj: float | None = None
    operations_on: dict[str, int] = field(default_factory=dict)
    before: DeviceState | None = None
    after: DeviceState | None = None
    error: str | None = None


class Device(Protocol):
    """One place to run.

    A module in targets/devices/ provides an instance named `DEVICE`, or a `DeviceFamily` named
    `DEVICES` where there can be many: a device of a family is called `FAMILY:ADDRESS`.
    """

    name: str

    def probe(self) -> DeviceInfo | NotRun:
        """Say what this device is, or why it cannot be used now."""

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Return why a runtime's artifacts cannot run on this device, or None where they can."""

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
        """Time the jobs, alternating: `rounds` times each in turn, `per_round` inferences.

        A device that counts instead of timing takes as many inferences as its counts need. A job
        that fails there has an `error`, and the others go on: `settled` says when none is left.

        Raises:
            DeviceError: The device cannot be reached, or does not do what it is asked.
        """

    def infer(
        self, job: Job, images: Image, *, batch: int, threads: int, progress: Progress
    ) -> Logits:
        """Run images (N, C, H, W) through one artifact on this device: logits (N, classes).

        Args:
            job: The artifact; its path is not None.
            images: float32 pixels in [0, 255], as a `Session` takes them.
            batch: What the artifact takes; the last images are repeated to fill up.
            threads: For the runtime.
            progress: Called with how many images are done.

        Raises:
            DeviceError: As `measure`.
        """


class DeviceFamily(Protocol):
    """Many places to run that are reached in the same way."""

    name: str

    def found(self) -> tuple[str, ...]:
        """Return the addresses of the devices that can be named without asking anybody."""

    def at(self, address: str) -> Device:
        """Return the device with this address.

        Raises:
            UsageError: It is no address of this family.
        """


@runtime_checkable
class Profiled(Device, Protocol):
    """A device that can say what each operation of an artifact takes there."""

    def op_times(self, job: Job, *, threads: int, inferences: int) -> list[OpTime] | NotRun:
        """Ask a profiler there what each operation takes: averages, in order.

        Args:
            job: The artifact; its path is not None.
            threads: For the runtime.
            inferences: To average over.

        Raises:
            DeviceError: As `Device.measure`.
        """


@runtime_checkable
class InProcesses(Device, Protocol):
    """A device that runs artifacts in processes of this machine.

    Where its kind is `host` they run on its CPU, and the runtimes' own profilers, asked in such a
    process, say what it takes.
    """

    def environment(self) -> Mapping[str, str]:
        """Return the variables that such a process has beside this one's.

        Raises:
            DeviceError: Something they name cannot be made.
        """


@runtime_checkable
class NeedsSetup(Protocol):
    """A family of devices that needs something built on this machine first."""

    def setup(self, progress: Progress) -> str:
        """Build what is missing; return a line on what stands there now.

        Raises:
            DeviceError: Something it needs is missing; the message says how to install it.
        """


def settled(jobs: Sequence[Job], gave: Mapping[str, Samples | EdgeError]) -> list[Samples]:
    """Return the samples of every job, in order; of one that failed, its error.

    Args:
        jobs: What was measured.
        gave: Label to what the job gave.

    Raises:
        EdgeError: The null job failed, or every other one did: the first error. So where all work
            is to end: that is nobody's failure.
    """
    failed = {label: one for label, one in gave.items() if isinstance(one, EdgeError)}
    artifacts = {job.label for job in jobs if job.path is not None}
    if failed and (failed.keys() - artifacts or failed.keys() >= artifacts or ending.is_set()):
        raise next(iter(failed.values()))
    found = [(job.label, gave[job.label]) for job in jobs]
    return [
        one if isinstance(one, Samples) else Samples(label=label, error=str(one))
        for label, one in found
    ]


def runtimes() -> dict[str, Runtime]:
    """Return every runtime by its word, discovered from targets/runtimes/."""
    return {item.name: item for item in _discover("targets.runtimes", "RUNTIME")}


def devices() -> dict[str, Device]:
    """Return every device by its name, discovered from targets/devices/; families' where found."""
    known = _single_devices()
    for family in device_families().values():
        for address in family.found():
            item = family.at(address)
            known[item.name] = item
    return known


def _single_devices() -> dict[str, Device]:
    return {item.name: item for item in _discover("targets.devices", "DEVICE")}


def device_families() -> dict[str, DeviceFamily]:
    """Return every family of devices by its name, discovered from targets/devices/."""
    return {item.name: item for item in _discover("targets.devices", "DEVICES")}


def runtime(name: str) -> Runtime:
    """Return one runtime.

    Raises:
        UsageError: No runtime has this name.
    """
    known = runtimes()
    if name not in known:
        raise UsageError(
            f"unknown runtime: {name}",
            allowed=", ".join(sorted(known)),
            do="Correct --runtimes",
        )
    return known[name]


def kind_here(known: Runtime) -> Kind:
    """Return how a runtime's artifacts run on this machine: `host`, or `interpreted`."""
    system = platform.system()
    here = "macOS" if system == "Darwin" else system
    return "host" if known.capabilities.native_on in {None, here} else "interpreted"


def device(name: str) -> Device:
    """Return one device, by its name or by `FAMILY:ADDRESS`.

    Raises:
        UsageError: No device has this name.
    """
    first, colon, address = name.partition(":")
    families = device_families()
    if colon and first in families:
        return families[first].at(address)
    known = _single_devices()
    if name not in known:
        raise UsageError(
            f"unknown device: {name or 'no name'}",
            allowed=", ".join([*sorted(devices()), *(f"{family}:ADDRESS" for family in families)]),
            do="Correct --device; `convnext-edge devices` lists what is found",
        )
    return known[name]


def require_installed(wanted: Runtime) -> None:
    """Check that a runtime's packages are installed.

    Raises:
        MissingRuntimeError: At least one is not; the message names the extra.
    """
    versions = library_versions(wanted.capabilities.distributions)
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        raise MissingRuntimeError(
            f"runtime {wanted.name} is not installed: {', '.join(missing)} missing",
            allowed=f"an environment with the extra [{wanted.capabilities.extra}]",
            do=f"Run: pip install 'convnext-edge[{wanted.capabilities.extra}]'",
        )


def placement_of(known: Runtime, asked: str | None) -> str:
    """Return the placement that a runtime takes.

    Args:
        known: The runtime.
        asked: A placement, or None for the runtime's default.

    Returns:
        What was asked; where the runtime's kernels write integers and so cannot express
        `pointwise`, the placement with the same layers that it can.
    """
    can = known.capabilities.placements
    if asked is None:
        return can[0]
    if asked in PLACEMENTS and asked not in can:
        layers = PLACEMENTS[asked].layers
        return next((name for name in can if PLACEMENTS[name].layers == layers), asked)
    return asked


def check_expressible(wanted: Export, known: Runtime) -> None:
    """Check that a runtime can express an export.

    Raises:
        UsageError: It cannot; the message lists what it can, and says why where that is known.
    """
    can = known.capabilities
    quantized, placements = wanted.scheme not in FLOATING, can.placements_in(wanted.graph_form)
    for word, value, allowed in (
        ("scheme", wanted.scheme, can.schemes),
        ("graph form", wanted.graph_form, can.graph_forms),
        *((("placement", wanted.placement, placements),) if quantized else ()),
    ):
        if value not in allowed:
            why = can.unsupported_schemes.get(wanted.scheme) if word == "scheme" else None
            raise UsageError(
                f"runtime {known.name} does not express {word} {value}"
                + (f": {why}" if why else ""),
                allowed=", ".join(allowed),
                do=f"Choose another {word} or another runtime",
            )


def run_padded(session: Session, images: Image, batch: int) -> Logits:
    """Run up to `batch` images through an artifact of that fixed batch.

    Args:
        session: A loaded artifact.
        images: float32 (N, C, H, W), 1 <= N <= batch; the last one is repeated to fill up.
        batch: What the artifact takes.

    Returns:
        Logits of the N images, float32 (N, classes): a copy, for a runtime may hand out the same
        buffer every time.
    """
    import numpy as np

    missing = batch - len(images)
    filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
    return np.array(session(filled)[: len(images)], np.float32)


def of_suffix(path: Path) -> Runtime:
    """Return the runtime that loads this artifact, by its ending.

    Raises:
        UsageError: No runtime has artifacts with this ending.
    """
    known = runtimes().values()
    for item in known:
        if path.name.endswith(item.capabilities.suffix):
            return item
    raise UsageError(
        f"{path} is not an artifact of any runtime here",
        allowed="a file ending in " + ", ".join(sorted(i.capabilities.suffix for i in known)),
        do="Give the path of an artifact in RUN_DIR/artifacts",
    )


def _discover(package: str, attribute: str) -> Iterable[ModuleType]:
    parent = importlib.import_module(package)
    for info in sorted(pkgutil.iter_modules(parent.__path__), key=lambda i: i.name):
        if not info.name.startswith("_"):
            # A folder keeps its instance in runtime.py or device.py: every __init__ stays empty.
            inner = f".{attribute.lower().removesuffix('s')}" if info.ispkg else ""
            module = importlib.import_module(f"{package}.{info.name}{inner}")
            if hasattr(module, attribute):
                yield getattr(module, attribute)
