"""The interpreter of CoreML programs: each operation against numpy, on programs made with MIL."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import get_new_symbol, types
from numpy.typing import NDArray

from pipeline.errors import ArtifactError
from targets.runtimes._mil import Interpreter
from targets.runtimes._mil_file import Reference, read_program

RNG = np.random.default_rng(5)
X = RNG.normal(size=(2, 3, 6, 5)).astype(np.float32)
mb: Any = Builder
PRECISION = {"FLOAT32": ct.precision.FLOAT32, "FLOAT16": ct.precision.FLOAT16}
Array = NDArray[Any]


def saved(
    body: Callable[[Any], Any],
    folder: Path,
    precision: str = "FLOAT32",
    shape: tuple[Any, ...] = X.shape,
) -> Path:
    """Save a program of one input `x` and one output `y`, untouched by coremltools' passes."""
    inputs = [mb.TensorSpec(shape=shape, dtype=types.fp32)]
    build = mb.program(input_specs=inputs, opset_version=ct.target.iOS17)
    model = ct.convert(
        build(lambda x: mb.identity(x=body(x), name="y")),
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=PRECISION[precision],
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY if precision == "FLOAT32" else ct.PassPipeline.DEFAULT,
    )
    path = folder / "model.mlpackage"
    model.save(str(path))
    return path


def run(body: Callable[[Any], Any], folder: Path, precision: str = "FLOAT32") -> Array:
    return Interpreter(read_program(saved(body, folder, precision)))(x=X)["y"]


def slid(x: Array, weight: Array, stride: int, dilation: int, groups: int) -> Array:
    """A convolution, tap by tap."""
    outer, inner, *kernel = weight.shape
    height, width = (
        (n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], kernel, strict=True)
    )
    y = np.zeros((len(x), outer, height, width))
    for out, channel, a, b in np.ndindex(outer, inner, *kernel):
        read = out // (outer // groups) * inner + channel
        rows = slice(a * dilation, a * dilation + stride * height, stride)
        columns = slice(b * dilation, b * dilation + stride * width, stride)
        y[:, out] += x[:, read, rows, columns][:, :height, :width] * weight[out, channel, a, b]
    return y


def normalised(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    mean, variance = (f(axis=axes, keepdims=True) for f in (x.mean, x.var))
    normal: Array = (x - mean) / np.sqrt(variance + epsilon)
    return normal


GAMMA, BETA = (RNG.normal(size=3).astype(np.float32) for _ in range(2))
PER_CHANNEL = GAMMA.reshape(1, 3, 1, 1)
erf = np.vectorize(math.erf)
FLOAT_OPERATIONS: dict[str, tuple[Callable[[Any], Any], Array]] = {
    "add": (lambda x: mb.add(x=x, y=PER_CHANNEL), X + PER_CHANNEL),
    "add itself": (lambda x: mb.add(x=x, y=x), 2 * X),
    "sub": (lambda x: mb.sub(x=x, y=PER_CHANNEL), X - PER_CHANNEL),
    "mul": (lambda x: mb.mul(x=x, y=np.float32(-3)), -3 * X),
    "real_div": (lambda x: mb.real_div(x=x, y=PER_CHANNEL), X / PER_CHANNEL),
    "gelu": (lambda x: mb.gelu(x=x), X / 2 * (1 + erf(X / math.sqrt(2)))),
    "gelu, tanh": (
        lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        X / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))),
    ),
    "gelu, sigmoid": (
        lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        X / (1 + np.exp(-1.702 * X)),
    ),
    "transpose": (lambda x: mb.transpose(x=x, perm=[0, 2, 3, 1]), X.transpose(0, 2, 3, 1)),
    "reduce_mean": (lambda x: mb.reduce_mean(x=x, axes=[2, 3]), X.mean(axis=(2, 3))),
    "reduce_mean, kept": (
        lambda x: mb.reduce_mean(x=x, axes=[-3], keep_dims=True),
        X.mean(axis=1, keepdims=True),
    ),
    "reduce_l2_norm": (
        lambda x: mb.reduce_l2_norm(x=x, axes=[2, 3], keep_dims=True),
        np.sqrt(np.square(X).sum(axis=(2, 3), keepdims=True)),
    ),
    "layer_norm": (
        lambda x: mb.layer_norm(x=x, axes=[1], gamma=GAMMA, beta=BETA, epsilon=np.float32(0.5)),
        normalised(X, (1,), 0.5) * PER_CHANNEL + BETA.reshape(1, 3, 1, 1),
    ),
    "layer_norm, bare": (
        lambda x: mb.layer_norm(x=x, axes=[2, 3], epsilon=np.float32(1e-3)),
        normalised(X, (2, 3), 1e-3),
    ),
}
FULL, DEPTHWISE = (
    RNG.normal(size=size).astype(np.float32) for size in ((4, 3, 2, 2), (3, 1, 3, 3))
)
PADDED = np.pad(X, ((0, 0), (0, 0), (1, 2), (0, 3)))
CONVOLUTIONS: dict[str, tuple[dict[str, Any], Array]] = {
    "valid": ({"weight": FULL}, slid(X, FULL, 1, 1, 1)),
    "strided": ({"weight": FULL, "strides": [2, 2]}, slid(X, FULL, 2, 1, 1)),
    "depthwise": ({"weight": DEPTHWISE, "groups": 3}, slid(X, DEPTHWISE, 1, 1, 3)),
    "dilated": ({"weight": FULL, "dilations": [3, 3]}, slid(X, FULL, 1, 3, 1)),
    "padded": (
        {"weight": FULL, "pad_type": "custom", "pad": [1, 2, 0, 3]},
        slid(PADDED, FULL, 1, 1, 1),
    ),
    "bias": (
        {"weight": FULL, "bias": np.arange(4, dtype=np.float32)},
        slid(X, FULL, 1, 1, 1) + np.arange(4).reshape(1, 4, 1, 1),
    ),
}


