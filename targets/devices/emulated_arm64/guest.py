"""How a Python of the sysroot is started under QEMU.

In: a sysroot, a profile, arguments. Out: a command line and its environment.
QEMU's user mode translates one program: no kernel, no chroot, no binfmt.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from pipeline.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from targets.devices.emulated_arm64.profiles import Profile

QEMU = "qemu-aarch64"
"""The dynamic one: Debian's static build takes no plugin."""
TOOLS = {QEMU: "qemu-user", "mmdebstrap": "mmdebstrap", "gcc": "gcc"}
"""What the host must have, and Debian's package of it."""
PYTHON = "usr/bin/python3.11"
ANSWER_S = 30
ROOT, VIEWS, WHEELS = "root", "views", "wheels"


def require_tools(names: Sequence[str]) -> None:
    """Check that the host has some of `TOOLS`.

    Raises:
        DeviceError: At least one is missing; the message has the command that installs them.
    """
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise DeviceError(
            f"emulated-arm64 needs {', '.join(missing)}, not on PATH",
            allowed="a Linux machine with " + ", ".join(TOOLS),
            do=f"Run: apt-get install -y {' '.join(TOOLS[name] for name in missing)}",
        )


@functools.cache
def version() -> str:
    """Return what QEMU calls itself; empty where it cannot be asked."""
    try:
        done = subprocess.run(
            [QEMU, "--version"], capture_output=True, text=True, check=False, timeout=ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter(done.stdout.splitlines()), "")


def command(
    sysroot: Path,
    profile: Profile,
    arguments: Sequence[str],
    *,
    plugin: Path | None = None,
    counts: Path | None = None,
) -> list[str]:
    """Return the command line that runs the guest's Python.

    Args:
        sysroot: As `sysroot.setup` builds it.
        profile: The CPU.
        arguments: Python's.
        plugin: The compiled counter, or None to count nothing.
        counts: Where it writes.
    """
    words = [QEMU, "-cpu", profile.cpu, "-L", str(sysroot / VIEWS / profile.name)]
    if plugin is not None:
        # QEMU reads two commas as one.
        words += ["-plugin", ",".join(p.replace(",", ",,") for p in (str(plugin), f"out={counts}"))]
    return [*words, str(sysroot / ROOT / PYTHON), *arguments]


def environment(sysroot: Path) -> dict[str, str]:
    """Return the environment, all of it: QEMU hands its own on to the guest."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONHOME": str(sysroot / ROOT / "usr"),
        "PYTHONPATH": str(sysroot / ROOT / WHEELS),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",  # else no two runs count alike
        "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime's sender is a thread, and would be counted
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
