"""Checkpoint files become named tensors, safely.

In: one weights file, or the shards of one checkpoint, from anywhere. Out: the tensors under the
names the file gives them, out of what wraps them, or one line that says why not. Nothing in a file
is ever executed: a pickle is surveyed by its opcodes, then read with `weights_only=True`. No tensor
can be larger than what its file holds.
"""

from __future__ import annotations

import argparse
import math
import struct
import warnings
import zipfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.pickled import CodeFoundError, FalseClaimError, survey

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from pipeline.records import Weights


WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "network")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema")
WRAPPING = 8
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.")
"""Of wrappers in code: data parallel, Lightning, compile. No dialect's own names begin so."""

BOOKKEEPING = frozenset({"n_averaged"})
SHARING = 4
"""How many names may stand for the same bytes: a network and its average, tied layers; each name
becomes a tensor of its own, so more would be a way to fill memory."""
NETWORK_SHARE = 0.9
MAX_FILE_BYTES = 64 * 2**30
MAX_PICKLE_BYTES = 64 * 2**20
MESSAGE_LENGTH = 120

_ZIP_START = b"PK\x03\x04"
_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LEGACY_MAGIC, _LEGACY_PICKLES = 0x1950A86A20F9469CFC6C, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """What a checkpoint's files hold.

    Attributes:
        tensors: Raw names to tensors as they are stored, out of wrappers and prefixes.
        metadata: Of a safetensors file.
        wrapper: Where the tensors were found, in words; empty where nothing wraps them.
        ema: Whether they are a moving average of the weights.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    wrapper: str
    ema: bool


@dataclass(frozen=True, slots=True)
class _Found:
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    keys: tuple[str, ...]
    ema: bool


def read_tensors(files: Sequence[Path], weights: Weights = "auto") -> TensorFile:
    """Read every named tensor of a checkpoint.

    Args:
        files: One weights file, or all shards; .safetensors, anything else is a pickle.
        weights: `ema` takes the moving average and requires one, `model` takes the plain weights,
            `auto` the average where there is one.

    Returns:
        The tensors, as mapped from the files where the format allows it, and where they were found.

    Raises:
        CheckpointError: A file is missing, damaged or too large, would run code, claims more than
            it holds, or has no dense tensors of the kind asked for; or two shards hold the same
            tensor.
    """
    found = [_read(path, weights) for path in files]
    tensors: dict[str, Tensor] = {}
    homes: dict[str, Path] = {}
    for path, part in zip(files, found, strict=True):
        for name, tensor in part.tensors.items():
            if name in homes:
                raise CheckpointError(
                    f"{path} holds {name}, and so does {homes[name]}",
                    allowed="each tensor in one shard",
                    do="Download the shards again, all of one revision",
                )
            homes[name], tensors[name] = path, tensor
    tensors, without = _without_prefixes(tensors, files[0])
    return TensorFile(
        tensors=tensors,
        metadata=found[0].metadata,
        wrapper=", ".join(filter(None, (" > ".join(found[0].keys), without))),
        ema=found[0].ema,
    )


def damaged(path: Path, error: BaseException) -> CheckpointError:
    """Return the error that says that a file is truncated or damaged, and how it showed."""
    first = (str(error).strip().splitlines() or [""])[0][:MESSAGE_LENGTH]
    # torch opens with advice on its own option, which is no help to anyone here.
    reason = type(error).__name__ if not first or first.startswith("Weights only") else first
    return CheckpointError(
        f"{path} cannot be read, {path.stat().st_size} bytes, truncated or damaged ({reason})",
        allowed="a whole file written by torch.save or safetensors",
        do="Download or save it again and compare its size and sha256",
    )


# --- one file -------------------------------------------------------------------------------------


def _read(path: Path, weights: Weights) -> _Found:
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no such checkpoint: {path}",
            allowed="a file that exists",
            do="Give the path of a checkpoint file",
        ) from error
    if size > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes",
            allowed=f"at most {MAX_FILE_BYTES}",
            do="Save the weights alone, without the state of the optimizer",
        )
    metadata: dict[str, str] = {}
    content: object
    if path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path)
    else:
        content = _read_pickle(path, size)
    tensors, keys, ema = _unwrap(content, path, weights)
    return _Found(_checked(tensors, path, size), metadata, keys, ema)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except Exception as error:  # the library raises its own, and torch's for types torch lacks
        raise damaged(path, error) from error


def _read_pickle(path: Path, size: int) -> object:
    try:
        zipped = _survey(path, size)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what torch warns of, the errors below say
            # Mapped, a storage is a slice of the file: none can reach beyond it.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CodeFoundError as error:
        raise CheckpointError(
            f"{path} asks to run code while it is read ({error}): refused",
            allowed="a file with nothing but tensors in it",
            do="Save it again with torch.save(model.state_dict()), where you trust it",
        ) from error
    except FalseClaimError as error:
        raise _claims(path, str(error)) from error
    except Exception as error:  # both unpicklers raise whatever a damaged file leads them to
        raise damaged(path, error) from error


def _survey(path: Path, size: int) -> bool:
    """Check the pickles of a file; return whether it is torch's zip, else it is the older form."""
    with path.open("rb") as file:
        zipped = file.read(len(_ZIP_START)) == _ZIP_START
        file.seek(0)
        if zipped:
            _survey_zip(file, size)
        else:
            # The magic number first: another pickle must show what it calls, not what it lacks.
            (magic,) = survey(file, size)
            if magic != _LEGACY_MAGIC:
                raise ValueError("not written by torch.save")
            survey(file, size, pickles=_LEGACY_PICKLES - 1)
    return zipped


