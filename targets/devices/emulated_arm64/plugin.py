"""The counter, compiled: plugin.c, loaded into QEMU."""

from __future__ import annotations

from pathlib import Path

from targets.devices._compiled import compiled

SOURCE = Path(__file__).with_name("plugin.c")


def built() -> Path:
    """Return the compiled plugin, compiled now where it is not there yet.

    Raises:
        DeviceError: There is no gcc, it refuses the source, or the cache cannot be written.
    """
    return compiled(SOURCE, "emulated-arm64")
