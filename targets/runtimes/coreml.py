"""CoreML mlprogram, built op by op with MIL's builder.

In: a `Graph`. Out: an .mlpackage folder for iOS 17 / macOS 14 and later, NCHW, float32 between the
quantize/dequantize pairs, so that scales stay the contract's own (float16 would round the small
ones of a folded LayerScale to zero); the scheme float16, which has none, is float16 throughout.
Pointwise layers are 1x1 convolutions, weights int8 constants behind constexpr_affine_dequantize.
CoreML executes on macOS only; elsewhere the saved program is
interpreted, so that an artifact's logits are known wherever it is made.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.records import Proof
from targets import graph as g
from targets.base import (
    INPUT_NAME,
    METADATA_KEY,
    NO_FOUR_BITS,
    OUTPUT_NAME,
    Capabilities,
    NotRun,
    kind_here,
    require_installed,
)
from targets.runtimes._counts import computing_layers
from targets.runtimes._mil_file import main_block, read_program, read_spec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from targets.base import Image, Logits, OpTime, Session

WEIGHTED_OPS = ("conv", "linear")
WEIGHT_CONSTANT = "constexpr_affine_dequantize"
QUANTIZE_OPS = ("quantize", "dequantize")
LARGEST_BATCH = 256
"""Of a dynamic batch: an mlprogram must name one, and coremltools would take 2."""


class CoreMl:
    """The runtime `coreml`."""

    name = "coreml"
    capabilities = Capabilities(
        suffix=".mlpackage",
        layout="NCHW",
        extra="coreml",
        distributions=("coremltools",),
        schemes=("float", "float16", "w8a8", "w4a8", "w8"),
        graph_forms=("1x1 convolution",),
        gelu="erf",
        accelerated=True,
        unsupported_schemes={
            "w4a4": NO_FOUR_BITS,
            "w8a16": "CoreML's quantize writes 8 bits",
            "w8a8-dynamic": "CoreML has no op that finds an activation's scale when it runs",
        },
        default_isa="arm",
        native_on="macOS",
    )

    def export(self, graph: g.Graph, path: Path, metadata: str) -> None:
        """Write the .mlpackage; see `targets.base.Runtime`."""
        import coremltools as ct

        batch, half = graph.export.batch, graph.export.scheme == "float16"
        shape = (
            ct.RangeDim(1, LARGEST_BATCH) if batch == "dynamic" else batch,
            *graph.ops[0].shape,
        )
        # By itself coremltools leaves its copy in the system's folder for temporary files.
        with TemporaryDirectory(dir=path.parent) as folder:
            model = ct.convert(
                _Emitter(graph).program(),
                inputs=[ct.TensorType(name=INPUT_NAME, shape=shape)],
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS17,
                compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                skip_model_load=True,
                package_dir=str(Path(folder) / path.name),
            )
            model.user_defined_metadata[METADATA_KEY] = metadata
            model.save(str(path))

    def prove(self, path: Path, graph: g.Graph) -> Proof:
        """Count, in the saved program, layers with an int8 constant and a dequantized input."""
        operations = main_block(path, read_spec(path))[1].operations
        counts = Counter(op.type for op in operations)
        made_by = {output.name: op.type for op in operations for output in op.outputs}

        def source(op: Any, argument: str) -> str | None:
            return made_by.get(op.inputs[argument].arguments[0].name)

        packed = [
            op
            for op in operations
            if op.type in WEIGHTED_OPS and source(op, "weight") == WEIGHT_CONSTANT
        ]
        return Proof(
            method=f"int8 constants and quantize ops of the saved program; {self._plan(path)}",
            integer_layers=sum(source(op, "x") == "dequantize" for op in packed),
            expected_integer_layers=computing_layers(graph),
            weighted_layers=len(graph.weighted),
            transposes_per_block=counts["transpose"] / graph.blocks,
            quantize_ops_per_block=sum(counts[name] for name in QUANTIZE_OPS) / graph.blocks,
            op_counts={name: n for name, n in sorted(counts.items()) if name != "const"},
            integer_weights=len(packed),
        )

    def _plan(self, path: Path) -> str:
        if kind_here(self) == "interpreted":
            return "what the Neural Engine makes of them shows on a Mac only"
        from targets.runtimes._coreml_plan import preferred_units

        units = preferred_units(path).most_common()
        return "CoreML's plan: " + ", ".join(
            f"{count} operations on {unit}" for unit, count in units
        )

    def read_metadata(self, path: Path) -> str:
        """Return this project's user-defined metadata."""
        return str(read_spec(path).description.metadata.userDefined.get(METADATA_KEY, ""))

    def can_run(self) -> NotRun | None:
        """It runs wherever coremltools is installed: off macOS by interpretation."""
        require_installed(self)
        return None

    def op_times(
        self, path: Path, image: Image, *, threads: int, inferences: int
    ) -> list[OpTime] | NotRun:
        """Divide a prediction's time as CoreML's plan does; it chooses its own threads."""
        if kind_here(self) == "interpreted":
            return NotRun(reason="CoreML tells where its time goes on macOS only")
        from targets.runtimes._coreml_plan import op_times

        return op_times(path, image, inferences)

    def load(self, path: Path, threads: int) -> Session:
        """Return a session through CoreML, which chooses its own threads, or the interpreter."""
        if kind_here(self) == "interpreted":
            return interpreted(path, threads)
        from targets.runtimes._coreml_units import load_model

        model = load_model(path)

        def run(image: Image) -> Logits:
            logits: Logits = model.predict({INPUT_NAME: image})[OUTPUT_NAME]
            return logits

        return run


