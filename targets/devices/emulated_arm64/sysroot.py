"""What an ARM64 board has on its disk: Debian's Python, and the runtimes' own ARM builds.

In: Debian's archive and PyPI. Out: a folder in this user's cache, built once, named by the hash of
what goes in, with the hash of every file that came out. Besides the files it has one view per
profile, in which the CPU's own /proc and /sys stand beside them. Nothing of it runs on the host.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.errors import DeviceError
from pipeline.store import Stage, Store, cache_folder, sha256_file
from targets.devices.emulated_arm64.guest import (
    QEMU,
    ROOT,
    VIEWS,
    WHEELS,
    command,
    environment,
    require_tools,
)
from targets.devices.emulated_arm64.profiles import PROFILES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.worker import Progress

SUITE = "bookworm"
PACKAGES = ("python3-minimal", "python3.11", "libstdc++6", "libgomp1", "zlib1g")
DISTRIBUTIONS = {
    "numpy": "2.4.6",
    "onnxruntime": "1.32.0",
    "ai-edge-litert": "2.3.0",
    "openvino": "2026.4.1",
}
"""As constraints.txt has them: the same releases as on the host."""
PLATFORMS = ("manylinux2014", "manylinux_2_27", "manylinux_2_28", "manylinux_2_35")
ABIS = ("cp311", "abi3", "none")
KEPT = frozenset({"usr", "lib"})
IMPORTS = "import numpy, onnxruntime, ai_edge_litert.interpreter, openvino; openvino.Core()"
SETUP_COMMAND = "convnext-edge devices setup emulated-arm64"
MOST_SECONDS = 600
STEPS = 4


def find() -> Path | None:
    """Return the sysroot, or None where none is built, or one whose files have changed."""
    return _store(cache_folder()).find(_stage())


def setup(progress: Progress) -> Path:
    """Return the sysroot, built now where it is not there yet; those of other versions are removed.

    Args:
        progress: Called at each step, with its name.

    Raises:
        DeviceError: A tool is missing, or a download failed.
        OutputError: The cache cannot be written.
    """

    def make(folder: Path) -> None:
        require_tools((QEMU, "mmdebstrap"))
        root = folder / ROOT
        progress(0, STEPS, f"Debian {SUITE}, arm64")
        _debian(root)
        progress(1, STEPS, "the runtimes' wheels")
        _wheels(root / WHEELS)
        progress(2, STEPS, "views")
        for profile in PROFILES.values():
            _view(folder / VIEWS / profile.name, profile.files())
        progress(3, STEPS, "first start")
        _start(folder)

    found = _store(cache_folder()).get(_stage(), make)
    for other in found.parent.glob("sysroot-*"):
        if other != found:
            shutil.rmtree(other)
    progress(STEPS, STEPS, str(found))
    return found


@functools.cache
def _store(cache: Path) -> Store:
    """Return the one store of this process: it looks at every file, but not twice."""
    return Store(cache / "emulated-arm64")


def _stage() -> Stage:
    here = Path(__file__)
    return Stage(
        name="sysroot",
        modules=(),
        inputs={
            name: sha256_file(here.with_name(f"{name}.py")) for name in ("sysroot", "profiles")
        },
        settings={"suite": SUITE, "packages": PACKAGES, "distributions": DISTRIBUTIONS},
    )


def _debian(root: Path) -> None:
    """Unpack Debian's packages; chrootless, for that needs neither root nor binfmt."""
    _run(
        [
            "mmdebstrap",
            "--mode=chrootless",
            "--variant=extract",
            "--architectures=arm64",
            f"--include={','.join(PACKAGES)}",
            "--format=directory",
            SUITE,
            str(root),
        ],
        "Debian's packages could not be fetched",
    )
    for entry in root.iterdir():
        if entry.name not in KEPT:
            shutil.rmtree(entry)
    for path in root.rglob("*"):
        # Without a chroot an absolute link would lead into the host.
        if path.is_symlink() and path.readlink().is_absolute():
            path.unlink()


def _wheels(target: Path) -> None:
    """Unpack the wheels: none of those has anything to compile or to place elsewhere."""
    with TemporaryDirectory(prefix="convnext-edge-") as name:
        _run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"),
                *(word for abi in ABIS for word in ("--abi", abi)),
                *(word for item in PLATFORMS for word in ("--platform", f"{item}_aarch64")),
                *("--dest", name),
                *(f"{item}=={version}" for item, version in DISTRIBUTIONS.items()),
            ],
            "the wheels could not be fetched",
        )
        for wheel in sorted(Path(name).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)


def _view(view: Path, files: dict[str, str]) -> None:
    """Lay a CPU's /proc and /sys beside links to what all profiles share."""
    for name, text in files.items():
        path = view / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in KEPT:
        (view / name).symlink_to(Path("..", "..", ROOT, name), target_is_directory=True)


def _start(folder: Path) -> None:
    """Import everything once: proof that it runs, and the compiled modules of every later start."""
    keeping = {k: v for k, v in environment(folder).items() if k != "PYTHONDONTWRITEBYTECODE"}
    first = next(iter(PROFILES.values()))
    _run(command(folder, first, ["-c", IMPORTS]), "the runtimes do not start", env=keeping)


def _run(words: Sequence[str], failed: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=MOST_SECONDS, env=env
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise DeviceError(
            f"the sysroot was not built: {failed} ({words[0]}: {said[-1] if said else 'silent'})",
            allowed="Debian's archive and PyPI within reach, and room for 400 MB",
            do=f"Run again: {SETUP_COMMAND}",
        )
