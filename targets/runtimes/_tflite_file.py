"""A TFLite file in the making: tensors, constants, operators, through LiteRT's own schema.

In: tensors and operators one after another, named by the index that each call returns. Out: the
file's bytes, with a signature and metadata; and such a file read again. What a ConvNeXt looks like
in it is `tflite`'s matter.

Source: tensorflow/compiler/mlir/lite/schema/schema.fbs, whose generated classes LiteRT ships.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.records import Quantization

IDENTIFIER, SCHEMA_VERSION = b"TFL3", 3
VERSIONS = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 5,
    "GELU": 2,
    "QUANTIZE": 1,
    "DEQUANTIZE": 2,
    "PAD": 2,
}
"""Op versions where they are above 1: those in which int8 and kept dimensions came in."""
INT16_VERSIONS = {
    "CONV_2D": 8,
    "DEPTHWISE_CONV_2D": 5,
    "FULLY_CONNECTED": 11,
    "QUANTIZE": 2,
    "DEQUANTIZE": 3,
    "PAD": 3,
}
"""Where a tensor is int16; in a layer that is with a bias of a stated type."""
HALF_VERSIONS = {"DEQUANTIZE": 3}
"""Where a tensor is float16."""
PER_CHANNEL_VERSIONS = {
    "CONV_2D": 5,
    "DEPTHWISE_CONV_2D": 6,
    "FULLY_CONNECTED": 12,
    "DEQUANTIZE": 5,
}
"""Where int8 of one scale per channel becomes float32: in DEQUANTIZE, or in a layer that quantizes
what it reads itself."""


class TfliteFile:
    """One subgraph and its constants.

    Args:
        dynamic_batch: Whether the first axis of every tensor that is no constant may change.
    """

    def __init__(self, *, dynamic_batch: bool) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.dynamic_batch = dynamic_batch
        self._buffers = [schema.BufferT()]
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[tuple[str, int], int] = {}

    def tensor(self, name: str, shape: Sequence[int], kind: int | None = None) -> int:
        """Add what an operator writes; float32 unless another `TensorType` is given."""
        return self._tensor(name, shape, kind, 0, None)

    def integer_tensor(self, name: str, shape: Sequence[int], parameters: Quantization) -> int:
        """Add an int8 or int16 tensor with one scale and one zero point."""
        quantization = self.schema.QuantizationParametersT()
        quantization.scale = np.array([parameters.scale], np.float32)
        quantization.zeroPoint = np.array([parameters.zero_point], np.int64)
        kind = getattr(self.schema.TensorType, f"INT{parameters.bits}")
        return self._tensor(name, shape, kind, 0, quantization)

    def dequantized(self, name: str, constant: int) -> int:
        """Add what DEQUANTIZE makes of a constant; a runtime does that once, when it loads."""
        out = self._tensor(name, self._tensors[constant].shape, None, 0, None)
        self._tensors[out].shapeSignature = None
        self.operator("DEQUANTIZE", [constant], [out], self.options("DequantizeOptions"))
        return out

    def constant(
        self, name: str, value: NDArray[Any] | np.generic, quantization: Any = None
    ) -> int:
        """Add a constant: floats or integers, with `per_channel` parameters or none."""
        array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
        kind = getattr(self.schema.TensorType, array.dtype.name.upper())
        data = np.frombuffer(array.tobytes(), np.uint8)
        return self._tensor(name, array.shape, kind, self._buffer(data), quantization)

    def per_channel(self, scales: NDArray[np.float32], axis: int) -> Any:
        """Return quantization parameters: one scale per channel of an axis, zero points 0."""
        quantization = self.schema.QuantizationParametersT()
        quantization.scale = scales
        quantization.zeroPoint = np.zeros(len(scales), np.int64)
        quantization.quantizedDimension = axis
        return quantization

    def options(self, kind: str, **fields: object) -> Any:
        """Return a table of an operator's options."""
        options = getattr(self.schema, f"{kind}T")()
        for name, value in fields.items():
            setattr(options, name, value)
        return options

    def operator(self, kind: str, inputs: list[int], outputs: list[int], options: Any) -> None:
        """Add an operator behind those before it."""
        op = self.schema.OperatorT()
        code = kind, self._version(kind, [self._tensors[i] for i in (*inputs, *outputs)])
        op.opcodeIndex = self._codes.setdefault(code, len(self._codes))
        op.inputs, op.outputs = inputs, outputs
        if options is not None:
            op.builtinOptions = options
            kind_of = self.schema.BuiltinOptions
            op.builtinOptionsType = getattr(kind_of, type(options).__name__.removesuffix("T"))
        self._operators.append(op)

    def finish(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        metadata: Mapping[str, bytes],
    ) -> bytes:
        """Return the file.

        Args:
            inputs: Names in the signature to tensors, which take these names.
            outputs: The same for what it returns.
            metadata: Named buffers.
        """
        import flatbuffers

        schema = self.schema
        for name, index in (*inputs.items(), *outputs.items()):
            self._tensors[index].name = name
        subgraph = schema.SubGraphT()
        subgraph.tensors, subgraph.operators = self._tensors, self._operators
        subgraph.inputs, subgraph.outputs = list(inputs.values()), list(outputs.values())
        subgraph.name = "main"
        model = schema.ModelT()
        model.version, model.description = SCHEMA_VERSION, "convnext-edge"
        model.subgraphs = [subgraph]
        model.operatorCodes = [self._code(*code) for code in self._codes]
        model.signatureDefs = [self._signature(inputs, outputs)]
        model.metadata = [self._metadata(name, value) for name, value in metadata.items()]
        model.buffers = self._buffers
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _tensor(
        self, name: str, shape: Sequence[int], kind: int | None, buffer: int, quantization: Any
    ) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, list(shape), buffer
        tensor.type = self.schema.TensorType.FLOAT32 if kind is None else kind
        tensor.quantization = quantization
        if buffer == 0 and self.dynamic_batch:
            tensor.shapeSignature = [-1, *shape[1:]]
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def _buffer(self, data: NDArray[np.uint8]) -> int:
        buffer = self.schema.BufferT()
        buffer.data = data
        self._buffers.append(buffer)
        return len(self._buffers) - 1

    def _version(self, kind: str, tensors: Sequence[Any]) -> int:
        types, known = [tensor.type for tensor in tensors], self.schema.TensorType
        if known.INT16 in types:
            return INT16_VERSIONS[kind]
        if known.FLOAT16 in types:
            return HALF_VERSIONS[kind]
        if known.INT8 in types and types[-1] == known.FLOAT32 and _per_channel(tensors):
            return PER_CHANNEL_VERSIONS[kind]
        return VERSIONS.get(kind, 1)

    def _code(self, kind: str, version: int) -> Any:
        code = self.schema.OperatorCodeT()
        code.builtinCode = getattr(self.schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = version
        return code

    def _signature(self, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> Any:
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [self._entry(*item) for item in inputs.items()]
        signature.outputs = [self._entry(*item) for item in outputs.items()]
        return signature

    def _entry(self, name: str, tensor: int) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        return entry

    def _metadata(self, name: str, value: bytes) -> Any:
        entry = self.schema.MetadataT()
        entry.name = name
        entry.buffer = self._buffer(np.frombuffer(value, np.uint8))
        return entry


def _per_channel(tensors: Sequence[Any]) -> bool:
    return any(t.quantization is not None and len(t.quantization.scale) > 1 for t in tensors)


def load(path: Path) -> Any:
    """Read a file into the schema's own classes.

    Raises:
        ArtifactError: It is not a TFLite file.
    """
    from ai_edge_litert import schema_py_generated as schema

    try:
        data = path.read_bytes()
        assert data[4:8] == IDENTIFIER, "no TFLite identifier"
        return schema.ModelT.InitFromPackedBuf(data)
    except Exception as error:  # flatbuffers reads out of bounds in as many ways as there are bytes
        raise not_tflite(path, error) from error


def not_tflite(path: Path, error: Exception) -> ArtifactError:
    """Return the error that says so."""
    return ArtifactError(
        f"{path} is not a TFLite file ({type(error).__name__})",
        allowed="an artifact that `convnext-edge export` wrote",
        do="Export it again",
    )