@pytest.mark.parametrize("case", FLOAT_OPERATIONS)
def test_an_operation_on_floats(case: str, tmp_path: Path) -> None:
    body, expected = FLOAT_OPERATIONS[case]
    found = run(body, tmp_path)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution(case: str, tmp_path: Path) -> None:
    arguments, expected = CONVOLUTIONS[case]
    found = run(lambda x: mb.conv(x=x, **arguments), tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_map(biased: bool, tmp_path: Path) -> None:  # noqa: FBT001
    weight = RNG.normal(size=(4, 5)).astype(np.float32)
    bias = {"bias": np.arange(4, dtype=np.float32)} if biased else {}
    found = run(lambda x: mb.linear(x=x, weight=weight, **bias), tmp_path)
    np.testing.assert_allclose(found, X @ weight.T + bias.get("bias", 0), rtol=1e-5, atol=1e-6)


# --- integers -------------------------------------------------------------------------------------

HALVES: Array = np.array([-300.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 300.0], np.float32)
GRIDS = {
    "int8": (np.int8(-3), np.clip(np.rint(HALVES) - 3, -128, 127)),
    "uint8": (np.uint8(5), np.clip(np.rint(HALVES) + 5, 0, 255)),
}


@pytest.mark.parametrize("dtype", GRIDS)
def test_quantizing_rounds_half_to_even_and_clips(dtype: str, tmp_path: Path) -> None:
    zero_point, steps = GRIDS[dtype]
    affine = {"scale": np.float32(0.25), "zero_point": zero_point}

    def body(x: Any) -> Any:
        q = mb.quantize(input=x, output_dtype=dtype, **affine)
        return mb.dequantize(input=q, **affine)

    program = read_program(saved(body, tmp_path, shape=HALVES.shape))
    found = Interpreter(program)(x=(HALVES / 4).astype(np.float32))["y"]
    np.testing.assert_array_equal(found, (steps - float(zero_point)) / 4)
    assert {op.dtype for op in program.operations if op.kind == "quantize"} == {dtype.upper()}


def test_scales_along_an_axis(tmp_path: Path) -> None:
    scales, zeros = np.array([0.5, 0.25, 2], np.float32), np.array([1, -2, 3], np.int8)
    affine: dict[str, Any] = {"scale": scales, "zero_point": zeros, "axis": 1}

    def body(x: Any) -> Any:
        return mb.dequantize(input=mb.quantize(input=x, output_dtype="int8", **affine), **affine)

    along = scales.reshape(1, 3, 1, 1)
    np.testing.assert_array_equal(run(body, tmp_path), np.rint(X / along) * along)


def test_integer_weights(tmp_path: Path) -> None:
    weight = RNG.integers(-127, 128, (4, 3, 1, 1)).astype(np.int8)
    scales = np.array([0.1, 0.2, 0.3, 0.4], np.float32)

    def body(x: Any) -> Any:
        constant = mb.constexpr_affine_dequantize(
            quantized_data=weight, zero_point=np.int8(2), scale=scales, axis=0
        )
        return mb.conv(x=x, weight=constant)

    floats = scales.reshape(4, 1, 1, 1) * (weight.astype(np.float32) - 2)
    expected = slid(X, floats, 1, 1, 1)
    np.testing.assert_allclose(run(body, tmp_path), expected, rtol=1e-5, atol=1e-4)


# --- float16 --------------------------------------------------------------------------------------


def test_float16_is_rounded_after_every_operation(tmp_path: Path) -> None:
    third = np.float32(1 / 3)

    def body(x: Any) -> Any:
        return mb.sub(x=mb.add(x=mb.mul(x=x, y=third), y=np.float32(1000)), y=np.float32(1000))

    step = (X.astype(np.float16).astype(np.float32) * np.float16(third)).astype(np.float16)
    expected = (step + np.float16(1000)) - np.float16(1000)
    found = run(body, tmp_path, "FLOAT16")
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert np.abs(found - X / 3).max() > 0.1, "float16 has no digits left at a thousand"


def test_float16_overflows(tmp_path: Path) -> None:
    found = run(
        lambda x: mb.mul(x=mb.mul(x=x, y=np.float32(6e4)), y=np.float32(2)), tmp_path, "FLOAT16"
    )
    assert np.isinf(found[np.abs(X) > 1.1]).all()


# --- what is not known ----------------------------------------------------------------------------

UNKNOWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "operation": (lambda x: mb.softmax(x=x, axis=1), "the operation softmax"),
    "mode": (
        lambda x: mb.conv(x=x, weight=FULL, pad_type="same"),
        "conv with pad_type same",
    ),
    "dimensions": (
        lambda x: mb.conv(x=mb.reduce_mean(x=x, axes=[3]), weight=FULL[..., 0]),
        "conv with a weight of 3 dimensions",
    ),
    "type": (lambda x: mb.cast(x=mb.cast(x=x, dtype="int32"), dtype="fp32"), "cast to int32"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_named(case: str, tmp_path: Path) -> None:
    body, named = UNKNOWN[case]
    with pytest.raises(ArtifactError, match=named):
        run(body, tmp_path)


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "parameter": ({"x": Reference("x"), "alpha": np.float32(1)}, "the parameter alpha of gelu"),
    "missing": ({}, "gelu without its x"),
    "value": ({"x": Reference("nowhere")}, "nowhere, which gelu"),
    "word": ({"x": Reference("x"), "mode": np.array("FAST")}, "gelu with mode FAST"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_is_not_known_of_an_operation_is_named(case: str, tmp_path: Path) -> None:
    arguments, named = CHANGED[case]
    program = read_program(saved(lambda x: mb.gelu(x=x), tmp_path))
    changed = [
        replace(op, arguments=arguments) if op.kind == "gelu" else op for op in program.operations
    ]
    with pytest.raises(ArtifactError, match=named):
        Interpreter(replace(program, operations=tuple(changed)))(x=X)


# --- inputs and files -----------------------------------------------------------------------------


def test_a_batch_is_the_program_s(tmp_path: Path) -> None:
    session = Interpreter(read_program(saved(lambda x: mb.add(x=x, y=x), tmp_path)))
    with pytest.raises(ArtifactError, match=r"x has the shape \[1, 3, 6, 5\]. Allowed: \[2, 3, 6"):
        session(x=X[:1])


def test_a_dynamic_batch_is_within_its_bounds(tmp_path: Path) -> None:
    # coremltools' own bounds, where none are given, are 1 and 2.
    path = saved(lambda x: mb.add(x=x, y=x), tmp_path, shape=(get_new_symbol(), *X.shape[1:]))
    session = Interpreter(read_program(path))
    for n in (1, 2):
        np.testing.assert_array_equal(session(x=X[:n])["y"], 2 * X[:n])
    with pytest.raises(ArtifactError, match=r"\[4, 3, 6, 5\]. Allowed: \[1 to 2, 3, 6, 5\]"):
        session(x=np.concatenate([X, X]))


WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    weight = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
    return saved(lambda x: mb.conv(x=x, weight=weight), tmp_path)


def test_cut_weights_are_found(package: Path) -> None:
    stored = package / WEIGHTS
    stored.write_bytes(stored.read_bytes()[:-60])
    with pytest.raises(ArtifactError, match="has no constant of 432 bytes at 64 of its weights"):
        read_program(package)


def test_lost_weights_are_found(package: Path) -> None:
    (package / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"keeps weights in @model_path/weights/weight.bin"):
        read_program(package)


def test_weights_outside_the_package_are_not_read(package: Path) -> None:
    stored = package / WEIGHTS
    outside = package.parent / "outside.bin"
    shutil.move(stored, outside)
    stored.symlink_to(outside)
    with pytest.raises(ArtifactError, match="which is no file of its own"):
        read_program(package)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.mlpackage").mkdir()
    with pytest.raises(ArtifactError, match=r"is not an \.mlpackage"):
        read_program(tmp_path / "model.mlpackage")
