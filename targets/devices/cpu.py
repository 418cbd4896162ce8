"""This machine's CPU held to a lower instruction set, where a library can be told to.

In: artifacts and images. Out: raw times and logits, as of `local`. oneDNN, with which OpenVINO
computes its layers, takes no newer instructions than a variable names: so int8 without VNNI can be
seen on a CPU that has it, saturation included. What OpenVINO compiles itself is not held back.
onnxruntime and LiteRT choose their kernels by the CPU alone, and cannot be told.

Source: oneDNN, "CPU Dispatcher Control".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from targets.base import DeviceInfo, NotRun
from targets.devices.local import Local, isa_flags

if TYPE_CHECKING:
    from targets.base import Runtime

VARIABLE = "ONEDNN_MAX_CPU_ISA"
HELD = "openvino"


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """An instruction set: oneDNN's word, the flag that a CPU needs, the flags of newer ones."""

    word: str
    needs: str
    above: frozenset[str]


_AMX = frozenset({"amx_int8"})
_VNNI_512 = _AMX | {"avx512_vnni", "avx10_1"}
_AVX512 = _VNNI_512 | {"avx512f"}
LEVELS = {
    "avx2": Level(word="AVX2", needs="avx2", above=_AVX512 | {"avx_vnni"}),
    "avx2-vnni": Level(word="AVX2_VNNI", needs="avx_vnni", above=_AVX512),
    "avx512": Level(word="AVX512_CORE", needs="avx512f", above=_VNNI_512 | {"avx_vnni"}),
    "avx512-vnni": Level(word="AVX512_CORE_VNNI", needs="avx512_vnni", above=_AMX),
    "amx": Level(word="AVX512_CORE_AMX", needs="amx_int8", above=frozenset()),
}
"""From the lowest up; `isa_of` says of their flags whether int8 may saturate."""


class HeldBack(Local):
    """A device `cpu:LEVEL`."""

    def __init__(self, name: str, level: Level) -> None:
        self.name = name
        self.level = level
        self.environment = {VARIABLE: level.word}

    def probe(self) -> DeviceInfo | NotRun:
        """Describe this machine with the flags that are left."""
        info = super().probe()
        if isinstance(info, NotRun):
            return info
        if self.level.needs not in info.isa:
            return NotRun(reason=f"this CPU has no {self.level.needs}: {info.description}")
        left = tuple(flag for flag in info.isa if flag not in self.level.above)
        return replace(info, name=self.name, isa=left)

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Take openvino alone: the others choose their kernels by the CPU."""
        if wanted.name != HELD:
            return NotRun(reason=f"{wanted.name} cannot be held to a lower instruction set")
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
