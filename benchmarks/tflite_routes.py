"""The ways to a .tflite file, side by side: written directly, by litert-torch, by TensorFlow.

In: the size of a ConvNeXt with seeded weights, and photographs or seeded noise. Every route starts
from the same folded weights and, where it can take them, the same scales; each runs in a process of
its own, then one process times all files in turns. Out: a table and a JSON document.

Run it where convnext-edge, litert-torch and tensorflow-cpu are installed together:

    python -P benchmarks/tflite_routes.py --model atto --input-size 224 --json routes.json
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module, metadata
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

from calib.batches import batches
from calib.images import open_images
from pipeline.records import Architecture, Export, Preprocessing, Scheme
from pipeline.statistics import percentile, ratio_interval, sqnr_db
from targets import graph as g
from targets.runtimes.tflite import RUNTIME
from targets.translate import build_graph

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pipeline.convnext import ConvNeXt

    Pixels = NDArray[np.float32]

Row = dict[str, Any]

STARTED = time.perf_counter()
PROJECT, DATA = "convnext-edge", "data.npz"
IMAGES, ROUNDS, PER_ROUND, MIB = 8, 10, 3, 2**20
COLUMNS = {
    "export s": "{export_wall_s:.1f}",
    "export CPU s": "{export_cpu_s:.1f}",
    "RSS MiB": "{peak_rss_mib:.0f}",
    "MiB": "{size_mib:.1f}",
    "ops, transposes": "{ops}, {transposes}",
    "int8 layers": "{integer_layers}",
    "our w/b/scales": "{our_weights}/{our_biases}/{our_scales}",
    "CPU ms": "{cpu_p50_ms:.2f}",
    "ratio to direct": "{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]",
    "SQNR dB": "{sqnr_db:.1f}",
    "adds": "{adds}, {adds_mib:.0f} MiB",
}


def prepare(work: Path, model: str, input_size: int, source: Path | None) -> None:
    """Write the quantized model, calibration and evaluation images, and the float logits."""
    import torch

    from calib.collect import collect
    from pipeline.convnext import SIZES, seeded
    from pipeline.fold import fold
    from pipeline.quantize import Given, quantize, write

    depths, dims = SIZES[model]
    how = Preprocessing(input_size=input_size)
    folded = fold(seeded(Architecture(depths=depths, dims=dims, classes=1000), seed=0), how)
    pixels = noise(input_size)
    if source:
        chosen = open_images(str(source), "calibration").sample(2 * IMAGES, seed=0)
        _, pixels = next(batches(chosen, how, 2 * IMAGES))
    calibration, evaluation = pixels[:IMAGES], pixels[IMAGES:]
    statistics = collect(folded, [calibration])
    given = Given(folded=folded, statistics=statistics, sample=calibration)
    write(work, *quantize(given, how, labels=None, parents={}))
    with torch.inference_mode():
        logits = folded(torch.from_numpy(evaluation)).numpy()
    np.savez(work / DATA, calibration=calibration, evaluation=evaluation, logits=logits)


def noise(size: int) -> Pixels:
    """Return 2 * IMAGES images of seeded, blurred noise over the whole range of pixels."""
    raw = np.random.default_rng(0).normal(size=(2 * IMAGES, 3, size, size))
    blurred = gaussian_filter(raw, sigma=(0, 0, size / 56, size / 56))
    return np.asarray(np.clip(128 + 48 * blurred / blurred.std(), 0, 255), np.float32)


def shared_graph(work: Path, scheme: Scheme) -> g.Graph:
    """Return the shared graph of the prepared model, in pointwise placement where it is w8a8."""
    from pipeline.quantize import read

    export = Export(
        runtime="tflite",
        scheme=scheme,
        placement="pointwise-io",
        graph_form=RUNTIME.capabilities.graph_forms[0],
        gelu=RUNTIME.capabilities.gelu,
        profile="full" if scheme == "w8a8" else None,
    )
    return build_graph(*read(work), RUNTIME.capabilities, export)


def write_direct(work: Path, path: Path, *, scheme: Scheme) -> None:
    """Write the file as this project does."""
    RUNTIME.export(shared_graph(work, scheme), path, "{}")


def write_litert(work: Path, path: Path, *, scheme: Scheme, as_convolutions: bool) -> None:
    """Convert the folded torch model with litert-torch, as it is or with 1x1 convolutions."""
    import torch

    from pipeline.convnext import empty
    from pipeline.quantize import read

    litert: Any = import_module("litert_torch")
    pt2e = litert.quantize.pt2e_quantizer
    record, arrays = read(work)
    model = empty(record.architecture, folded=True).to_empty(device="cpu")
    model.load_state_dict({n: torch.from_numpy(arrays[f"float/{n}"]) for n in model.state_dict()})
    if as_convolutions:
        replace_modules(model, shared_graph(work, scheme))
    options = {}
    if scheme == "w8a8":
        static = pt2e.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
        wanted = pt2e.PT2EQuantizer().set_global(static)
        options["quant_config"] = litert.quantize.quant_config.QuantConfig(pt2e_quantizer=wanted)
    size = record.preprocessing.input_size
    channels_last = litert.to_channel_last_io(model.eval(), args=[0])
    litert.convert(channels_last, (torch.zeros(1, size, size, 3),), **options).export(str(path))


def replace_modules(model: ConvNeXt, graph: g.Graph) -> None:
    """Make the blocks' linear maps 1x1 convolutions, with the graph's quantize/dequantize pairs."""
    import torch
    import torch.ao.quantization.fx._decomposed
    from torch import nn
    from torch.nn.utils.parametrize import register_parametrization

    class Pair(nn.Module):
        def __init__(self, kind: str, *parameters: Any) -> None:
            super().__init__()
            self.quantize = getattr(torch.ops.quantized_decomposed, f"quantize_{kind}")
            self.dequantize = getattr(torch.ops.quantized_decomposed, f"dequantize_{kind}")
            self.rest = (*parameters, torch.int8)

        def forward(self, x: torch.Tensor) -> Any:
            return self.dequantize(self.quantize(x, *self.rest), *self.rest)

    for op in graph.ops:
        if isinstance(op, g.QuantizePair):
            scale, zero = op.parameters.scale, op.parameters.zero_point
            model.set_submodule(op.name, Pair("per_tensor", scale, zero, -128, 127))
        elif isinstance(op, g.Linear) and len(op.shape) > 1:
            weight, bias = map(torch.from_numpy, (op.weight[:, :, None, None], op.bias))
            convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
            convolution.load_state_dict({"weight": weight, "bias": bias})
            if op.integers:
                scales = torch.from_numpy(op.integers.weight_scales)
                zeros = torch.zeros(len(scales), dtype=torch.int64)
                pair = Pair("per_channel", scales, zeros, 0, -127, 127)
                register_parametrization(convolution, "weight", pair)
            model.set_submodule(op.name, convolution)


def write_tensorflow(work: Path, path: Path, *, scheme: Scheme, calibrate: bool) -> None:
    """Build the graph from tf.nn ops and convert it.

    In w8a8, fake-quantize ops carry this project's scales; with `calibrate` every op is int8, in
    ranges that the converter finds itself on the same images.
    """
    tf: Any = import_module("tensorflow")
    graph, module = shared_graph(work, scheme), tf.Module()
    channels, *sides = graph.ops[0].shape
    image = tf.TensorSpec([1, *sides, channels], tf.float32, name="image")
    module.run = tf.function(partial(tensorflow_network, tf, graph), [image], autograph=False)
    concrete = module.run.get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], module)
    if calibrate or scheme == "w8a8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if calibrate:
        images = np.load(work / DATA)["calibration"].transpose(0, 2, 3, 1)[:, None]
        converter.representative_dataset = lambda: ([image] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    path.write_bytes(converter.convert())


def tensorflow_network(tf: Any, graph: g.Graph, image: Any) -> dict[str, Any]:
    """Compute the logits of an NHWC image with TensorFlow ops."""
    values: dict[str, Any] = {}
    for op in graph.ops:
        x = [values[name] for name in op.inputs]
        match op:
            case g.Conv() | g.Linear():
                y = _tensorflow_layer(tf, x[0], op)
            case g.Norm():
                mean, variance = tf.nn.moments(x[0], [-1], keepdims=True)
                y = (x[0] - mean) * tf.math.rsqrt(variance + op.eps)
                y = y if op.weight is None else y * op.weight + op.bias
            case g.Gelu():
                y = tf.nn.gelu(x[0], approximate=True)
            case g.Add():
                y = x[0] + x[1]
            case g.Mean():
                y = tf.reduce_mean(x[0], [1, 2])
            case g.QuantizePair():
                scale, zero = op.parameters.scale, op.parameters.zero_point
                ends = scale * (-128 - zero), scale * (127 - zero)
                y = tf.quantization.fake_quant_with_min_max_args(x[0], *ends, num_bits=8)
            case _:
                y = image
        values[op.name] = y
    return {"logits": y}


def _tensorflow_layer(tf: Any, x: Any, op: Any) -> Any:
    if len(op.shape) == 1:
        return tf.nn.bias_add(tf.matmul(x, op.weight.T), op.bias)
    weight = op.weight if op.weight.ndim > 2 else op.weight[:, :, None, None]
    if getattr(op, "groups", 1) > 1:
        kernel = weight.transpose(2, 3, 0, 1)
        return tf.nn.bias_add(tf.nn.depthwise_conv2d(x, kernel, [1] * 4, "SAME"), op.bias)
    kernel = tf.constant(weight.transpose(2, 3, 1, 0))
    if op.integers:
        limit = 127 * op.integers.weight_scales
        fake = tf.quantization.fake_quant_with_min_max_vars_per_channel
        kernel = fake(kernel, -limit, limit, num_bits=8, narrow_range=True)
    return tf.nn.bias_add(tf.nn.conv2d(x, kernel, getattr(op, "stride", 1), "VALID"), op.bias)


TOOLS = {"direct": [], "litert": ["litert-torch"], "tensorflow": ["tensorflow-cpu"]}
"""What a route needs, by its first word, beside the project and its extra `tflite`."""
ROUTES: dict[str, Callable[[Path, Path], None]] = {
    "direct float": partial(write_direct, scheme="float"),
    "direct w8a8": partial(write_direct, scheme="w8a8"),
    "litert float": partial(write_litert, scheme="float", as_convolutions=False),
    "litert float 1x1": partial(write_litert, scheme="float", as_convolutions=True),
    "litert w8a8 1x1": partial(write_litert, scheme="w8a8", as_convolutions=True),
    "tensorflow float": partial(write_tensorflow, scheme="float", calibrate=False),
    "tensorflow w8a8": partial(write_tensorflow, scheme="w8a8", calibrate=False),
    "tensorflow full int8": partial(write_tensorflow, scheme="float", calibrate=True),
}


def write_route(work: Path, name: str) -> Row:
    """Run one route in this process, which is its own, and return what that cost from its start."""
    path = work / f"{name}.tflite"
    ROUTES[name](work, path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "export_wall_s": time.perf_counter() - STARTED,
        "export_cpu_s": time.process_time(),
        "peak_rss_mib": peak / (MIB if sys.platform == "darwin" else 1024),
        "size_mib": path.stat().st_size / MIB,
    }


def compare(work: Path, threads: int) -> dict[str, Row]:
    """Count, run and time every file; the timed runs alternate between the files."""
    from ai_edge_litert.interpreter import Interpreter

    data = np.load(work / DATA)
    images = np.ascontiguousarray(data["evaluation"].transpose(0, 2, 3, 1))[:, None]
    rows: dict[str, Row] = {}
    sessions: dict[str, Any] = {}
    for name in ROUTES:
        path = work / f"{name}.tflite"
        session = sessions[name] = Interpreter(str(path), num_threads=threads)
        session.allocate_tensors()
        logits = np.concatenate([_run(session, image)[0] for image in images])
        rows[name] = {"sqnr_db": sqnr_db(data["logits"], logits), **count(path, work)}
    samples: dict[str, list[float]] = {name: [] for name in ROUTES}
    for name in [name for _ in range(ROUNDS) for name in ROUTES]:
        samples[name] += [_run(sessions[name], images[0])[1] for _ in range(PER_ROUND)]
    for name, row in rows.items():
        base = samples["direct w8a8" if row["integer_layers"] else "direct float"]
        row["ratio"] = ratio_interval(samples[name], base, per_round=PER_ROUND)
        row["cpu_p50_ms"], row["cpu_ms"] = percentile(samples[name], 50), samples[name]
    return rows


def _run(interpreter: Any, image: Pixels) -> tuple[Pixels, float]:
    """Return the logits of one image and the CPU milliseconds that they took."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
    begin = time.process_time()
    interpreter.invoke()
    taken = 1000 * (time.process_time() - begin)
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), taken


