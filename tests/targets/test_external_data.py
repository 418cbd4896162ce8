"""An ONNX file that names another file is refused before a runtime opens either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import ArtifactError
from targets.base import runtimes


def _outside(secret: Path) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "stolen")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", f"../{secret.name}"
    return tensor


def _as_initializer(tensor: onnx.TensorProto) -> onnx.GraphProto:
    return _graph([helper.make_node("Identity", ["stolen"], ["logits"])], [tensor])


def _as_constant(tensor: onnx.TensorProto) -> onnx.GraphProto:
    return _graph([helper.make_node("Constant", [], ["logits"], value=tensor)], [])


def _in_a_branch(tensor: onnx.TensorProto) -> onnx.GraphProto:
    branch = _graph([helper.make_node("Constant", [], ["logits"], value=tensor)], [])
    branch.ClearField("input")
    node = helper.make_node("If", ["yes"], ["logits"], then_branch=branch, else_branch=branch)
    return _graph([node], [numpy_helper.from_array(np.array([True]), "yes")])


def _graph(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.GraphProto:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [4])
    return helper.make_graph(nodes, "evil", [image], [logits], constants)


@pytest.mark.parametrize("make", [_as_initializer, _as_constant, _in_a_branch])
def test_external_data_is_refused(
    make: Callable[[onnx.TensorProto], onnx.GraphProto],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    def opened(*_: object, **__: object) -> None:
        pytest.fail("a runtime opened the file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    (tmp_path / "artifact").mkdir()
    path = tmp_path / "artifact" / "model.onnx"
    model = helper.make_model(make(_outside(secret)), opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="external data"):
        runtimes()["onnx"].load(path, threads=1)
    with pytest.raises(ArtifactError, match="external data"):
        runtimes()["onnx"].read_metadata(path)
