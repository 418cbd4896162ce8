"""What the plugin writes becomes counts per inference."""

from __future__ import annotations

import pytest

from pipeline.errors import DeviceError
from targets.devices.emulated_arm64.counts import kinds_of, read_counts, words_of

ASSEMBLED = {
    "sdot v1.4s, v2.16b, v3.16b": ("4e839441", "dot_product"),
    "sdot v1.2s, v2.8b, v3.8b": ("0e839441", "dot_product"),
    "udot v31.4s, v30.16b, v29.16b": ("6e9d97df", "dot_product"),
    "sdot v1.4s, v2.16b, v3.4b[0]": ("4f83e041", "dot_product"),
    "sdot v1.4s, v2.16b, v31.4b[3]": ("4fbfe841", "dot_product"),
    "udot v1.2s, v2.8b, v19.4b[2]": ("2f93e841", "dot_product"),
    "smmla v1.4s, v2.16b, v3.16b": ("4e83a441", "i8mm"),
    "ummla v1.4s, v2.16b, v3.16b": ("6e83a441", "i8mm"),
    "usmmla v31.4s, v30.16b, v29.16b": ("4e9dafdf", "i8mm"),
    "usdot v1.4s, v2.16b, v3.16b": ("4e839c41", "i8mm"),
    "usdot v1.2s, v2.8b, v3.4b[1]": ("0fa3f041", "i8mm"),
    "usdot v1.4s, v2.16b, v31.4b[3]": ("4fbff841", "i8mm"),
    "sudot v1.4s, v2.16b, v31.4b[3]": ("4f3ff841", "i8mm"),
    "sudot v1.2s, v2.8b, v3.4b[0]": ("0f03f041", "i8mm"),
    "fmla v1.4s, v2.4s, v3.4s": ("4e23cc41", None),
    "fmla v1.4s, v2.4s, v3.s[1]": ("4fa31041", None),
    "smlal v1.4s, v2.4h, v3.h[2]": ("0f632041", None),
    "smull v1.8h, v2.8b, v3.8b": ("0e23c041", None),
    "sadalp v1.4s, v2.8h": ("4e606841", None),
    "bfdot v1.4s, v2.8h, v3.8h": ("6e43fc41", None),
    "bfdot v1.4s, v2.8h, v3.2h[1]": ("4f63f041", None),
    "bfmmla v1.4s, v2.8h, v3.8h": ("6e43ec41", None),
    "bfmlalb v1.4s, v2.8h, v3.h[1]": ("0fd3f041", None),
    "mla v1.4s, v2.4s, v3.4s": ("4ea39441", None),
    "fmlal v1.4s, v2.4h, v3.4h": ("4e23ec41", None),
    "sqrdmlah v1.4s, v2.4s, v3.4s": ("6e838441", None),
    "ret": ("d65f03c0", None),
    "svc #0": ("d4000001", None),
}
"""As an assembler has them: the instruction word, and its kind."""

SDOT, SMMLA, RET = "4e839441", "4e83a441", "d65f03c0"
WRITTEN = f"""\
region
ran 7 10
ran 8 1
region
ran 7 12
ran 9 1
block 9 2000 {RET}
block 8 2000 {RET}
block 7 1000 {SDOT}{SDOT}{SMMLA}{RET}
"""
NAMES = {0x1000: "kernel", 0x2000: "caller"}


@pytest.mark.parametrize("assembly", ASSEMBLED)
def test_an_instruction_word_has_its_kind(assembly: str) -> None:
    word, kind = ASSEMBLED[assembly]
    expected = {name: int(name == kind) for name in ("dot_product", "i8mm")}
    assert kinds_of(words_of(word)) == expected


def test_regions_are_added_up_apart_and_their_blocks_by_name() -> None:
    counts = read_counts(WRITTEN, NAMES.__getitem__)
    assert counts.instructions == (41, 49)
    assert counts.kinds == {"dot_product": 22, "i8mm": 11}
    assert counts.symbols == {"kernel": 44, "caller": 1}
    assert next(iter(counts.symbols)) == "kernel"


@pytest.mark.parametrize("text", ["", "region\n", WRITTEN.partition("block")[0]])
def test_a_file_without_a_whole_count_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="no whole count"):
        read_counts(text, str)
