"""A lab's devices by names of their own, from a TOML file.

In: an inventory and words from the command line. Out: the `Place`s that they mean.

    [kitchen]
    device = "ssh:pi@kitchen.local"
    threads = 4
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UsageError
from pipeline.records import Place
from targets import base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

ALL = "all"
"""Every device of the inventory."""
NOTHING: Mapping[str, Place] = {}


def read_inventory(file: Path) -> dict[str, Place]:
    """Read an inventory: one table per device.

    Raises:
        UsageError: It is not there, no TOML, or says what a device does not have.
    """
    try:
        found = TypeAdapter(dict[str, Place]).validate_python(tomllib.loads(file.read_text()))
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            why = " ".join(str(error).split())
        raise UsageError(
            f"{file} is no inventory ({why})",
            allowed='a table per device: [name], device = "ssh:user@host", threads = 1',
            do="Correct the file or --inventory",
        ) from error
    for name, place in found.items():
        if name == ALL or not name.strip() or not name.isprintable():
            raise UsageError(
                f"{file} calls a device {name!r}",
                allowed=f"a name of printable characters other than {ALL}",
                do="Rename it in the file",
            )
        try:
            base.device(place.device)
        except UsageError as error:
            raise UsageError(
                f"{file}, [{name}]: {error.got}", allowed=error.allowed, do="Correct the file"
            ) from error
    return found


def places_of(
    words: Sequence[str], threads: int | None, inventory: Mapping[str, Place] = NOTHING
) -> tuple[Place, ...]:
    """Return the places that words mean, each once.

    Args:
        words: Names of the inventory, `all` of them, or names that `targets.base.device` knows.
        threads: For the runtimes; None is what the inventory says, else 1.
        inventory: Names to places.

    Raises:
        UsageError: A word means none.
    """
    found: list[Place] = []
    for word in words:
        if word == ALL:
            places = list(inventory.values())
            if not places:
                raise UsageError(
                    f"--device {ALL} means every device of an inventory, and there is none",
                    allowed="--inventory FILE with at least one device",
                    do="Give --inventory, or name the devices",
                )
        else:
            places = [inventory.get(word) or Place(device=word)]
        for place in places:
            known = base.device(place.device)
            count = place.threads if threads is None else threads
            found.append(Place(device=known.name, threads=count))
    return tuple(dict.fromkeys(found))