def count(path: Path, work: Path) -> Row:
    """Count ops, and layers with exactly our int8 weights; of these, with our bias and scales."""
    schema: Any = import_module("ai_edge_litert.schema_py_generated")
    row: Row = {"our_weights": 0, "our_biases": 0, "our_scales": 0}
    graph = shared_graph(work, "w8a8")
    ours = {op.integers.weight.tobytes(): op for op in graph.weighted if op.integers}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    tensors = model.subgraphs[0].tensors
    data = [b"" if b.data is None else b.data.tobytes() for b in model.buffers]
    for op in model.subgraphs[0].operators:
        values = [tensors[i] for i in (*op.inputs[:3], *op.outputs)]
        layer: Any = ours.get(data[values[1].buffer]) if len(values) == 4 else None
        if layer:
            sites: list[Any] = [graph[layer.inputs[0]], graph.output_site(layer)]
            row["our_weights"] += 1
            row["our_biases"] += data[values[2].buffer] == layer.integers.bias.tobytes()
            row["our_scales"] += all(
                (np.float32(site.parameters.scale), site.parameters.zero_point)
                == (tensor.quantization.scale[0], tensor.quantization.zeroPoint[0])
                for tensor, site in zip((values[0], values[3]), sites, strict=True)
            )
    proof = RUNTIME.prove(path, graph)
    row["ops"], row["integer_layers"] = sum(proof.op_counts.values()), proof.integer_layers
    return row | {"transposes": proof.op_counts.get("TRANSPOSE", 0), "op_counts": proof.op_counts}


