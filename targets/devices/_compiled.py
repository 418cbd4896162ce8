"""C sources of this project, compiled where they are needed.

In: a C file. Out: a shared object in this user's cache, named by the hash of the source and of how
it was compiled.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from pipeline.errors import DeviceError, OutputError
from pipeline.store import CACHE_VARIABLE, Stage, Store, cache_folder, sha256_file

if TYPE_CHECKING:
    from pathlib import Path

COMPILER = "gcc"
COMPILE = (COMPILER, "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
INSTALL = "apt-get install -y gcc libc6-dev"


def compiled(source: Path, place: str) -> Path:
    """Return a compiled source, compiled now where it is not there yet.

    Args:
        source: The C file.
        place: Folder of the cache.

    Raises:
        DeviceError: There is no gcc, it refuses the source, or the cache cannot be written.
    """
    name = f"{source.stem}.so"

    def make(folder: Path) -> None:
        _compile(source, folder / name)

    stage = Stage(
        name=source.stem,
        modules=(),
        inputs={"source": sha256_file(source)},
        settings={"compile": COMPILE},
    )
    try:
        return Store(cache_folder() / place).get(stage, make) / name
    except OutputError as error:
        raise DeviceError(
            f"{source.name} is not compiled: {error.got}",
            allowed="a cache folder that this user may write, on a disk with room",
            do=f"Set {CACHE_VARIABLE} to another folder",
        ) from error


def _compile(source: Path, target: Path) -> None:
    if shutil.which(COMPILER) is None:
        raise DeviceError(
            f"{source.name} needs {COMPILER}, not on PATH",
            allowed=f"a Linux machine with {COMPILER}",
            do=f"Run: {INSTALL}",
        )
    done = subprocess.run(
        [*COMPILE, str(source), "-o", str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        first = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise DeviceError(
            f"{source.name} does not compile: {first}",
            allowed=f"{COMPILER} with a C library",
            do=f"Run: {INSTALL}",
        )
