"""What can run on this machine, and what to install.

In: nothing. Out: facts on the host, every runtime and every device, and their table.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pipeline.errors import MissingRuntimeError
from pipeline.records import PROFILE_OF_ISA
from pipeline.store import library_versions
from targets.base import NotRun, devices, kind_here, runtimes
from targets.devices.local import host_isa

if TYPE_CHECKING:
    from rich.console import Console

    from targets.base import Device, Runtime


def examine() -> dict[str, Any]:
    """Look at the machine, every runtime and every device."""
    isa = host_isa()
    return {
        "isa": isa,
        "profile": PROFILE_OF_ISA[isa],
        "runtimes": [_runtime(item) for item in runtimes().values()],
        "devices": [_device(item) for item in devices().values()],
    }


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
    places = Table("device", "usable", "what it is")
    for row in facts["devices"]:
        places.add_row(row["device"], "yes" if row["usable"] else "no", escape(row["what"]))
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


def _device(item: Device) -> dict[str, Any]:
    info = item.probe()
    if isinstance(info, NotRun):
        return {"device": item.name, "usable": False, "what": info.reason}
    what = f"{info.description}, {info.cores} cores, {' '.join(info.isa)}"
    return {"device": item.name, "usable": True, "what": what, **asdict(info)}
