"""Small artifacts of one seeded network, and a disk that is full."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.collect import collect
from pipeline.convnext import seeded
from pipeline.fold import fold
from pipeline.quantize import Given, quantize
from pipeline.records import Architecture, Export, Preprocessing, Wanted
from targets.base import runtimes
from targets.export import metadata
from targets.translate import build_graph

RUNTIMES = ("onnx", "openvino", "tflite")
Pixels = NDArray[np.float32]


@pytest.fixture(scope="session")
def pixels() -> Pixels:
    """Noise: float32 (5, 3, 32, 32) in [0, 255]."""
    return np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="session")
def artifacts(pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return the float artifact of each runtime that has a Python package for boards."""
    how = Preprocessing(input_size=32)
    shape = Architecture(depths=(1, 1), dims=(8, 16), classes=6, layer_scale=False)
    folded = fold(seeded(shape, 0), how)
    given = Given(folded=folded, statistics=collect(folded, [pixels]), sample=pixels)
    model, arrays = quantize(given, how, Wanted(), labels=None, parents={})
    folder, made = tmp_path_factory.mktemp("artifacts"), {}
    for name in RUNTIMES:
        target = runtimes()[name]
        can = target.capabilities
        export = Export(
            runtime=name,
            scheme="float",
            placement="none",
            graph_form=can.graph_forms[0],
            gelu=can.gelu,
            profile=None,
            batch=1,
        )
        made[name] = folder / f"model{can.suffix}"
        target.export(
            build_graph(model, arrays, can, export), made[name], metadata(model, export, can)
        )
    return made


@pytest.fixture
def without_room() -> Callable[[Path, Path, str], None]:
    """Give what leaves no room for one file of every run on a device; it needs no root.

    Behind the file's name is /dev/full, where writing fails as on a full disk. What puts it there
    is the device's sha256sum, which is asked when a run has its folder and no file yet.
    """

    def leave(binaries: Path, root: Path, name: str) -> None:
        real = shutil.which("sha256sum")
        assert real is not None
        binaries.mkdir(exist_ok=True)
        tool = binaries / "sha256sum"
        link = f'for run in {root}/runs/*; do ln -sf /dev/full "$run/{name}"; done 2>/dev/null'
        tool.write_text(f'#!/bin/sh\n{link}\nexec {real} "$@"\n')
        tool.chmod(0o755)

    return leave
