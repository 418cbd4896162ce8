"""The compute units that CoreML may use in this process.

In: a variable, which a device `coreml:UNITS` gives its processes. Out: a model loaded for them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

VARIABLE, ALL = "CONVNEXT_EDGE_COREML_UNITS", "ALL"


def compute_units() -> Any:
    """Return what the variable says as coremltools' `ComputeUnit`: all where it is not set."""
    import coremltools as ct

    return ct.ComputeUnit[os.environ.get(VARIABLE, ALL)]


def load_model(path: Path) -> Any:
    """Return coremltools' model of an artifact, loaded for these units."""
    import coremltools as ct

    return ct.models.MLModel(str(path), compute_units=compute_units())
