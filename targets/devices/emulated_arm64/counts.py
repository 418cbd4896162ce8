"""What the counting plugin wrote, per inference.

In: its file (plugin.c says how it is made up) and names for addresses. Out: instructions of each
region, and of a mean one how many are int8 dot products or int8 matrix products, and by symbol.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

KINDS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "dot_product": (
        (0x9FE0FC00, 0x0E809400),  # SDOT, UDOT: vectors
        (0x9FC0F400, 0x0F80E000),  # SDOT, UDOT: by element
    ),
    "i8mm": (
        (0xDFE0FC00, 0x4E80A400),  # SMMLA, UMMLA
        (0xFFE0FC00, 0x4E80AC00),  # USMMLA
        (0xBFE0FC00, 0x0E809C00),  # USDOT: vectors
        (0xBF40F400, 0x0F00F000),  # USDOT, SUDOT: by element
    ),
}
"""Which of Arm's instruction words are of a kind: under the mask, the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Instructions of one job.

    Attributes:
        instructions: Of each region, in order.
        kinds: Of a mean region: how many are of each of `KINDS`.
        symbols: Of a mean region: how many lie in each function, most first.
    """

    instructions: tuple[int, ...]
    kinds: dict[str, int]
    symbols: dict[str, int]


def read_counts(text: str, name: Callable[[int], str]) -> Counts:
    """Read the plugin's file.

    Args:
        text: The file's.
        name: An address to its symbol.

    Raises:
        DeviceError: It has no region, or ends before its end.
    """
    regions: list[Counter[int]] = []
    addresses: dict[int, int] = {}
    code: dict[int, NDArray[np.uint32]] = {}
    for line in text.splitlines():
        match line.split():
            case ["region"]:
                regions.append(Counter())
            case ["ran", index, times]:
                regions[-1][int(index)] += int(times)
            case ["block", index, address, hexadecimal]:
                addresses[int(index)] = int(address, 16)
                code[int(index)] = words_of(hexadecimal)
    total = sum(regions, Counter[int]())
    if not total or total.keys() - addresses.keys():
        raise DeviceError(
            "the emulator left no whole count of instructions",
            allowed="at least one inference between two marks, and a program that ends",
            do="Run again; if it stays so, report it with the artifact",
        )
    kinds, symbols = Counter[str](), Counter[str]()
    for block, executions in total.items():
        symbols[name(addresses[block])] += executions * len(code[block])
        for kind, count in kinds_of(code[block]).items():
            kinds[kind] += executions * count
    return Counts(
        instructions=tuple(
            sum(n * len(code[block]) for block, n in ran.items()) for ran in regions
        ),
        kinds={kind: round(kinds[kind] / len(regions)) for kind in KINDS},
        symbols={key: round(count / len(regions)) for key, count in symbols.most_common()},
    )


def words_of(text: str) -> NDArray[np.uint32]:
    """Return instruction words from their hex digits."""
    return np.frombuffer(bytes.fromhex(text), ">u4").astype(np.uint32)


def kinds_of(words: NDArray[np.uint32]) -> dict[str, int]:
    """Count the instructions of each of `KINDS` among some words."""
    return {
        kind: sum(int(np.count_nonzero((words & mask) == value)) for mask, value in patterns)
        for kind, patterns in KINDS.items()
    }
