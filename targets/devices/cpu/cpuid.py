"""Which bits of CPUID say that a CPU has an instruction set, and how a process stops seeing them.

In: names of features, as Linux writes them in /proc/cpuinfo. Out: the environment of a process that
does not find them (cpuid.c).

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID, leaf 7.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DeviceError, got_of
from pipeline.store import CACHE_VARIABLE
from targets.devices._compiled import COMPILER, INSTALL, compiled

if TYPE_CHECKING:
    from collections.abc import Iterable

CPUINFO = Path("/proc/cpuinfo")
SOURCE = Path(__file__).with_name("cpuid.c")
PRELOAD, VARIABLE = "LD_PRELOAD", "CONVNEXT_EDGE_HIDDEN"
FAULTING = "cpuid_fault"
"""The flag of a CPU whose kernel lets a process be denied CPUID."""
SEPARATORS = frozenset(" :")
SHOW_LIBRARIES = "print(open('/proc/self/maps').read())"
EAX, EBX, ECX, EDX = range(4)

BITS: dict[str, tuple[int, int, int]] = {
    "avx512f": (0, EBX, 16),
    "avx512dq": (0, EBX, 17),
    "avx512ifma": (0, EBX, 21),
    "avx512cd": (0, EBX, 28),
    "avx512bw": (0, EBX, 30),
    "avx512vl": (0, EBX, 31),
    "avx512vbmi": (0, ECX, 1),
    "avx512_vbmi2": (0, ECX, 6),
    "avx512_vnni": (0, ECX, 11),
    "avx512_bitalg": (0, ECX, 12),
    "avx512_vpopcntdq": (0, ECX, 14),
    "avx512_vp2intersect": (0, EDX, 8),
    "amx_bf16": (0, EDX, 22),
    "avx512_fp16": (0, EDX, 23),
    "amx_tile": (0, EDX, 24),
    "amx_int8": (0, EDX, 25),
    "avx_vnni": (1, EAX, 4),
    "avx512_bf16": (1, EAX, 5),
    "amx_fp16": (1, EAX, 21),
    "avx_ifma": (1, EAX, 23),
    "avx_vnni_int8": (1, EDX, 4),
    "avx_ne_convert": (1, EDX, 5),
    "amx_complex": (1, EDX, 8),
    "avx_vnni_int16": (1, EDX, 10),
    "avx10_1": (1, EDX, 19),
}
"""Feature to subleaf of leaf 7, register and bit."""


@functools.cache
def why_not() -> str | None:
    """Return why nothing can be hidden from a process of this machine; None where it can."""
    return _lacks() or _refused()


def _lacks() -> str | None:
    """Return what this machine lacks for it."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return "only Linux on x86-64 hides instruction sets from a program"
    try:
        flags = CPUINFO.read_text().split()
    except OSError as error:
        return f"{CPUINFO} cannot be read ({error.strerror})"
    if FAULTING not in flags:
        return f"this CPU or its hypervisor hides no instruction sets (no {FAULTING})"
    if shutil.which(COMPILER) is None:
        return f"hiding newer ones from it takes {COMPILER}: {INSTALL}"
    return None


def _refused() -> str | None:
    """Return why a process that was to find nothing newer did not start so.

    What the dynamic loader cannot preload it leaves out, with no more than a warning.
    """
    try:
        environment = hiding(())
    except DeviceError as error:
        return got_of(str(error))
    words = [sys.executable, "-S", "-c", SHOW_LIBRARIES]
    given = {**os.environ, **environment}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=given)
    if done.returncode == 0 and f"/{SOURCE.stem}.so" in done.stdout:
        return None
    said = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
    return f"a process with {environment[PRELOAD]} preloaded does not start as it should: {said}"


def hiding(features: Iterable[str]) -> dict[str, str]:
    """Return the variables of a process that does not find some features.

    Args:
        features: Of `BITS`.

    Raises:
        DeviceError: cpuid.c cannot be compiled, or lies where nothing can be preloaded from.
    """
    words = [0] * 8
    for name in features:
        subleaf, register, bit = BITS[name]
        words[4 * subleaf + register] |= 1 << bit
    library = str(compiled(SOURCE, "cpu"))
    if set(library) & SEPARATORS:
        raise DeviceError(
            f"{library} cannot be preloaded: the dynamic loader takes its name apart",
            allowed="a cache folder without spaces and colons in its name",
            do=f"Set {CACHE_VARIABLE} to another folder",
        )
    others = (one for one in os.environ.get(PRELOAD, "").split() if one != library)
    return {
        PRELOAD: " ".join([library, *others]),
        VARIABLE: " ".join(f"{word:08x}" for word in words),
    }
