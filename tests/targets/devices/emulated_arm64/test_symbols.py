"""Addresses get the names that a library keeps, from a small ELF file made here."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from targets.devices.emulated_arm64.symbols import ANONYMOUS, Library, Symbols, parse_maps

NAMES = b"\0first\0second\0data\0outside\0"
FUNCTION, OBJECT = 2, 1


def elf(*, table: int) -> bytes:
    """Return an ELF file whose code, 256 bytes at offset 0x400, is loaded at 0x10400."""

    def symbol(name: bytes, kind: int, section: int, address: int, size: int) -> bytes:
        return struct.pack("<IBBHQQ", NAMES.index(name), kind, 0, section, address, size)

    symbols = b"".join(
        [
            bytes(24),
            symbol(b"second", FUNCTION, 1, 0x10440, 0),
            symbol(b"first", FUNCTION, 1, 0x10400, 0x20),
            symbol(b"data", OBJECT, 1, 0x10420, 0x20),
            symbol(b"outside", FUNCTION, 0, 0, 0),
        ]
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0x400, 0x10400, 0x10400, 256, 256, 0x400)
    places = (64, 64 + 56, 64 + 56 + 3 * 64)  # segment, three sections, symbols
    strings = places[2] + len(symbols)
    sections = b"".join(
        struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, offset, size, link, 0, 8, entry)
        for kind, offset, size, link, entry in (
            (0, 0, 0, 0, 0),
            (table, places[2], len(symbols), 2, 24),
            (3, strings, len(NAMES), 0, 0),
        )
    )
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH", 3, 183, 1, 0, places[0], places[1], 0, 64, 56, 1, 64, 3, 2
    )
    return (header + segment + sections + symbols + NAMES).ljust(0x400, b"\0") + bytes(256)


@pytest.mark.parametrize("table", [2, 11])
def test_a_function_is_found_by_its_place_in_the_file(table: int) -> None:
    library = Library(elf(table=table))
    assert library.function_at(0x400) == "first"
    assert library.function_at(0x41F) == "first"
    assert library.function_at(0x420) is None
    assert library.function_at(0x43F) is None
    # Assembly may state no size: it reaches to the next function.
    assert library.function_at(0x4FF) == "second"
    assert library.function_at(0x500) is None


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", elf(table=3)])
def test_a_file_without_symbols_has_no_functions(data: bytes) -> None:
    assert Library(data).function_at(0x400) is None


def test_an_address_is_named_by_symbol_library_or_neither(tmp_path: Path) -> None:
    kept, stripped = tmp_path / "with space.so", tmp_path / "stripped.so"
    kept.write_bytes(elf(table=2))
    stripped.write_bytes(elf(table=3))
    symbols = Symbols(
        parse_maps(
            f"7000-8000 r--p 00000000 08:01 11     {kept}\n"
            f"5000-5100 r-xp 00000400 08:01 12     {stripped}\n"
            f"8000-8100 r-xp 00000400 08:01 11     {kept}\n"
            "9000-a000 rw-p 00000000 00:00 0 \n"
            "b000-c000 rw-p 00000000 00:00 0      [stack]\n"
            "c000-c100 r-xp 00000400 08:01 13     /nowhere/gone.so\n"
        )
    )
    assert symbols.name(0x8004) == "first"
    assert symbols.name(0x8030) == "with space.so"
    assert symbols.name(0x5004) == "stripped.so"
    assert symbols.name(0xC004) == "gone.so"
    assert {symbols.name(a) for a in (0x10, 0x9000, 0xB000, 0xF000)} == {ANONYMOUS}
