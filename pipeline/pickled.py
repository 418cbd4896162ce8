"""What reading a pickle would do, found by reading its opcodes without doing any of it.

In: the bytes of a pickle from anywhere. Out: nothing where it would only build plain values and
tensors that fit their file; else the name that it would call, or what it claims falsely. torch's
own restricted unpickler reads the file afterwards; it stops code, but not a few bytes that ask for
all of the memory, a key whose hash takes for ever, or a tensor beyond its storage.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_OPCODES = 2_000_000  # a training checkpoint of the largest network has a tenth of them
MAX_RANK = 64
MAX_INTEGER = 2**63

_STORAGES = {
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage", "storage.UntypedStorage"), 1),
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QUInt2x4Storage", "QUInt4x2Storage"), 1),
    **dict.fromkeys(("BFloat16Storage", "HalfStorage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("ComplexFloatStorage", "DoubleStorage", "LongStorage"), 8),
    **dict.fromkeys(("ComplexDoubleStorage",), 16),
}
STORAGE_ITEM_BYTES = {f"torch.{name}": size for name, size in _STORAGES.items()}
_DTYPES = {str(item) for item in vars(torch).values() if isinstance(item, torch.dtype)}
_REBUILDERS = {
    f"torch._utils.{name}"
    for name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_qtensor",
    )
}
_DICTS = {"collections.OrderedDict", "collections.Counter"}
ALLOWED = (
    STORAGE_ITEM_BYTES.keys()
    | _DTYPES
    | _REBUILDERS
    | _DICTS
    | {
        "argparse.Namespace",
        "_codecs.encode",
        "torch.Size",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.per_channel_affine",
        "torch.per_tensor_affine",
        "torch.serialization._get_layout",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_sparse_tensor",
    }
)
"""Less than torch allows: `bytearray` would take any number of bytes from the machine."""

_PLAIN = {"PROTO", "STOP"}
_LITERALS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "LONG1", "SHORT_BINSTRING"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_DICT": "dict", "EMPTY_LIST": "list", "EMPTY_SET": "set"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STORAGE_ID, _LEGACY_STORAGE_ID = 5, 6


class CodeFoundError(ValueError):
    """A pickle would call something; the message is its name."""


class FalseClaimError(ValueError):
    """A pickle claims what its file does not hold; the message says what."""


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    nbytes: int
    item: int


@dataclass(frozen=True, slots=True)
class _Made:
    """Anything else, by what made it; never looked into."""

    by: str


def survey(file: IO[bytes], room: int, *, pickles: int = 1) -> list[Any]:
    """Check one or more pickles that follow each other in a file.

    Args:
        file: Stands at the first one; stands behind the last one afterwards.
        room: Bytes that the storages of all tensors may take together.
        pickles: How many there are.

    Returns:
        What each would give, where that is a plain value; a placeholder otherwise.

    Raises:
        CodeFoundError: One would call what is not in `ALLOWED`.
        FalseClaimError: Its tensors claim more than `room`, or more than their storages hold.
        ValueError: It is damaged, or uses what torch.save does not write.
    """
    claims: dict[str, int] = {}
    results = [_Machine(claims, room).run(file) for _ in range(pickles)]
    if sum(claims.values()) > room:
        raise FalseClaimError(f"tensors of {sum(claims.values())} bytes in a file of {room}")
    return results


def _operations(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield opcodes with their arguments; stop at the first that leads to forbidden code."""
    strings: list[str] = ["", ""]
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count >= MAX_OPCODES:
            raise FalseClaimError(f"more than {MAX_OPCODES} pickle instructions")
        if isinstance(argument, str):
            strings = [strings[-1], argument]
        if opcode.name in {"GLOBAL", "INST", "STACK_GLOBAL"}:
            named = ".".join(strings) if opcode.name == "STACK_GLOBAL" else str(argument)
            name = named.replace(" ", ".").replace("__builtin__.", "builtins.")
            if name not in ALLOWED:
                raise CodeFoundError(name)
            yield opcode.name, name
        else:
            yield opcode.name, argument


