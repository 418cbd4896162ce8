"""Android devices over adb: `adb:SERIAL`, or `adb:SERIAL,cores=f0,delegate=gpu,tool=…`.

In: serials, and Android's own client. Out: the family of devices `adb`. Where Python with numpy is
there, the on-device runner measures; elsewhere LiteRT's benchmark_model, which is pushed when it is
given and otherwise looked for on the device.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DeviceError, UsageError
from targets.base import NotRun
from targets.devices._adb_link import Link, attached, server_runs
from targets.devices._benchmark_model import DELEGATES, XNNPACK
from targets.devices._benchmarked import NAME, VARIABLE, Benchmarked
from targets.devices._remote import Remote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.worker import Progress
    from targets.base import Device, DeviceInfo, Image, Job, Logits, OpTime, Runtime, Samples
    from targets.devices._workspace import Patience

FAMILY = "adb"
FOLDER = "/data/local/tmp"
"""Where adb's login may write and execute."""
PYTHON = "CONVNEXT_EDGE_ADB_PYTHON"
"""Environment variable: Python's command on the device."""
RUNNER = "runner"
SERIAL = re.compile(r"[\w\[][\w.\[\]%:-]*")
CHOICES = {
    "cores": re.compile(r"(?=.*[1-9a-f])[0-9a-f]{1,16}"),
    "delegate": re.compile("|".join(DELEGATES)),
    "tool": re.compile(f"{RUNNER}|{NAME}"),
}
VERSION = "ro.build.version.release"
PROPERTIES = ("ro.product.manufacturer", "ro.product.model", "ro.soc.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """What stands behind `adb:`.

    Attributes:
        serial: As `adb devices` lists it.
        cores: Those that artifacts run on, as taskset's hexadecimal mask; None is all.
        delegate: Of TFLite; None is its default, XNNPACK.
        tool: What measures; None is the runner where it can run.
    """

    serial: str
    cores: str | None = None
    delegate: str | None = None
    tool: str | None = None

    @property
    def name(self) -> str:
        """The device's name, with its options in one order."""
        chosen = ((key, getattr(self, key)) for key in CHOICES)
        options = [f"{key}={value}" for key, value in chosen if value is not None]
        return f"{FAMILY}:{','.join([self.serial, *options])}"


class Phone:
    """One Android device.

    Args:
        address: Of it.
        folder: Where its login may write and execute.
        python: Python's command there.
        pushed: benchmark_model on this machine; None takes what lies in `folder`.
        patience: How long the device is waited for.
    """

    def __init__(
        self,
        address: Address,
        *,
        folder: str = FOLDER,
        python: str = "python3",
        pushed: Path | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.name = address.name
        self.address, self.python = address, python
        root, link = f"{folder}/convnext-edge", Link(self.name, address.serial)
        prefix = f"taskset {address.cores} " if address.cores else ""
        self.runner = Remote(link, root=root, python=f"{prefix}{python}", patience=patience)
        self.workspace = self.runner.workspace
        mask = int(address.cores or "1", 16)
        self.benchmark = Benchmarked(
            self.workspace,
            there=f"{folder}/{NAME}",
            pushed=pushed,
            prefix=prefix,
            cpu=(mask & -mask).bit_length() - 1,
            delegate=address.delegate or XNNPACK,
        )

    def probe(self) -> DeviceInfo | NotRun:
        """Ask the device what it is."""
        try:
            info, (phone, android) = self._chosen.probe(), self._android()
        except DeviceError as error:
            return NotRun(reason=str(error))
        if isinstance(info, NotRun):
            return info
        # With other cores or another delegate it is the same phone.
        return replace(
            info,
            description=f"{phone} Android {android}, {info.description}",
            hardware=phone,
            machine=f"{FAMILY}:{self.address.serial}",
        )

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Ask what measures there."""
        try:
            return self._chosen.can_run(wanted)
        except DeviceError as error:
            return NotRun(reason=str(error))

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
        """Time the jobs in turn on the device; see `targets.base.Device`."""
        return self._chosen.measure(
            jobs, image, rounds=rounds, per_round=per_round, threads=threads, progress=progress
        )

    def infer(
        self, job: Job, images: Image, *, batch: int, threads: int, progress: Progress
    ) -> Logits:
        """Run images through an artifact on the device; see `targets.base.Device`."""
        return self._chosen.infer(job, images, batch=batch, threads=threads, progress=progress)

    def op_times(self, job: Job, *, threads: int, inferences: int) -> list[OpTime] | NotRun:
        """Ask benchmark_model's profiler, whatever takes the times; see `targets.base.Profiled`."""
        info = self.benchmark.probe()
        if isinstance(info, NotRun):
            return info
        return self.benchmark.op_times(job, threads=threads, inferences=inferences)

    @cached_property
    def _chosen(self) -> Remote | Benchmarked:
        """What measures."""
        tool = self.address.tool
        if tool is None and self.address.delegate is None:
            look = f"{self.python} -c 'import numpy' >/dev/null 2>&1 && echo {RUNNER}; true"
            tool = self.workspace.do("look for Python", look).strip()
        return self.runner if tool == RUNNER else self.benchmark

    def _android(self) -> tuple[str, str]:
        """Return maker, model and processor, and the system's version."""
        asked = " ".join(f"$(getprop {name})" for name in PROPERTIES)
        said = self.workspace.do("ask what it is", f"echo $(getprop {VERSION}); echo {asked}")
        version, _, phone = said.partition("\n")
        return " ".join(phone.split()), version.strip()


class Phones:
    """The family `adb`."""

    name = FAMILY

    def found(self) -> tuple[str, ...]:
        """Return the serials that adb's server lists; none where it does not run."""
        if shutil.which("adb") is None or not server_runs():
            return ()
        try:
            return tuple(serial for serial in attached(FAMILY) if SERIAL.fullmatch(serial))
        except DeviceError:
            return ()

    def at(self, address: str) -> Device:
        """Return the device with this address; see `targets.base.DeviceFamily`."""
        pushed = os.environ.get(VARIABLE)
        if pushed and not Path(pushed).is_file():
            raise UsageError(
                f"{VARIABLE} names no file: {pushed}",
                allowed=f"LiteRT's {NAME} for Android",
                do="Correct it, or unset it where the tool lies on the device",
            )
        return Phone(
            parsed(address),
            folder=FOLDER,
            python=os.environ.get(PYTHON, "python3"),
            pushed=Path(pushed) if pushed else None,
        )


def parsed(address: str) -> Address:
    """Read an address; without a serial it is that of the one device that is attached.

    Raises:
        UsageError: It is none, or there are more devices than one, or none.
    """
    serial, *options = address.split(",")
    chosen = dict(option.partition("=")[::2] for option in options)
    wrong = [key for key, value in chosen.items() if not _allows(key, value)]
    if wrong or len(chosen) != len(options) or (serial and not SERIAL.fullmatch(serial)):
        raise UsageError(
            f"{FAMILY}:{address} names no device",
            allowed=f"{FAMILY}:SERIAL, and behind it ,cores=MASK (hexadecimal, as for taskset),"
            f" ,delegate={'|'.join(DELEGATES)} and ,tool={RUNNER}|{NAME}, each once",
            do="Correct --device",
        )
    if chosen.get("delegate") and chosen.get("tool") == RUNNER:
        raise UsageError(
            f"{FAMILY}:{address}: the runner takes no delegate",
            allowed=f"a delegate with tool={NAME}",
            do="Leave one of them out",
        )
    return Address(serial=serial or _the_one(), **chosen)


def _allows(key: str, value: str) -> bool:
    return key in CHOICES and CHOICES[key].fullmatch(value) is not None


def _the_one() -> str:
    serials = attached(FAMILY)
    if len(serials) != 1:
        raise UsageError(
            f"{FAMILY}: names no serial, and {len(serials) or 'no'} devices are attached",
            allowed=", ".join(f"{FAMILY}:{serial}" for serial in serials) or "an attached device",
            do="Give a serial as `adb devices` lists it",
        )
    return serials[0]


DEVICES = Phones()
