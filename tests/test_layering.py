"""Imports go one way, module by module; frameworks stay inside functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.store import PACKAGES, imported_modules

ROOT = Path(__file__).parents[1]
LEVELS = (
    {"pipeline.errors", "pipeline.records"},
    {
        "pipeline.recipe",
        "pipeline.store",
        "pipeline.arithmetic",
        "pipeline.statistics",
    },
    {"pipeline.worker", "pipeline.locate", "pipeline.recorder"},
    {"pipeline.distributed", "pipeline.sidecar", "pipeline.loaded"},
    {"pipeline.convnext", "pipeline.pickled", "pipeline.tensorfile", "pipeline.dialects"},
    {"pipeline.trace", "pipeline.placements", "pipeline.dialect", "pipeline.infer"},
    {"pipeline.checkpoint"},
    {"pipeline.convert"},
    {"calib.sources.base"},
    {"calib.sources", "calib.preprocess", "calib.loader", "calib.labels"},
    {"calib.images"},
    {"calib.batches"},
    {"calib"},
    {"pipeline.fold"},
    {"pipeline.calibrate", "pipeline.quantize", "pipeline.embedded"},
    {"pipeline.student", "pipeline.nncf_quantizers", "pipeline.nncf_student"},
    {"pipeline.training_loop", "pipeline.training"},
    {"targets"},
    {"pipeline.logits", "pipeline.verify", "pipeline.benchmark", "pipeline.sensitivity"},
    {"pipeline.assign"},
    {"reports"},
    {
        "pipeline.display",
        "pipeline.data",
        "pipeline.inspect",
        "pipeline.predict",
        "pipeline.doctor",
        "pipeline.inventory",
    },
    {"pipeline.stages"},
    {
        "pipeline.conclude",
        "pipeline.profiled",
        "pipeline.measure",
        "pipeline.exports",
        "pipeline.candidates",
    },
    {"pipeline.tune", "pipeline.finetune", "pipeline.autotune", "pipeline.layouts"},
    {"pipeline.parity", "pipeline.lab"},
    {"pipeline.run"},
    {"pipeline.words", "pipeline.explain", "pipeline.results"},
    {"pipeline.cli", "pipeline.cli_run", "pipeline.cli_devices"},
)
"""Each level imports from those before it and from itself."""


def level_of(module: str) -> int | None:
    """Return the index of a module's level; a bare package has none."""
    for index, level in enumerate(LEVELS):
        if any(module == name or module.startswith(f"{name}.") for name in level):
            return index
    return None


def wrong_imports(module: str, source: str) -> list[str]:
    """Return what a module imports from a level after its own."""
    own = level_of(module)
    assert own is not None, f"{module} belongs to no level"
    found = ((name, level_of(name)) for name in imported_modules(source))
    return sorted(name for name, level in found if level is not None and level > own)


def modules() -> dict[str, Path]:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in files
        if path.name != "__init__.py"
    }


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_one_way(module: str) -> None:
    assert wrong_imports(module, modules()[module].read_text()) == []


def test_a_wrong_import_is_found() -> None:
    assert wrong_imports("calib.images", "from pipeline.run import execute") == ["pipeline.run"]
    assert wrong_imports("pipeline.records", "def f():\n    import targets.base") == [
        "targets.base"
    ]


def test_every_init_stays_empty() -> None:
    inits = [path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    assert inits
    assert all(not path.read_bytes() for path in inits)


def test_import_targets_loads_no_framework() -> None:
    code = (
        "import sys, targets, targets.base; targets.base.runtimes(); targets.base.devices();"
        "print([m for m in ('torch','onnx','onnxruntime','openvino','tensorflow','coremltools',"
        "'ai_edge_litert') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
