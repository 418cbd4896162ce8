"""A checkpoint file becomes named tensors, safely.

In: a .pth/.pt/.bin or .safetensors file from anywhere. Out: its tensors, or one line that says why
not. A pickle is read with `weights_only=True`: nothing in it is ever executed.
"""

from __future__ import annotations

import pickletools
import re
import warnings
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
WRAPPERS = ("model", "state_dict")
WRAPPING = 8
CALLING_OPCODES = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "REDUCE"})
MESSAGE_LENGTH = 120


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every named tensor of a checkpoint file.

    Args:
        path: A .pth, .pt, .bin or .safetensors file.

    Returns:
        The tensors under the names the file gives them, out of whatever wraps them, and the
        metadata of a safetensors file.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind, or would run code.
    """
    if not path.exists():
        got = f"no such checkpoint: {path}"
    elif path.is_dir():
        got = f"{path} is a folder"
    elif path.suffix not in SUFFIXES:
        got = f"{path} ends in {path.suffix or 'nothing'}"
    elif path.suffix == ".safetensors":
        return _read_safetensors(path)
    else:
        return _unwrap(_read_pickle(path), path), {}
    raise CheckpointError(
        got,
        allowed=f"a file ending in {', '.join(SUFFIXES)}",
        do="Give --checkpoint the path of a checkpoint file",
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of, the errors below say
            return cast("object", torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        if called := _called(path, error):
            raise CheckpointError(
                f"{path} asks to run code while it is read ({called}): refused",
                allowed="a file with nothing but tensors in it",
                do="Save it again with torch.save(model.state_dict()), where you trust it",
            ) from error
        raise damaged(path, error) from error


def _called(path: Path, error: Exception) -> str | None:
    """Return what a refused pickle wanted called; None where it is merely damaged."""
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return match[1]
    try:
        with path.open("rb") as file:
            # Reads opcodes one by one and executes none.
            names = (opcode.name for opcode, _, _ in pickletools.genops(file))
            return next((name for name in names if name in CALLING_OPCODES), None)
    except (ValueError, IndexError, OSError, UnicodeError):
        return None


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Return the error that says that a file is truncated or damaged, and how it showed."""
    first = (str(error).strip().splitlines() or [""])[0][:MESSAGE_LENGTH]
    # torch opens with advice on its own option, which is no help to anyone here.
    reason = type(error).__name__ if not first or first.startswith("Weights only") else first
    return CheckpointError(
        f"{path} cannot be read, {path.stat().st_size} bytes, truncated or damaged ({reason})",
        allowed="a whole file written by torch.save or safetensors",
        do="Download or save it again and compare its size and sha256",
    )


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    for _ in range(WRAPPING):  # a pickle can hold itself
        if not isinstance(content, dict):
            break
        inner = next((content[k] for k in WRAPPERS if isinstance(content.get(k), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} without named tensors",
            allowed='a state dict, or a dict with one under "model" or "state_dict"',
            do="Save model.state_dict()",
        )
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
