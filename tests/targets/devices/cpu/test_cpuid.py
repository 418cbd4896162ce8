"""A process does not see the instruction sets that are hidden from it, and lives on otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pipeline.errors import DeviceError
from pipeline.store import CACHE_VARIABLE
from targets.devices._compiled import compiled
from targets.devices.cpu import cpuid
from targets.devices.cpu.device import LEVELS

FEATURES = "from numpy._core._multiarray_umath import __cpu_features__ as f; print(f['AVX512F'])"
"""numpy asks CPUID itself, when it is loaded."""
ASK = """
#include <cpuid.h>
#include <stdio.h>
int main(void) {
    for (unsigned subleaf = 0; subleaf < 2; subleaf++) {
        unsigned a, b, c, d;
        __cpuid_count(7, subleaf, a, b, c, d);
        printf("%08x %08x %08x %08x\\n", a, b, c, d);
    }
}
"""
on_a_cpu_that_hides = pytest.mark.skipif(
    cpuid.why_not() is not None, reason=f"nothing can be hidden here: {cpuid.why_not()}"
)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    cpuid.why_not.cache_clear()
    yield
    cpuid.why_not.cache_clear()


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="it is for such a system"
)
def test_it_compiles_without_a_warning() -> None:
    assert compiled(cpuid.SOURCE, "cpu").is_file()


@on_a_cpu_that_hides
@pytest.mark.parametrize("name", ["with a space", "with:colon"])
def test_a_cache_that_nothing_can_be_preloaded_from_is_said(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
    assert "cannot be preloaded" in (cpuid.why_not() or "")
    with pytest.raises(DeviceError, match=r"cannot be preloaded.*Set CONVNEXT_EDGE_CACHE"):
        cpuid.hiding(())


@on_a_cpu_that_hides
def test_a_cache_that_cannot_be_written_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert "cpuid.c is not compiled: cannot write" in (cpuid.why_not() or "")
    with pytest.raises(DeviceError, match="Set CONVNEXT_EDGE_CACHE to another folder"):
        cpuid.hiding(())


@on_a_cpu_that_hides
def test_a_library_that_is_not_loaded_is_no_quiet_lie(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = tmp_path / "cpuid.so"
    empty.write_bytes(b"")
    monkeypatch.setattr(cpuid, "compiled", lambda *_: empty)
    assert "does not start as it should" in (cpuid.why_not() or "")


def run(code: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", code]
    given = {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=given)


@on_a_cpu_that_hides
def test_what_is_hidden_is_not_found_by_libraries_threads_and_children() -> None:
    hiding = cpuid.hiding(LEVELS["avx2"].hides)
    code = f"import threading\nthreading.Thread(target=lambda: exec({FEATURES!r}, {{}})).start()"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {FEATURES!r}])"
    for program in (FEATURES, code, child):
        done = run(program, hiding)
        assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@on_a_cpu_that_hides
def test_every_bit_is_hidden_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "ask.c").write_text(ASK)
    ask = tmp_path / "ask"
    subprocess.run(["gcc", str(tmp_path / "ask.c"), "-o", str(ask)], check=True)

    def words(environment: Mapping[str, str]) -> list[int]:
        given = {**os.environ, **environment}
        done = subprocess.run([ask], capture_output=True, text=True, check=True, env=given)
        return [int(word, 16) for word in done.stdout.split()]

    plain, hiding = words({}), cpuid.hiding(cpuid.BITS)
    hidden = [int(word, 16) for word in hiding[cpuid.VARIABLE].split()]
    assert words(hiding) == [word & ~bits for word, bits in zip(plain, hidden, strict=True)]
    assert words(hiding) != plain
    assert words(cpuid.hiding(())) == plain


@on_a_cpu_that_hides
def test_a_fault_of_another_kind_still_ends_the_process() -> None:
    done = run("import ctypes; ctypes.string_at(8)", cpuid.hiding(()))
    assert done.returncode == -11


@on_a_cpu_that_hides
def test_a_handler_that_is_set_later_gets_what_is_not_cpuid_and_nothing_else() -> None:
    code = f"import faulthandler, ctypes; faulthandler.enable(); {FEATURES}; ctypes.string_at(8)"
    done = run(code, {**cpuid.hiding(LEVELS["avx2"].hides), "PYTHONFAULTHANDLER": "1"})
    assert (done.returncode, done.stdout) == (-11, "False\n")
    assert "Fatal Python error: Segmentation fault" in done.stderr


@on_a_cpu_that_hides
def test_a_handler_is_handed_back_as_it_was_set() -> None:
    code = (
        "import signal; own = lambda *_: None; signal.signal(signal.SIGSEGV, own);"
        "assert signal.signal(signal.SIGSEGV, signal.SIG_DFL) is own;"
        "import faulthandler; faulthandler.enable(); faulthandler.disable();"
    )
    done = run(f"{code} {FEATURES}", cpuid.hiding(LEVELS["avx2"].hides))
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@on_a_cpu_that_hides
@pytest.mark.parametrize("words", ["", "1 2 3", "0 0 0 0 0 0 0 x"])
def test_words_that_are_none_end_the_process_with_a_line(words: str) -> None:
    done = run("", {**cpuid.hiding(()), cpuid.VARIABLE: words})
    assert done.returncode == 97
    assert done.stderr == "cpuid: CONVNEXT_EDGE_HIDDEN is not eight hexadecimal words\n"


def test_bits_are_where_the_manual_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpuid, "compiled", lambda *_: Path("lib.so"))
    monkeypatch.delenv(cpuid.PRELOAD, raising=False)
    found = cpuid.hiding(["avx512f", "avx512_vnni", "amx_int8", "avx_vnni", "avx10_1"])
    words = [0, 1 << 16, 1 << 11, 1 << 25, 1 << 4, 0, 0, 1 << 19]
    assert found == {
        cpuid.PRELOAD: "lib.so",
        cpuid.VARIABLE: " ".join(f"{word:08x}" for word in words),
    }


def test_what_is_preloaded_already_stays_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpuid, "compiled", lambda *_: Path("lib.so"))
    monkeypatch.setenv(cpuid.PRELOAD, "other.so")
    once = cpuid.hiding(())[cpuid.PRELOAD]
    assert once == "lib.so other.so"
    monkeypatch.setenv(cpuid.PRELOAD, once)
    assert cpuid.hiding(())[cpuid.PRELOAD] == once


def test_where_nothing_can_be_hidden_it_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpuid, "CPUINFO", flags)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    flags.write_text("flags\t\t: avx2 cpuid avx512f\n")
    assert "no cpuid_fault" in (cpuid._lacks() or "")
    flags.write_text("flags\t\t: avx2 cpuid_fault\n")
    monkeypatch.setenv("PATH", "")
    assert "gcc" in (cpuid._lacks() or "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "x86-64" in (cpuid._lacks() or "")


def test_a_compiler_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(DeviceError, match=r"cpuid\.c needs gcc, not on PATH.*apt-get install"):
        cpuid.hiding(())
