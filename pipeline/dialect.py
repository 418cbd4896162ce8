"""Dialects: the ways in which projects name a ConvNeXt's tensors.

In: tensor names. Out: the one of pipeline/dialects/ that they belong to. A dialect is one file
there, found by discovery.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, cast

from pipeline import dialects
from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from pipeline.records import Architecture

NAMED = 3
"""How many names a message shows."""


class Dialect(Protocol):
    """What a module in pipeline/dialects/ provides."""

    NAME: str
    EXPECTED: str

    def matches(self, names: Collection[str]) -> bool:
        """Tell whether these tensor names are of this dialect."""

    def refusal(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Return the feature that cannot be read, by its name and with the reason."""

    def traits(self, names: Collection[str]) -> frozenset[str]:
        """Return what these names tell of the network and canonical names do not."""

    def canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under canonical names and in canonical shapes."""

    def original(
        self, tensors: Mapping[str, Tensor], architecture: Architecture
    ) -> dict[str, Tensor]:
        """Return canonical tensors under this dialect's names and in its shapes.

        Raises:
            CheckpointError: The dialect cannot express the architecture.
        """

    def norm_eps(self, canonical: Mapping[str, Tensor]) -> tuple[float, float | None]:
        """Return the eps of every LayerNorm, and the head's where it is another."""


def all_dialects() -> dict[str, Dialect]:
    """Return every dialect by its name, discovered from pipeline/dialects/."""
    modules = (cast("Dialect", importlib.import_module(name)) for name in dialect_modules())
    return {dialect.NAME: dialect for dialect in modules}


def dialect_modules() -> tuple[str, ...]:
    """Return the names of the modules in pipeline/dialects/ that are a dialect."""
    found = sorted(info.name for info in pkgutil.iter_modules(dialects.__path__))
    return tuple(f"{dialects.__name__}.{name}" for name in found if not name.startswith("_"))


def dialect_of(raw: Mapping[str, Tensor], where: str) -> Dialect:
    """Return the dialect that a checkpoint's tensors are in.

    Args:
        raw: The tensors under the names that the file gives them.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: They are of no dialect, or of a network that cannot be read.
    """
    known = all_dialects().values()
    for dialect in known:
        if not dialect.matches(raw):
            continue
        if (reason := dialect.refusal(raw)) is not None:
            raise CheckpointError(
                f"{where} ({dialect.NAME} dialect): {reason}",
                allowed="a whole ConvNeXt or ConvNeXt V2 classifier with LayerNorm",
                do="Give another checkpoint, or the one that this was taken from",
            )
        return dialect
    some = ", ".join(list(raw)[:NAMED]) or "none"
    raise CheckpointError(
        f"{where} is not a ConvNeXt known here: its {len(raw)} tensors begin with {some}",
        allowed="names like " + "; or ".join(f"{d.EXPECTED} ({d.NAME})" for d in known),
        do="Convert the names, or check that this is a ConvNeXt classifier",
    )