def _survey_zip(file: IO[bytes], size: int) -> None:
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        stored = all(
            entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
            for entry in entries
        )
        if not stored or unpacked > size:
            raise FalseClaimError(f"compressed records, {unpacked} bytes in a file of {size}")
        names = {entry.filename.lower() for entry in entries}
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(names) != len(entries) or len(pickles) != 1:
            raise ValueError("not one data.pkl and one record of each name")
        if any(name.endswith("/constants.pkl") for name in names):
            raise CodeFoundError("TorchScript")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise FalseClaimError(f"a pickle of {pickles[0].file_size} bytes")
        with archive.open(pickles[0]) as pickle:
            survey(pickle, size)


def _check_directory(file: IO[bytes], size: int) -> None:
    """Check that the archive's directory lies where torch.save writes it.

    Elsewhere, Python's reader and torch's could each find another one, and what is checked here
    would not be what is read.
    """
    end = size - _END.size
    file.seek(max(end, 0))
    signature, *_, length, offset, comment = _END.unpack(file.read())
    file.seek(max(end - _LOCATOR.size, 0))
    mark, _, end64, _ = _LOCATOR.unpack(file.read(_LOCATOR.size))
    if mark == b"PK\x06\x07":
        end -= _LOCATOR.size + _END64.size
        file.seek(end64)
        *_, length, offset = _END64.unpack(file.read(_END64.size))
    if signature != b"PK\x05\x06" or comment or offset + length != end:
        raise ValueError("its directory is not at its end")
    if mark == b"PK\x06\x07" and end64 != end:
        raise ValueError("its directory is not at its end")
    if length > MAX_PICKLE_BYTES:
        raise FalseClaimError(f"a directory of {length} bytes")
    file.seek(0)


# --- what wraps the tensors -----------------------------------------------------------------------


