"""The embedded model on emulated ARM64 boards: its outputs against x86, and its instructions.

It builds the sysroot where this machine has none, for which Debian's archive and PyPI must be
within reach.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.batches import some_pixels
from calib.images import open_images
from pipeline.worker import silent
from targets.base import Device, Job, Samples, device, runtimes
from targets.devices.emulated_arm64 import guest, sysroot
from targets.devices.emulated_arm64.device import DEVICES
from targets.devices.emulated_arm64.profiles import PROFILES
from targets.export import read_metadata

pytestmark = pytest.mark.acceptance

IMAGES = 100
PLACEMENTS = {"pointwise": ("onnx", "openvino"), "pointwise-io": ("tflite",)}
RUNTIMES = ("onnx", "openvino", "tflite")
BOARDS = ("pi4", "pi5", "phone")
SCHEMES = ("float", "w8a8")
ROUNDS = 3
REPEAT = 1e-3
BOUNDS = {"float": 1e-5, "w8a8": 0.01}
"""Of the largest logit: rounding of floats; a step here and there, carried to the end."""
HWCAPS = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma "
    "lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg "
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm "
    "svebf16 i8mm bf16 dgh rng bti mte"
)
"""Linux's words for the bits of a process's AT_HWCAP and AT_HWCAP2, 32 and the rest."""
ASK_HWCAPS = (
    "import ctypes; ask = ctypes.CDLL(None).getauxval; ask.restype = ctypes.c_ulong; "
    "print(ask(16), ask(26))"
)


@pytest.fixture(scope="module", autouse=True)
def built() -> Path:
    DEVICES.setup(silent)
    found = sysroot.find()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return each runtime's folder of artifacts: of its own default placement."""
    folders = dict[str, Path]()
    for placement, names in PLACEMENTS.items():
        out = tmp_path_factory.mktemp(placement)
        command = [sys.executable, "-P", "-m", "pipeline.cli", "run", "--out", str(out)]
        command += ["--runtimes", ",".join([*names, "reference"]), "--isa", "arm"]
        command += ["--placement", placement, "--tune", "off"]
        command += ["--no-bench", "--eval-images", "20"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        folders |= dict.fromkeys(names, out / "artifacts")
    return folders


def job(folder: Path, name: str, scheme: str) -> Job:
    suffix = runtimes()[name].capabilities.suffix
    (path,) = (folder / f"{name}-{scheme}").glob(f"model{suffix}")
    return Job(label=scheme, runtime=name, path=path)


def infer(board: Device, what: Job, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return board.infer(what, pixels, batch=1, threads=1, progress=silent)


def count(name: str, jobs: list[Job]) -> dict[str, Samples]:
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32)).astype(np.float32)
    board = device(f"emulated-arm64:{name}")
    found = board.measure(jobs, image, rounds=ROUNDS, per_round=1, threads=1, progress=silent)
    return {row.label: row for row in found}


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_states_what_its_cpu_can(built: Path, name: str) -> None:
    words = guest.command(built, PROFILES[name], ["-c", ASK_HWCAPS])
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env=guest.environment(built)
    )
    first, second = (int(word) for word in done.stdout.split())
    bits = first | second << 32
    assert [word for bit, word in enumerate(HWCAPS.split()) if bits >> bit & 1] == (
        PROFILES[name].features.split()
    )


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("board", ["pi4", "pi5"])
def test_arm_computes_what_x86_and_the_reference_compute(
    artifacts: dict[str, Path], name: str, board: str
) -> None:
    here, there = device("local"), device(f"emulated-arm64:{board}")
    for scheme, reference in (("float", name), ("w8a8", "reference")):
        what = job(artifacts[name], name, scheme)
        assert what.path is not None
        how = read_metadata(what.path).preprocessing
        pixels = some_pixels(open_images("digits", "evaluation"), how, IMAGES)
        arm = infer(there, what, pixels)
        # int8 on an x86 without VNNI may saturate: the reference does not.
        expected = infer(here, job(artifacts[name], reference, scheme), pixels)
        largest = np.abs(arm - expected).max()
        assert largest < BOUNDS[scheme] * np.abs(expected).max()
        assert (arm.argmax(1) == expected.argmax(1)).mean() >= 0.99


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_integers_go_through_the_instructions_that_the_cpu_has(
    artifacts: dict[str, Path], name: str
) -> None:
    jobs = [job(artifacts[name], name, scheme) for scheme in SCHEMES]
    for board in BOARDS:
        rows = count(board, jobs)
        kinds = rows["w8a8"].instruction_kinds
        assert (kinds["dot_product"] + kinds["i8mm"] > 0) == (board != "pi4")
        assert (kinds["i8mm"] > 0) == (board == "phone")
        assert rows["float"].instruction_kinds == {"dot_product": 0, "i8mm": 0}


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("board", ["pi4", "pi5"])
def test_counts_repeat_and_name_the_kernels(
    artifacts: dict[str, Path], name: str, board: str
) -> None:
    jobs = [job(artifacts[name], name, scheme) for scheme in SCHEMES]
    first, second = (count(board, jobs) for _ in range(2))
    for scheme in SCHEMES:
        runs = [first[scheme], second[scheme]]
        for row in runs:
            assert len(row.instructions) == ROUNDS
            assert sum(row.symbols.values()) == pytest.approx(median(row.instructions), rel=REPEAT)
        counts = [number for row in runs for number in row.instructions]
        assert max(counts) - min(counts) < REPEAT * median(counts)
    # LiteRT keeps its kernels' names.
    named = any(symbol.startswith("xnn_qs8_") for symbol in first["w8a8"].symbols)
    assert named == (name == "tflite")