def interpreted(path: Path, threads: int) -> Session:
    """Return a session that interprets the saved program, on any system.

    Raises:
        ArtifactError: It has what the interpreter does not know; the message names it.
    """
    import torch

    from targets.runtimes._mil import Interpreter

    torch.set_num_threads(threads)
    program = Interpreter(read_program(path))

    def run(image: Image) -> Logits:
        return program(**{INPUT_NAME: image})[OUTPUT_NAME]

    return run


class _Emitter:
    """Walks the graph once inside MIL's builder."""

    def __init__(self, graph: g.Graph) -> None:
        from coremltools.converters.mil import Builder

        self.mb = Builder
        self.graph = graph
        self.values: dict[str, Any] = {}

    def program(self) -> Any:
        import coremltools as ct
        from coremltools.converters.mil.mil import get_new_symbol, types

        first, last = self.graph.ops[0], self.graph.ops[-1]
        batch = self.graph.export.batch
        shape = (get_new_symbol("batch") if batch == "dynamic" else batch, *first.shape)
        spec = self.mb.TensorSpec(shape=shape, dtype=types.fp32)

        def main(image: Any) -> Any:
            self.values[first.name] = image
            for op in self.graph.ops[1:]:
                self.values[op.name] = self._emit(op)
            return self.mb.identity(x=self.values[last.name], name=OUTPUT_NAME)

        build = self.mb.program(input_specs=[spec], opset_version=ct.target.iOS17)
        return build(main)

    def _emit(self, op: g.Op) -> Any:
        mb, name = self.mb, op.name.replace(".", "_")
        x = [self.values[source] for source in op.inputs]
        match op:
            case g.Conv():
                return self._conv(op, x[0], op.weight.shape, op.stride, op.padding, op.groups)
            case g.Linear(shape=(_, _, _)):
                return self._conv(op, x[0], (*op.weight.shape, 1, 1), 1, 0, 1)
            case g.Linear():
                weight, bias = self._weights(op, op.weight.shape)
                return mb.linear(x=x[0], weight=weight, bias=bias, name=name)
            case g.Norm():
                return mb.layer_norm(
                    x=x[0],
                    axes=[1],
                    gamma=op.weight,
                    beta=op.bias,
                    epsilon=np.float32(op.eps),
                    name=name,
                )
            case g.ResponseNorm():
                return self._response_norm(op, x[0], name)
            case g.Shift():
                return mb.add(x=x[0], y=_per_channel(op.bias), name=name)
            case g.Scale():
                factor = op.weight.reshape(1, -1, *[1] * (len(op.shape) - 1))
                return mb.mul(x=x[0], y=factor, name=name)
            case g.Gelu():
                mode = "EXACT" if self.graph.export.gelu == "erf" else "TANH_APPROXIMATION"
                return mb.gelu(x=x[0], mode=mode, name=name)
            case g.Add():
                return mb.add(x=x[0], y=x[1], name=name)
            case g.Mean():
                return mb.reduce_mean(x=x[0], axes=[2, 3], keep_dims=False, name=name)
            case g.QuantizePair():
                p = op.parameters
                affine = {"scale": np.float32(p.scale), "zero_point": np.int8(p.zero_point)}
                q = mb.quantize(input=x[0], output_dtype="int8", name=f"{name}_q", **affine)
                return mb.dequantize(input=q, name=name, **affine)
        msg = f"{type(op).__name__} has no CoreML form"
        raise NotImplementedError(msg)

    def _response_norm(self, op: g.ResponseNorm, x: Any, name: str) -> Any:
        mb = self.mb
        response = mb.reduce_l2_norm(x=x, axes=[2, 3], keep_dims=True)
        mean = mb.reduce_mean(x=response, axes=[1], keep_dims=True)
        relative = mb.real_div(x=response, y=mb.add(x=mean, y=np.float32(op.eps)))
        factor = mb.add(x=mb.mul(x=relative, y=_per_channel(op.weight)), y=np.float32(1))
        return mb.mul(x=x, y=factor, name=name)

    def _conv(
        self, op: g.Weighted, x: Any, shape: g.Shape, stride: int, padding: int, groups: int
    ) -> Any:
        weight, bias = self._weights(op, shape)
        return self.mb.conv(
            x=x,
            weight=weight,
            bias=bias,
            strides=[stride] * 2,
            pad_type="custom",
            pad=[padding] * 4,
            groups=groups,
            name=op.name.replace(".", "_"),
        )

    def _weights(self, op: g.Weighted, shape: g.Shape) -> tuple[Any, NDArray[np.float32]]:
        weight, bias = op.values()
        if op.integers is None:
            return weight.reshape(shape), bias
        constant = self.mb.constexpr_affine_dequantize(
            quantized_data=op.integers.weight.reshape(shape),
            zero_point=np.int8(0),
            scale=op.integers.weight_scales,
            axis=0,
            name=f"{op.name.replace('.', '_')}_weight",
        )
        return constant, bias


def _per_channel(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values.reshape(1, -1, 1, 1)


RUNTIME = CoreMl()
