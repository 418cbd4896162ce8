"""The counter, compiled: plugin.c, loaded into QEMU.

In: the C file beside this. Out: a shared object in this user's cache, named by the hash of the
source and of how it was compiled.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from pipeline.errors import DeviceError
from pipeline.store import Stage, Store, sha256_file
from targets.devices.emulated_arm64.guest import require_tools
from targets.devices.emulated_arm64.sysroot import cache_folder

SOURCE = Path(__file__).with_name("plugin.c")
COMPILE = ("gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
NAME = "counter.so"


def built() -> Path:
    """Return the compiled plugin, compiled now where it is not there yet.

    Raises:
        DeviceError: There is no gcc, or it refuses the source.
        OutputError: The cache cannot be written.
    """
    stage = Stage(
        name="plugin",
        modules=(),
        inputs={"source": sha256_file(SOURCE)},
        settings={"compile": COMPILE},
    )
    return Store(cache_folder() / "emulated-arm64").get(stage, _compile) / NAME


def _compile(folder: Path) -> None:
    require_tools(("gcc",))
    done = subprocess.run(
        [*COMPILE, str(SOURCE), "-o", str(folder / NAME)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DeviceError(
            f"the counting plugin does not compile: {done.stderr.strip().splitlines()[0]}",
            allowed="gcc with a C library, as Debian's packages gcc and libc6-dev give",
            do="Run: apt-get install -y gcc libc6-dev",
        )
