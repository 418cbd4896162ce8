"""What can run on this machine, and what to install.

In: nothing. Out: facts on the host, every runtime and every device, and their table.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pipeline.errors import DeviceError, MissingRuntimeError
from pipeline.inventory import NOTHING
from pipeline.records import PROFILE_OF_ISA
from pipeline.store import library_versions
from targets.base import NotRun, device, devices, kind_here, runtimes
from targets.devices.local import host_isa

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from pipeline.records import Place
    from targets.base import Device, Runtime

AT_ONCE = 16
"""Devices that are asked at the same time: most of it is waiting."""


def examine() -> dict[str, Any]:
    """Look at the machine, every runtime and every device."""
    isa = host_isa()
    return {
        "isa": isa,
        "profile": PROFILE_OF_ISA[isa],
        "runtimes": [_runtime(item) for item in runtimes().values()],
        "devices": examine_devices(),
    }


def examine_devices(inventory: Mapping[str, Place] = NOTHING) -> list[dict[str, Any]]:
    """Look at every device that is found, and at those of an inventory, all at the same time."""
    known = devices() | {name: device(place.device) for name, place in inventory.items()}
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return list(pool.map(_device, known, known.values()))


def show(facts: dict[str, Any], console: Console) -> None:
    """Print the facts as tables."""
    console.print(
        f"ISA {facts['isa']}, integer profile {facts['profile']}"
        + (" (|w| <= 64: exact without VNNI)" if facts["profile"] == "avx2" else ""),
        highlight=False,
    )
    table = Table("runtime", "versions", "can export", "can run", "what to do")
    for row in facts["runtimes"]:
        versions = ", ".join(
            f"{name} {version or '-'}" for name, version in row["versions"].items()
        )
        can = ["yes" if row["can_export"] else "no", _how(row)]
        table.add_row(row["runtime"], versions, *can, escape(row["do"]))
    console.print(table)
    show_devices(facts["devices"], console)


def show_devices(facts: list[dict[str, Any]], console: Console) -> None:
    """Print what `examine_devices` found as a table."""
    places = Table("device", "usable", "kind", "what it is")
    for row in facts:
        usable = "yes" if row["usable"] else "no"
        places.add_row(escape(row["device"]), usable, row.get("kind", ""), escape(row["what"]))
    console.print(places)


def _runtime(item: Runtime) -> dict[str, Any]:
    versions = library_versions(item.capabilities.distributions)
    row: dict[str, Any] = {"runtime": item.name, "versions": versions}
    try:
        cannot = item.can_run()
    except MissingRuntimeError as error:
        return {**row, "can_export": False, "can_run": False, "kind": None, "do": error.do}
    do = cannot.reason if cannot is not None else ""
    kind = kind_here(item) if cannot is None else None
    return {**row, "can_export": True, "can_run": cannot is None, "kind": kind, "do": do}


def _how(row: dict[str, Any]) -> str:
    if not row["can_run"]:
        return "no"
    return "yes" if row["kind"] == "host" else str(row["kind"])


def _device(name: str, item: Device) -> dict[str, Any]:
    try:
        info = item.probe()
    except DeviceError as error:
        info = NotRun(reason=str(error))
    if isinstance(info, NotRun):
        return {"device": name, "usable": False, "what": info.reason}
    what = f"{info.description}, {info.cores} cores, {' '.join(info.isa)}"
    return {**asdict(info), "device": name, "usable": True, "what": what}
