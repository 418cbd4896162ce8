"""What each runtime's own tool makes of a checkpoint, by the path its documentation shows.

In: a checkpoint, calibration images that are normalised already, and where the file goes. Out: one
artifact that takes normalised pixels. The network is not folded and has the form in which it was
published; what a tool needs beyond that is a `note` of its row. One function per tool; each is
called in a process of its own, for the tools' globals do not go together.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pipeline.convnext import ConvNeXt

    Pixels = NDArray[np.float32]

IMAGE, LOGITS = "image", "logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every tool is given.

    Attributes:
        checkpoint: What `pipeline.checkpoint.load_model` takes.
        calibration: An .npy file of normalised images, float32 (N, C, H, W).
        size: Side of the image in pixels.
    """

    checkpoint: str
    calibration: Path
    size: int

    def canonical(self) -> ConvNeXt:
        """Load the canonical network: normalised pixels in, logits out."""
        from pipeline.checkpoint import load_model

        return load_model(self.checkpoint)

    def network(self) -> ConvNeXt:
        """Load the network as a user has it: with the blocks in the published form."""
        from benchmarks.accuracy_networks import as_published

        return as_published(self.canonical())

    def example(self, network: ConvNeXt) -> Any:
        """Return one input of zeros."""
        import torch

        return torch.zeros(1, network.architecture.in_channels, self.size, self.size)

    def images(self) -> Iterator[Pixels]:
        """Yield the calibration images as batches of one."""
        for image in np.load(self.calibration, mmap_mode="r"):
            yield np.array(image[None])


class Peer(NamedTuple):
    """One tool's path to one artifact."""

    runtime: str
    method: str
    scheme: str
    calibrates: bool
    make: Callable[[Job, Path], None]
    note: str | None = None


# --- onnxruntime ----------------------------------------------------------------------------------


def onnx_float(job: Job, path: Path) -> None:
    """Export with torch's exporter."""
    import torch

    network = job.network()
    example = job.example(network)
    names: dict[str, Any] = {"input_names": [IMAGE], "output_names": [LOGITS]}
    torch.onnx.export(network, (example,), path, dynamo=True, **names)