def _unwrap(
    content: object, path: Path, weights: Weights
) -> tuple[dict[str, Tensor], tuple[str, ...], bool]:
    """Return the tensors, the keys that led to them and whether they are an average."""
    keys: list[str] = []
    ema = False
    held: Collection[object] = content if isinstance(content, dict) else ()
    for _ in range(WRAPPING):  # a pickle can hold itself
        if not isinstance(content, dict):
            break
        wanted = WRAPPERS if weights == "model" else (*EMA_WRAPPERS, *WRAPPERS)
        key = next((k for k in wanted if _leads_to_tensors(content.get(k))), None)
        if key is None:
            break
        keys.append(key)
        ema = ema or key in EMA_WRAPPERS
        content = content[key]
    named = isinstance(content, dict) and any(isinstance(v, Tensor) for v in content.values())
    if weights == "ema" and not ema:
        raise _lacks(path, held, "no moving average of the weights", f"one of {_words(True)}")
    if weights == "model" and not named and any(key in held for key in EMA_WRAPPERS):
        raise _lacks(path, held, "no plain weights", f"one of {_words(False)}")
    if not isinstance(content, dict) or not named:
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} without named tensors",
            allowed=f"a state dict, or a dict with one under {_words(False)} or {_words(True)}",
            do="Save model.state_dict()",
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors, tuple(keys), ema


def _leads_to_tensors(content: object, depth: int = 2) -> bool:
    if not isinstance(content, dict):
        return False
    if any(isinstance(value, Tensor) for value in content.values()):
        return True
    inner = (content.get(key) for key in (*EMA_WRAPPERS, *WRAPPERS))
    return depth > 0 and any(_leads_to_tensors(value, depth - 1) for value in inner)


def _lacks(path: Path, held: Collection[object], what: str, allowed: str) -> CheckpointError:
    names = ", ".join(str(name)[:40] for name in list(held)[:6]) or "nothing by name"
    return CheckpointError(
        f"{path} holds {what}: it has {names}",
        allowed=allowed,
        do="Ask for the other weights, or leave the choice to what is there",
    )


def _words(ema: bool) -> str:  # noqa: FBT001 - which of two lists
    return ", ".join(f'"{name}"' for name in (EMA_WRAPPERS if ema else WRAPPERS))


def _without_prefixes(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], str]:
    """Strip what wrappers in code put before every name; return also what was stripped."""
    stripped, left_out = "", 0
    while found := next((p for p in PREFIXES if _is_on_most(p, tensors)), None):
        inside = {name for name in tensors if name.startswith(found)}
        outside = tensors.keys() - inside - BOOKKEEPING
        for name in sorted(outside):
            # A layer beside the network would change what it computes; a metric or a loss not.
            if tensors[name].is_floating_point() and tensors[name].ndim > 1:
                raise CheckpointError(
                    f"{path} holds {name} {tuple(tensors[name].shape)} beside the {len(inside)}"
                    f" tensors of {stripped}{found}",
                    allowed="one network, and beside it at most losses and metrics",
                    do="Save the network's own state_dict()",
                )
        left_out += len(outside)
        tensors = {n.removeprefix(found): t for n, t in tensors.items() if n in inside}
        stripped += found
    if not stripped:
        return tensors, ""
    return tensors, f"without {stripped}" + (f" and {left_out} others" if left_out else "")


def _is_on_most(prefix: str, names: Collection[str]) -> bool:
    counted = [name for name in names if name not in BOOKKEEPING]
    inside = sum(name.startswith(prefix) and name != prefix for name in counted)
    return inside > 0 and inside >= NETWORK_SHARE * len(counted)


# --- what the tensors claim -----------------------------------------------------------------------


def _checked(tensors: dict[str, Tensor], path: Path, size: int) -> dict[str, Tensor]:
    """Return plain tensors, after checking that the file holds as much as they show."""
    shown = 0
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is a {'meta' if tensor.is_meta else tensor.layout} tensor",
                allowed="dense tensors with values",
                do="Save it again with the weights loaded and dense",
            )
        nbytes = math.prod(tensor.shape) * tensor.element_size()
        shown += nbytes
        if nbytes > tensor.untyped_storage().nbytes() or shown > SHARING * size:
            raise _claims(path, f"{name} of shape {tuple(tensor.shape)}")
    # Out of the class's own method: a pickle can give a tensor attributes of any name.
    return {name: Tensor.detach(tensor) for name, tensor in tensors.items()}


def _claims(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} claims more than it holds ({what}): refused",
        allowed="stored tensors with every element of theirs in the file",
        do="Save it again with torch.save or safetensors, its tensors contiguous",
    )
