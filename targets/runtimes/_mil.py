"""An interpreter of the MIL operations that a ConvNeXt's mlprogram has, in torch.

In: a `Program`. Out: what it computes. The meaning of an operation is that of Apple's reference of
MIL operations (https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html,
opset iOS17): a function here is called as the operation is, takes its parameters by their names and
has its defaults. What is not here is an error that names it.

Every operation computes in float32. Where the program says that its result is float16 the result is
rounded to it: that is a float16 kernel that adds up in float32. CoreML does not say how it adds up,
and its units differ, so on float16 a Mac may differ by a last digit here and there.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from pipeline.errors import ArtifactError
from targets.runtimes._mil_file import Reference

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from targets.runtimes._mil_file import Operation, Program

PLANE = 2
"""Dimensions over which a convolution slides here."""
INTEGERS = {"int8": torch.int8, "uint8": torch.uint8}


# --- the operations -------------------------------------------------------------------------------


def const(*, val: Any) -> Any:
    return val


def identity(*, x: Tensor) -> Tensor:
    return x


def cast(*, x: Tensor, dtype: str) -> Tensor:
    if dtype not in {"fp16", "fp32"}:
        raise _not_interpreted(f"cast to {dtype}")
    return x


def transpose(*, x: Tensor, perm: Sequence[int]) -> Tensor:
    return x.permute(*perm)


def add(*, x: Tensor, y: Tensor) -> Tensor:
    return x + y


def sub(*, x: Tensor, y: Tensor) -> Tensor:
    return x - y


def mul(*, x: Tensor, y: Tensor) -> Tensor:
    return x * y


def real_div(*, x: Tensor, y: Tensor) -> Tensor:
    return x / y


def gelu(*, x: Tensor, mode: str = "EXACT") -> Tensor:
    match mode:
        case "EXACT":
            return functional.gelu(x)
        case "TANH_APPROXIMATION":
            return functional.gelu(x, approximate="tanh")
        case "SIGMOID_APPROXIMATION":
            return x * torch.sigmoid(1.702 * x)
    raise _not_interpreted(f"gelu with mode {mode}")


def reduce_mean(*, x: Tensor, axes: Sequence[int], keep_dims: bool = False) -> Tensor:
    return x.mean(dim=tuple(axes), keepdim=keep_dims)


def reduce_l2_norm(*, x: Tensor, axes: Sequence[int], keep_dims: bool = False) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=tuple(axes), keepdim=keep_dims)
    return norm


def layer_norm(
    *,
    x: Tensor,
    axes: Sequence[int],
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    last = tuple(range(-len(axes), 0))
    shape = [x.shape[axis] for axis in axes]
    y = functional.layer_norm(x.movedim(tuple(axes), last), shape, gamma, beta, float(epsilon))
    return y.movedim(last, tuple(axes))


def linear(*, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


def conv(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Sequence[int] = (1, 1),
    pad_type: str = "valid",
    pad: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    if weight.ndim != PLANE + 2:
        raise _not_interpreted(f"conv with a weight of {weight.ndim} dimensions")
    if pad_type not in {"valid", "custom"}:
        raise _not_interpreted(f"conv with pad_type {pad_type}")
    if pad_type == "custom" and any(pad):
        top, bottom, left, right = pad
        x = functional.pad(x, (left, right, top, bottom))
    return functional.conv2d(x, weight, bias, strides, 0, dilations, groups)


def quantize(
    *,
    input: Tensor,  # noqa: A002 - MIL's name
    scale: Tensor,
    zero_point: Tensor | None = None,
    output_dtype: str,
    axis: int | None = None,
) -> Tensor:
    if output_dtype not in INTEGERS:
        raise _not_interpreted(f"quantize with output_dtype {output_dtype}")
    dtype = INTEGERS[output_dtype]
    steps = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        steps = steps + _along(zero_point, input, axis)
    limits = torch.iinfo(dtype)
    return steps.clamp(limits.min, limits.max).to(dtype)


def dequantize(
    *,
    input: Tensor,  # noqa: A002 - MIL's name
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    steps = input.float()
    if zero_point is not None:
        steps = steps - _along(zero_point, input, axis)
    return _along(scale, input, axis) * steps


def constexpr_affine_dequantize(
    *, quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    return dequantize(input=quantized_data, scale=scale, zero_point=zero_point, axis=axis)


def _along(values: Tensor, of: Tensor, axis: int | None) -> Tensor:
    """Lay a vector of parameters along an axis of a tensor; a scalar is for all of it."""
    if not values.ndim:
        return values.float()
    if axis is None:
        raise _not_interpreted("quantize or dequantize with a vector and no axis")
    shape = [1] * of.ndim
    shape[axis] = -1
    return values.float().reshape(shape)


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        const, identity, cast, transpose, add, sub, mul, real_div, gelu, reduce_mean,
        reduce_l2_norm, layer_norm, linear, conv, quantize, dequantize, constexpr_affine_dequantize,
    )
}  # fmt: skip
"""What this interpreter knows, by MIL's names."""
PARAMETERS = {kind: inspect.signature(function).parameters for kind, function in OPERATIONS.items()}