def dependencies(name: str) -> Row:
    """Count the distributions that a route and its file's runtime add to the project's own."""
    tools = TOOLS[name.partition(" ")[0]]
    added = sorted(closure(f"{PROJECT}[tflite]", *tools) - closure(PROJECT))
    files = [file for item in added for file in metadata.files(item) or []]
    paths = [Path(str(file.locate())) for file in files]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    return {"adds": len(added), "adds_mib": size / MIB, "added": added}


def closure(*roots: str) -> set[str]:
    """Return the names of all distributions that these requirements need, as installed here."""
    pending, seen = [Requirement(root) for root in roots], set[tuple[str, str]]()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            needed = [Requirement(line) for line in metadata.requires(name) or []]
            pending += [r for r in needed if not r.marker or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def measure(work: Path, model: str, input_size: int, threads: int, images: Path | None) -> Row:
    """Run each task in a fresh process and return the document."""
    # No framework is loaded here: on Linux a child's peak memory starts at its parent's.
    rows = {name: dependencies(name) for name in ROUTES}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        pool.submit(prepare, work, model, input_size, images).result()
        for name in ROUTES:
            rows[name] |= pool.submit(write_route, work, name).result()
        for name, more in pool.submit(compare, work, threads).result().items():
            rows[name] |= more
    source = images.name if images else "noise"
    names = ("numpy", "torch", "ai-edge-litert", "litert-torch", "tensorflow-cpu")
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpus = re.findall(r"model name\s*: (.*)", info) or [platform.processor()]
    return {
        "cpu": cpus[0],
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in names},
        "setup": f"{model}, {input_size}, {threads} thread(s), {source}",
        "routes": rows,
    }


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("atto", "tiny"), default="atto")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=Path, help="folder or zip of photographs; default: noise")
    parser.add_argument("--json", type=Path, required=True, help="where the document goes")
    options = vars(parser.parse_args())
    target: Path = options.pop("json")
    with tempfile.TemporaryDirectory() as folder:
        document = measure(Path(folder), **options)
    target.write_text(json.dumps(document, indent=1) + "\n")
    table = Table("route", title="{setup}, {cpu}".format(**document))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, row in document["routes"].items():
        table.add_row(name, *(cell.format(**row) for cell in COLUMNS.values()))
    Console(width=176, emoji=False).print(table)


if __name__ == "__main__":
    main()
