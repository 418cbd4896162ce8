"""The commands about devices: list them, set one up; thin."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from pipeline.cli_run import Inventory, err_console, new_display, out_console
from pipeline.errors import UsageError

devices_app = typer.Typer(
    help="List where artifacts can be measured, or set a device up.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@devices_app.callback()
def devices(
    context: typer.Context,
    inventory: Inventory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """List the devices that are found, and those of an inventory."""
    if context.invoked_subcommand is not None:
        return
    from pipeline.doctor import examine_devices, show_devices
    from pipeline.inventory import NOTHING, read_inventory

    facts = examine_devices(read_inventory(inventory) if inventory else NOTHING)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        show_devices(facts, out_console)


@devices_app.command()
def setup(
    name: Annotated[str, typer.Argument(help="A family that is set up once: emulated-arm64.")],
) -> None:
    """Build what a family of devices needs on this machine; what is there is kept."""
    from targets.base import NeedsSetup, device_families

    family = {k: v for k, v in device_families().items() if isinstance(v, NeedsSetup)}
    if name not in family:
        raise UsageError(
            f"{name} is not set up by this project",
            allowed=", ".join(family) or "nothing here",
            do="Correct the name; `convnext-edge devices` says what each device needs",
        )
    with new_display() as display, display.stage(f"setup {name}") as progress:
        done = family[name].setup(progress)
    err_console.print(f"  {name}: {done}", soft_wrap=True, highlight=False, markup=False)