# --- the program ----------------------------------------------------------------------------------


class Interpreter:
    """Runs a program; constants, and what is made of constants alone, are made once.

    Args:
        program: From `targets.runtimes._mil_file.read_program`.

    Raises:
        ArtifactError: It has an operation, a parameter or a mode that is not known here.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants: dict[str, Any] = {}
        self.steps: list[Operation] = []
        made = set(program.inputs)
        for op in program.operations:
            _check_known(op, made)
            made.add(op.output)
            if any(isinstance(given, Reference) for given in op.arguments.values()):
                self.steps.append(op)
            else:
                self.constants[op.output] = _run(op, {})

    def __call__(self, **inputs: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run once.

        Args:
            inputs: float32, by the program's names.

        Returns:
            The program's outputs by name; float16 ones are float32 arrays of float16 values.

        Raises:
            ArtifactError: An input has another shape than the program's.
        """
        values = dict(self.constants)
        for name, wanted in self.program.inputs.items():
            if not wanted.takes(inputs[name].shape):
                raise ArtifactError(
                    f"{name} has the shape {list(inputs[name].shape)}",
                    allowed=f"{wanted}",
                    do="Give it the batch that the artifact was exported for",
                )
            values[name] = _rounded(torch.from_numpy(inputs[name]), wanted.dtype)
        with torch.inference_mode():
            for op in self.steps:
                values[op.output] = _run(op, values)
        return {name: values[name].numpy() for name in self.program.outputs}


def _check_known(op: Operation, made: Container[str]) -> None:
    if op.kind not in OPERATIONS:
        raise _not_interpreted(f"the operation {op.kind} ({op.output})")
    known = PARAMETERS[op.kind]
    for name, given in op.arguments.items():
        if name not in known:
            raise _not_interpreted(f"the parameter {name} of {op.kind} ({op.output})")
        if isinstance(given, Reference) and given.name not in made:
            raise _not_interpreted(f"{given.name}, which {op.kind} ({op.output}) reads")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in op.arguments:
            raise _not_interpreted(f"{op.kind} without its {name} ({op.output})")


def _run(op: Operation, values: Mapping[str, Any]) -> Any:
    arguments = {
        name: values[given.name] if isinstance(given, Reference) else _plain(given)
        for name, given in op.arguments.items()
    }
    return _rounded(OPERATIONS[op.kind](**arguments), op.dtype)


def _rounded(made: Any, dtype: str) -> Any:
    return made.half().float() if dtype == "FLOAT16" else made


def _plain(constant: NDArray[Any]) -> Any:
    """Return a constant as an operation takes it: data as a tensor, parameters as Python values."""
    if constant.dtype.kind == "f":
        return torch.from_numpy(constant.astype(np.float32))
    if constant.dtype in (np.int8, np.uint8):
        return torch.from_numpy(constant.copy())
    return constant.tolist()


def _not_interpreted(what: str) -> ArtifactError:
    return ArtifactError(
        f"this project's interpreter of CoreML programs does not know {what}",
        allowed=", ".join(sorted(OPERATIONS)) + ", with the parameters of opset iOS17",
        do="Run the artifact on a Mac, or export it with convnext-edge",
    )
