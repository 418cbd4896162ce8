"""Every pair of artifacts of one scheme, as a stage compares them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.records import Export, Kind
from pipeline.verify import agreement_stage

FLOAT = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 0]]


def _export(runtime: str) -> Export:
    return Export(
        runtime=runtime,
        scheme="w8a8",
        placement="pointwise",
        graph_form="one",
        gelu="erf",
        profile="full",
    )


@pytest.mark.parametrize(("a", "b"), [("host", "interpreted"), ("emulated", "host")])
def test_an_agreement_is_of_the_kind_that_is_further_from_a_device(
    a: Kind, b: Kind, tmp_path: Path
) -> None:
    given = []
    for name, kind in (("onnx", a), ("coreml", b)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "logits.npy", FLOAT)
        folder = str(tmp_path / name)
        given.append({"export": asdict(_export(name)), "kind": kind, "folder": folder})
    (row,) = agreement_stage(given, str(tmp_path), lambda *_: None)
    assert (row["a"], row["b"]) == ("onnx", "coreml")
    assert row["kind"] == next(kind for kind in (a, b) if kind != "host")
