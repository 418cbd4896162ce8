"""An .mlpackage as plain values: the operations of its mlprogram, constants read from their file.

In: the folder, through coremltools' protobuf. Out: a `Program` of numpy constants and names. The
layout of weight.bin is coremltools' StorageFormat: at a constant's offset lies a header of 64 bytes
(sentinel, type, size in bytes, place of the data), all little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

FUNCTION = "main"
MODEL_FOLDER = ("Data", "com.apple.CoreML")
MODEL_PATH = "@model_path/"
SENTINEL = 0xDEADBEEF
HEADER = struct.Struct("<IIQQ")
DTYPES: dict[str, Any] = {
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "BOOL": np.bool_,
    "STRING": np.str_,
}
"""The types that are read, by their names in MIL's protobuf."""
FIELDS = {"INT32": "ints", "FLOAT32": "floats", "BOOL": "bools", "STRING": "strings"}
"""Where an immediate value of a type lies; the others are `bytes`."""


class Reference(NamedTuple):
    """The name of a value that an operation before made."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation: its kind, its arguments by MIL's names, and the one value that it makes."""

    kind: str
    arguments: Mapping[str, Reference | NDArray[Any]]
    output: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What goes in: its type, and the least and the largest size of each of its dimensions."""

    dtype: str
    sizes: tuple[tuple[int, int], ...]

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Return whether an array of this shape may go in."""
        fits = (low <= n <= high for (low, high), n in zip(self.sizes, shape, strict=False))
        return len(shape) == len(self.sizes) and all(fits)

    def __str__(self) -> str:
        sizes = (str(low) if low == high else f"{low} to {high}" for low, high in self.sizes)
        return f"[{', '.join(sizes)}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What goes in by name, the operations in order, and the names of what comes out."""

    inputs: Mapping[str, Input]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


def read_spec(path: Path) -> Any:
    """Return the protobuf of an .mlpackage.

    Raises:
        ArtifactError: It is none.
    """
    import coremltools as ct

    try:
        return ct.utils.load_spec(str(path))
    except Exception as error:  # coremltools and protobuf raise what they please
        raise ArtifactError(
            f"{path} is not an .mlpackage ({type(error).__name__})",
            allowed="an artifact that `convnext-edge export` wrote",
            do="Export it again",
        ) from error


def main_block(path: Path, spec: Any) -> tuple[Any, Any]:
    """Return the main function of a protobuf, and the block of it that its opset runs.

    Raises:
        ArtifactError: There is none.
    """
    function = spec.mlProgram.functions[FUNCTION]
    if function.opset not in function.block_specializations:
        raise _unreadable(path, f"has no mlprogram with a function {FUNCTION}")
    return function, function.block_specializations[function.opset]


def read_program(path: Path) -> Program:
    """Read an .mlpackage.

    Raises:
        ArtifactError: It is damaged, or holds what is not read here: the message names it.
    """
    spec, stored = read_spec(path), _Stored(path)
    function, block = main_block(path, spec)
    sizes = {item.name: _sizes(item.type.multiArrayType) for item in spec.description.input}
    return Program(
        inputs={
            item.name: Input(dtype=stored.dtype(item.type), sizes=sizes[item.name])
            for item in function.inputs
        },
        operations=tuple(_operation(op, stored) for op in block.operations),
        outputs=tuple(block.outputs),
    )


def _sizes(array: Any) -> tuple[tuple[int, int], ...]:
    if array.HasField("shapeRange"):
        return tuple((one.lowerBound, one.upperBound) for one in array.shapeRange.sizeRanges)
    return tuple((size, size) for size in array.shape)


def _operation(op: Any, stored: _Stored) -> Operation:
    if op.blocks or len(op.outputs) != 1:
        raise stored.error(f"has an operation {op.type} with blocks or several outputs")
    arguments: dict[str, Reference | NDArray[Any]] = {
        name: stored.value(value) for name, value in op.attributes.items() if name != "name"
    }
    for name, given in op.inputs.items():
        if len(given.arguments) != 1:
            raise stored.error(f"gives {op.type} several values for {name}")
        (one,) = given.arguments
        named = one.WhichOneof("binding") == "name"
        arguments[name] = Reference(one.name) if named else stored.value(one.value)
    (made,) = op.outputs
    dtype = stored.dtype(made.type)
    return Operation(kind=op.type, arguments=arguments, output=made.name, dtype=dtype)


class _Stored:
    """Reads constants, immediate ones and those in files beside the model."""

    def __init__(self, path: Path) -> None:
        self.folder = path.joinpath(*MODEL_FOLDER).resolve()
        self.error: Callable[[str], ArtifactError] = partial(_unreadable, path)
        self.files: dict[str, bytes] = {}

    def dtype(self, kind: Any) -> str:
        """Return the name of a tensor's type."""
        from coremltools.proto import MIL_pb2

        name = str(MIL_pb2.DataType.Name(kind.tensorType.dataType))
        if kind.WhichOneof("type") != "tensorType" or name not in DTYPES:
            raise self.error(f"has a value of type {name}")
        return name

    def value(self, value: Any) -> NDArray[Any]:
        """Return a constant."""
        name = self.dtype(value.type)
        shape = tuple(d.constant.size for d in value.type.tensorType.dimensions)
        if value.WhichOneof("value") == "blobFileValue":
            data: Any = self._in_file(value.blobFileValue, prod(shape), DTYPES[name])
        else:
            tensor = value.immediateValue.tensor
            field = FIELDS.get(name, "bytes")
            data = getattr(tensor, field).values
            data = np.frombuffer(data, DTYPES[name]) if field == "bytes" else list(data)
        found = np.asarray(data, DTYPES[name])
        if found.size != prod(shape):
            raise self.error(f"has a constant of {found.size} values for the shape {list(shape)}")
        return found.reshape(shape)

    def _in_file(self, stored: Any, count: int, dtype: type[np.generic]) -> NDArray[Any]:
        data, size = self._bytes(stored.fileName), count * np.dtype(dtype).itemsize
        whole = stored.offset + HEADER.size <= len(data)
        found = HEADER.unpack_from(data, stored.offset) if whole else (0, 0, 0, 0)
        sentinel, _, length, start = found
        if sentinel != SENTINEL or length != size or start + length > len(data):
            raise self.error(f"has no constant of {size} bytes at {stored.offset} of its weights")
        return np.frombuffer(data, dtype, count, start)

    def _bytes(self, name: str) -> bytes:
        if name not in self.files:
            place = (self.folder / name.removeprefix(MODEL_PATH)).resolve()
            if not place.is_relative_to(self.folder) or not place.is_file():
                raise self.error(f"keeps weights in {name}, which is no file of its own")
            self.files[name] = place.read_bytes()
        return self.files[name]


def _unreadable(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path} {what}",
        allowed="an mlprogram as `convnext-edge export` writes it",
        do="Export it again",
    )
