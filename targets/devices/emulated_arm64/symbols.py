"""Guest addresses to names: what a process had mapped, and its libraries' symbol tables.

In: the text of /proc/self/maps. Out: for an address its function's symbol; the library's file name
where the library keeps no symbol there; `[anonymous]` where nothing was mapped from a file.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANONYMOUS = "[anonymous]"
ELF64_LITTLE = b"\x7fELF\x02\x01"
PROGRAM_HEADERS, SECTION_HEADERS = struct.Struct("<32xQ14xHH"), struct.Struct("<40xQ10xHH")
"""Of the file's header: offset, size of one, how many."""
SEGMENT = np.dtype(
    [
        ("type", "<u4"),
        ("flags", "<u4"),
        *((name, "<u8") for name in ("offset", "address", "physical", "size", "memory", "align")),
    ]
)
SECTION = np.dtype(
    [
        ("name", "<u4"),
        ("type", "<u4"),
        ("flags", "<u8"),
        ("address", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("link", "<u4"),
        ("info", "<u4"),
        ("align", "<u8"),
        ("entry", "<u8"),
    ]
)
SYMBOL = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("section", "<u2"),
        ("address", "<u8"),
        ("size", "<u8"),
    ]
)
LOAD, FUNCTION = 1, 2
SYMTAB, DYNSYM = 2, 11


class Library:
    """An ELF file's functions, by where they lie in the file.

    Args:
        data: The file; anything that is no 64-bit ELF file has no functions.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._starts: NDArray[np.uint64] = np.empty(0, np.uint64)
        if not data.startswith(ELF64_LITTLE):
            return
        segments = _table(data, PROGRAM_HEADERS, SEGMENT)
        self._segments = segments[segments["type"] == LOAD]
        sections = _table(data, SECTION_HEADERS, SECTION)
        found = []
        for kind in (SYMTAB, DYNSYM):
            for section in sections[sections["type"] == kind]:
                count = int(section["size"]) // SYMBOL.itemsize
                symbols = np.frombuffer(data, SYMBOL, count, int(section["offset"]))
                names = symbols["name"] + sections[section["link"]]["offset"]
                keep = ((symbols["info"] & 0xF) == FUNCTION) & (symbols["section"] != 0)
                found.append(np.stack([symbols["address"], symbols["size"], names], axis=1)[keep])
        rows = np.concatenate(found) if found else np.empty((0, 3), np.uint64)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        self._starts, self._sizes, self._names = rows.T

    def function_at(self, offset: int) -> str | None:
        """Return the symbol of the function at an offset of the file, or None."""
        if not len(self._starts):
            return None
        for segment in self._segments:
            within = offset - int(segment["offset"])
            if 0 <= within < int(segment["size"]):
                return self._function(int(segment["address"]) + within)
        return None

    def _function(self, address: int) -> str | None:
        index = int(np.searchsorted(self._starts, np.uint64(address), side="right")) - 1
        # Functions written in assembly may state no size.
        size = int(self._sizes[index]) if index >= 0 else -1
        if index < 0 or (size and address >= int(self._starts[index]) + size):
            return None
        start = int(self._names[index])
        return self._data[start : self._data.index(b"\0", start)].decode(errors="replace")


def _table(data: bytes, header: struct.Struct, row: np.dtype[np.void]) -> NDArray[np.void]:
    offset, _, count = header.unpack_from(data)
    return np.frombuffer(data, row, count, offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """A range of addresses that shows a part of a file."""

    start: int
    end: int
    offset: int
    path: str


def parse_maps(text: str) -> list[Mapping]:
    """Read /proc/self/maps; what is mapped from no file is left out."""
    found = []
    for line in text.splitlines():
        match line.split(maxsplit=5):
            case [addresses, _, offset, _, _, path] if path.startswith("/"):
                start, end = (int(part, 16) for part in addresses.split("-"))
                found.append(Mapping(start=start, end=end, offset=int(offset, 16), path=path))
    return sorted(found, key=lambda mapping: mapping.start)


@dataclass(slots=True)
class Symbols:
    """The names of a process's addresses.

    Attributes:
        mappings: What it had mapped, in order.
    """

    mappings: list[Mapping]
    _libraries: dict[str, Library] = field(default_factory=dict)

    def name(self, address: int) -> str:
        """Return the symbol, or else the library's file name, or else `[anonymous]`."""
        index = bisect_right(self.mappings, address, key=lambda mapping: mapping.start) - 1
        if index < 0 or address >= self.mappings[index].end:
            return ANONYMOUS
        mapping = self.mappings[index]
        path = Path(mapping.path)
        if mapping.path not in self._libraries:
            self._libraries[mapping.path] = Library(path.read_bytes() if path.is_file() else b"")
        offset = address - mapping.start + mapping.offset
        return self._libraries[mapping.path].function_at(offset) or path.name