class _Machine:
    """Runs a pickle's opcodes over placeholders; only those that torch's own unpickler knows."""

    def __init__(self, claims: dict[str, int], room: int) -> None:
        self.claims = claims
        self.room = room
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: IO[bytes]) -> object:
        """Return what the pickle would give."""
        pending: ValueError | None = None
        for name, argument in _operations(file):
            if pending is None:
                try:
                    self._step(name, argument)
                except (IndexError, KeyError) as error:
                    pending = ValueError(f"{name} finds nothing to work on")
                    pending.__cause__ = error
                except FalseClaimError:
                    raise
                except ValueError as error:
                    pending = error  # read on: code further down is the graver finding
        if pending is not None:
            raise pending
        return self.stack[-1] if self.stack else None

    def _step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_Made(_EMPTY[name]))
        elif name == "GLOBAL":
            self.stack.append(_Global(argument))
        elif name in {"BINPUT", "LONG_BINPUT"}:
            self.memo[argument] = self.stack[-1]
        elif name in {"BINGET", "LONG_BINGET"}:
            self.stack.append(self.memo[argument])
        else:
            self._combine(name)

    def _combine(self, name: str) -> None:
        stack = self.stack
        if name == "MARK":
            self.marks.append(len(stack))
        elif name in {"TUPLE", *_TUPLES}:
            stack.append(tuple(self._take(_TUPLES.get(name))))
        elif name in {"APPEND", "APPENDS"}:
            self._take(1 if name == "APPEND" else None)
        elif name in {"SETITEM", "SETITEMS"}:
            self._keys(self._take(2 if name == "SETITEM" else None)[::2])
        elif name in {"REDUCE", "NEWOBJ"}:
            function, arguments = self._take(2)
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            (state,) = self._take(1)
            self._build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in _PLAIN:
            raise ValueError(f"instruction {name}")

    def _take(self, count: int | None) -> list[Any]:
        """Pop `count` items, or all behind the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < 0 or start > len(self.stack):
            raise IndexError
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _keys(self, keys: list[Any]) -> None:
        # The hash of nested tuples can take for ever.
        for key in keys:
            if key is not None and not isinstance(key, str | int | float | bytes):
                raise FalseClaimError("a dict with keys that are no names")

    def _call(self, function: Any, arguments: Any) -> object:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no function")  # noqa: TRY004 - the file's fault
        name = function.name
        fits = True
        if name in _REBUILDERS:
            _check_tensor(arguments, name)
        elif name == "collections.Counter":
            fits = all(argument == _Made("dict") for argument in arguments)
        elif name in {"collections.OrderedDict", "argparse.Namespace"}:
            fits = arguments == ()
        elif name == "_codecs.encode":
            fits = arguments[1:] == ("latin1",)
        elif name in STORAGE_ITEM_BYTES:
            fits = False
        if not fits:
            raise FalseClaimError(f"{name} with arguments that torch.save does not write")
        return _Made(name)

    def _build(self, target: Any, state: Any) -> None:
        kinds = {"dict", *_DICTS}
        holds = isinstance(target, _Made) and target.by in {*_DICTS, "argparse.Namespace"}
        if not (holds and isinstance(state, _Made) and state.by in kinds):
            raise ValueError("an object with a state that torch.save does not write")

    def _storage(self, identity: Any) -> _Storage:
        if (
            not isinstance(identity, tuple)
            or len(identity) not in {_STORAGE_ID, _LEGACY_STORAGE_ID}
            or identity[0] != "storage"
            or (len(identity) > _STORAGE_ID and identity[_STORAGE_ID] is not None)
        ):
            raise ValueError("a reference to what is no storage")
        kind, key, _, count = identity[1:_STORAGE_ID]
        item = STORAGE_ITEM_BYTES.get(kind.name) if isinstance(kind, _Global) else None
        if item is None or not isinstance(key, str) or not _natural(count):
            raise ValueError("a storage without a type, a name or a size")
        nbytes = count * item
        self.claims[key] = max(self.claims.get(key, 0), nbytes)
        if nbytes > self.room:
            raise FalseClaimError(f"a storage of {nbytes} bytes in a file of {self.room}")
        return _Storage(nbytes, item)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_INTEGER


def _check_tensor(arguments: tuple[Any, ...], rebuilder: str) -> None:
    """Refuse a tensor that has more elements, or reaches further, than its storage."""
    storage, offset, size, stride = arguments[:4] if len(arguments) > 3 else (None,) * 4  # noqa: PLR2004
    plain = all(isinstance(x, tuple) and len(x) <= MAX_RANK for x in (size, stride))
    if not isinstance(storage, _Storage) or not plain or len(size) != len(stride):
        raise ValueError("a tensor without a storage or a shape")
    if not all(map(_natural, (offset, *size, *stride))):
        raise ValueError("a tensor whose shape is not in whole numbers")
    item = storage.item
    if rebuilder.endswith("_v3"):
        dtype = arguments[6] if len(arguments) > 6 else None  # noqa: PLR2004
        if not isinstance(dtype, _Global) or dtype.name not in _DTYPES:
            raise ValueError("a tensor without a type")
        item = getattr(torch, dtype.name.removeprefix("torch.")).itemsize
    count = math.prod(size)
    reach = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (offset + max(count, reach)) * item > storage.nbytes:
        raise FalseClaimError(
            f"a tensor of shape {size} and strides {stride} over {storage.nbytes} bytes"
        )
