"""This machine's CPU held to a lower instruction set.

In: artifacts and images. Out: raw times and logits, as of `local`. A library chooses its kernels by
what CPUID says; where the kernel lets it be answered by the process (`cpuid`), newer instructions
are not found there: so int8 without VNNI can be seen on a CPU that has it, saturation included, in
every runtime. Elsewhere oneDNN, with which OpenVINO computes its layers, is told by a variable, and
the others are not run. Caches and clocks stay this CPU's.

Source: oneDNN, "CPU Dispatcher Control".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.store import sha256_file
from targets.base import DeviceInfo, NotRun
from targets.devices.cpu import cpuid
from targets.devices.local import Local, isa_flags

if TYPE_CHECKING:
    from collections.abc import Mapping

    from targets.base import Runtime

ONEDNN = "ONEDNN_MAX_CPU_ISA"
TOLD = "openvino"


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """An instruction set.

    Attributes:
        word: oneDNN's.
        needs: The flag that a CPU must have.
        hides: The flags of newer ones, of `cpuid.BITS`.
    """

    word: str
    needs: str
    hides: frozenset[str]


_NEWEST = frozenset({"avx_ifma", "avx_vnni_int8", "avx_vnni_int16", "avx_ne_convert", "avx10_1"})
_AMX = frozenset({"amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "amx_complex"})
_AVX512 = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})
_LATER_AVX512 = frozenset(name for name in cpuid.BITS if name.startswith("avx512")) - _AVX512
_VNNI, _VNNI_512 = frozenset({"avx_vnni"}), frozenset({"avx512_vnni"})
LEVELS = {
    "avx2": Level(
        word="AVX2", needs="avx2", hides=_NEWEST | _AMX | _AVX512 | _LATER_AVX512 | _VNNI
    ),
    "avx2-vnni": Level(
        word="AVX2_VNNI", needs="avx_vnni", hides=_NEWEST | _AMX | _AVX512 | _LATER_AVX512
    ),
    "avx512": Level(
        word="AVX512_CORE", needs="avx512f", hides=_NEWEST | _AMX | _LATER_AVX512 | _VNNI
    ),
    "avx512-vnni": Level(
        word="AVX512_CORE_VNNI",
        needs="avx512_vnni",
        hides=_NEWEST | _AMX | (_LATER_AVX512 - _VNNI_512) | _VNNI,
    ),
    "amx": Level(
        word="AVX512_CORE_AMX", needs="amx_int8", hides=_NEWEST | {"amx_fp16", "amx_complex"}
    ),
}
"""From the lowest up; `isa_of` says of the flags that are left whether int8 may saturate."""


class HeldBack(Local):
    """A device `cpu:LEVEL`."""

    def __init__(self, name: str, level: Level) -> None:
        self.name = name
        self.level = level

    def environment(self) -> Mapping[str, str]:
        """Return what hides newer instructions from a process, as far as that can be done."""
        told = {ONEDNN: self.level.word}
        return told if cpuid.why_not() else told | cpuid.hiding(self.level.hides)

    def probe(self) -> DeviceInfo | NotRun:
        """Describe this machine with the flags that are left."""
        info = super().probe()
        if isinstance(info, NotRun):
            return info
        if self.level.needs not in info.isa:
            return NotRun(reason=f"this CPU has no {self.level.needs}: {info.description}")
        left = tuple(flag for flag in info.isa if flag not in self.level.hides)
        held = {"held by": ONEDNN}
        if cpuid.why_not() is None:
            held = {"held by": "CPUID", cpuid.SOURCE.name: sha256_file(cpuid.SOURCE)}
        return replace(info, name=self.name, isa=left, versions=held)

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Take what can be held back: every runtime, or openvino alone."""
        why = cpuid.why_not()
        if why is not None and wanted.name != TOLD:
            return NotRun(reason=f"{wanted.name} chooses its kernels by CPUID, and {why}")
        return super().can_run(wanted)


class Levels:
    """The family `cpu`."""

    name = "cpu"

    def found(self) -> tuple[str, ...]:
        """Return the levels that this CPU has."""
        flags = isa_flags()
        return tuple(name for name, level in LEVELS.items() if level.needs in flags)

    def at(self, address: str) -> HeldBack:
        """Return this CPU at a level; see `targets.base.DeviceFamily`."""
        if address not in LEVELS:
            raise UsageError(
                f"unknown instruction set: {address}",
                allowed=", ".join(f"{self.name}:{name}" for name in LEVELS),
                do="Correct --device",
            )
        return HeldBack(f"{self.name}:{address}", LEVELS[address])


DEVICES = Levels()