def onnx_static(job: Job, path: Path, *, seven_bits: bool) -> None:
    """Export, prepare as the tool itself asks, and quantize with its defaults."""
    quantization: Any = import_module("onnxruntime.quantization")
    shapes: Any = import_module("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = job.images()

        def get_next(self) -> dict[str, Pixels] | None:
            image = next(self.images, None)
            return None if image is None else {IMAGE: image}

    with tempfile.TemporaryDirectory() as folder:
        exported, prepared = Path(folder) / "exported.onnx", Path(folder) / "prepared.onnx"
        onnx_float(job, exported)
        shapes.quant_pre_process(exported, prepared)
        options = {"reduce_range": True} if seven_bits else {}
        quantization.quantize_static(prepared, path, Reader(), **options)


# --- OpenVINO -------------------------------------------------------------------------------------


def openvino_model(job: Job) -> Any:
    """Convert the torch module."""
    import openvino

    network = job.network()
    example = job.example(network)
    model = openvino.convert_model(network, example_input=example, input=[list(example.shape)])
    model.inputs[0].set_names({IMAGE})
    return model


def openvino_float(job: Job, path: Path) -> None:
    """Convert and save."""
    import openvino

    openvino.save_model(openvino_model(job), path)


def openvino_nncf(job: Job, path: Path, *, transformer: bool) -> None:
    """Convert and quantize with `nncf.quantize`, on all images and not on its first 300."""
    import openvino

    nncf: Any = import_module("nncf")
    images = list(job.images())
    options = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    quantized = nncf.quantize(
        openvino_model(job), nncf.Dataset(images), subset_size=len(images), **options
    )
    openvino.save_model(quantized, path)


# --- TFLite ---------------------------------------------------------------------------------------


def tflite_float(job: Job, path: Path) -> None:
    """Convert with litert-torch."""
    _litert(job.network(), job, path)


def _litert(network: ConvNeXt, job: Job, path: Path) -> None:
    import_module("litert_torch").convert(network, (job.example(network),)).export(str(path))


def tflite_aeq(job: Job, path: Path, *, static: bool) -> None:
    """Convert with litert-torch and quantize with ai-edge-quantizer's recipe of 8 bits."""
    from ai_edge_litert.interpreter import Interpreter

    from benchmarks.accuracy_networks import as_published, without_layer_scale

    quantizer: Any = import_module("ai_edge_quantizer.quantizer")
    recipe: Any = import_module("ai_edge_quantizer.recipe")
    network = as_published(without_layer_scale(job.canonical())) if static else job.network()
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "exported.tflite"
        _litert(network, job, exported)
        made = quantizer.Quantizer(str(exported))
        made.load_quantization_recipe(
            recipe.static_wi8_ai8() if static else recipe.dynamic_wi8_afp32()
        )
        calibrated = None
        if static:
            signatures = Interpreter(str(exported)).get_signature_list()
            signature, names = next(iter(signatures.items()))
            samples = [{names["inputs"][0]: image} for image in job.images()]
            calibrated = made.calibrate({signature: samples})
        made.quantize(calibrated).export_model(str(path), overwrite=True)


def tflite_converter(job: Job, path: Path) -> None:
    """Write the network in TensorFlow ops as a SavedModel and convert it to full int8."""
    from benchmarks.accuracy_networks import tensorflow_function

    tf: Any = import_module("tensorflow")
    network, module = job.canonical(), tf.Module()
    shape = [1, job.size, job.size, network.architecture.in_channels]
    run = tensorflow_function(network)
    signature = [tf.TensorSpec(shape, tf.float32, name=IMAGE)]
    module.run = tf.function(lambda image: {LOGITS: run(image)}, signature, autograph=False)
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures={"serving_default": module.run})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: (
            [image.transpose(0, 2, 3, 1)] for image in job.images()
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        path.write_bytes(converter.convert())


# --- CoreML ---------------------------------------------------------------------------------------


def coreml_model(job: Job) -> Any:
    """Export the torch module and convert it."""
    import coremltools as ct
    import torch

    network = job.network()
    exported = torch.export.export(network, (job.example(network),)).run_decompositions({})
    target = ct.target.iOS17
    return ct.convert(exported, minimum_deployment_target=target, skip_model_load=True)


def coreml_float(job: Job, path: Path) -> None:
    """Convert and save."""
    coreml_model(job).save(str(path))


def coreml_linear(job: Job, path: Path) -> None:
    """Convert and quantize the weights linearly, with the tool's defaults."""
    optimize: Any = import_module("coremltools.optimize.coreml")
    linear = optimize.OptimizationConfig(global_config=optimize.OpLinearQuantizerConfig())
    optimize.linear_quantize_weights(coreml_model(job), linear).save(str(path))


PEERS: tuple[Peer, ...] = (
    Peer("onnx", "float", "float", False, onnx_float),
    Peer(
        "onnx",
        "ort_quantize_static",
        "w8a8",
        True,
        partial(onnx_static, seven_bits=False),
        "after quant_pre_process, which the tool asks for",
    ),
    Peer(
        "onnx",
        "ort_quantize_static_7bit",
        "w8a8",
        True,
        partial(onnx_static, seven_bits=True),
        "not the default: reduce_range, which the tool advises on AVX2 without VNNI",
    ),
    Peer("openvino", "float", "float", False, openvino_float, "saved as float16, the default"),
    Peer("openvino", "nncf_default", "w8a8", True, partial(openvino_nncf, transformer=False)),
    Peer("openvino", "nncf_transformer", "w8a8", True, partial(openvino_nncf, transformer=True)),
    Peer("tflite", "float", "float", False, tflite_float),
    Peer(
        "tflite",
        "tfliteconverter_int8",
        "w8a8",
        True,
        tflite_converter,
        "network rewritten in TensorFlow ops; input and output stay float",
    ),
    Peer(
        "tflite",
        "aeq_static",
        "w8a8",
        True,
        partial(tflite_aeq, static=True),
        "LayerScale folded: without that the runtime refuses the file (num_scales must be 1);"
        " input and logits are int8, the recipe's default",
    ),
    Peer("tflite", "aeq_dynamic", "w8a8-dynamic", False, partial(tflite_aeq, static=False)),
    Peer("coreml", "float", "float", False, coreml_float, "float16, the default"),
    Peer("coreml", "coremltools_linear", "w8", False, coreml_linear, "weights alone"),
)
