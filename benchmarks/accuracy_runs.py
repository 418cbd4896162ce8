"""What `accuracy.py` lets run in processes of their own: images, this project, artifacts.

In: JSON-like values and paths. Out: .npy files in the work folder, artifacts, and measurements.
Ours and the peers' artifacts run through the same few lines, one image at a time.
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.format import open_memmap

from pipeline.errors import DataError, UsageError
from pipeline.statistics import percentile
from targets import base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from calib.images import ImageSet
    from pipeline.recipe import Recipe
    from pipeline.records import Preprocessing

    Pixels = NDArray[np.float32]
    Row = dict[str, Any]
    Runner = Callable[[Pixels], Pixels]

LABELS, LOGITS, EVALUATION = "labels.npy", "logits.npy", "evaluation.npy"
BATCH, WARM_UP, ROUNDS, PER_ROUND = 32, 5, 10, 5
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "tflite": ".tflite", "coreml": ".mlpackage"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What was asked; all strings and numbers, so that it crosses processes and stands in JSON."""

    checkpoint: str
    data: str
    eval: str | None
    input_size: int | None
    images: int | None
    calibration_images: int
    draws: int
    isa: str

    def recipe(self, seed: int, **more: Any) -> Recipe:
        """Return the recipe of a run with one draw of calibration images.

        Raises:
            UsageError: A value is none that a recipe takes.
        """
        from pipeline.recipe import load_recipe

        stated = {
            "checkpoint": self.checkpoint,
            "data": self.data,
            "eval": self.eval,
            "input_size": self.input_size,
            "eval_images": self.images,
            "calibration_images": self.calibration_images,
            "isa": self.isa,
            "seed": seed,
            "bench": False,
        }
        return load_recipe(None, stated | more)


def apart(log: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a fresh process; what it prints goes to a file."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_into_log, log, function, arguments).result()


def _into_log(log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    return function(*arguments)


# --- images and the float network -----------------------------------------------------------------


def prepare(work: Path, settings: Settings) -> Row:
    """Choose and decode the images, and run the float network over those that evaluate.

    Args:
        work: Takes the pixels of the evaluation in [0, 255], their labels, the float logits, and
            per draw the normalised pixels of the calibration.
        settings: What was asked.

    Returns:
        What the document says of the model and of the images.

    Raises:
        EdgeError: The checkpoint or the data cannot be used, or both draw on the same images.
    """
    import torch

    from calib.images import select
    from pipeline import checkpoint
    from pipeline.data import NO_LABELS, choose
    from pipeline.locate import locate
    from pipeline.records import Selection
    from pipeline.run import preprocessing_of
    from pipeline.sidecar import read_sidecar
    from pipeline.worker import silent

    recipe = settings.recipe(0)
    how = preprocessing_of(recipe, read_sidecar(locate(settings.checkpoint)))
    loaded = checkpoint.load(settings.checkpoint)
    architecture = loaded.record.architecture
    checkpoint.check_input(architecture, how.input_size)
    checkpoint.check_channels(architecture, how.channels)
    chosen = choose(recipe, loaded.record, silent)
    if chosen.evaluation is None:
        raise DataError(NO_LABELS, allowed="labelled images", do="Give --eval")
    exam = select(chosen.evaluation.selection, loaded.record)
    held_out, skipped = set(exam.hashes()), list[str]()
    for seed in range(settings.draws):
        n = settings.calibration_images
        where = chosen.calibration.selection.where
        drawn = select(Selection(where=where, purpose="calibration", n=n, seed=seed))
        if shared := len(held_out & set(drawn.hashes())):
            raise DataError(
                f"draw {seed} calibrates with {shared} images that are used to evaluate",
                allowed="disjoint sets: train/ and val/ in --data, or another --eval",
                do="Separate them",
            )
        _decode(work / calibration_of(seed), drawn, how, skipped, normalise=True)
    labels = _decode(work / EVALUATION, exam, how, skipped, normalise=False)
    np.save(work / LABELS, labels)
    network, pixels = checkpoint.build(loaded.record, loaded.tensors), _mapped(work / EVALUATION)
    logits = []
    for start in range(0, len(pixels), BATCH):
        with torch.inference_mode():
            batch = torch.from_numpy(normalised(pixels[start : start + BATCH], how))
            logits.append(network(batch).numpy())
    np.save(work / LOGITS, np.concatenate(logits))
    hits = np.concatenate(logits).argmax(axis=1) == labels
    return {
        "checkpoint_sha256": loaded.record.sha256,
        "variant": loaded.record.variant,
        "preprocessing": asdict(how),
        "n": len(labels),
        "float_top1": float(hits.mean()),
        "evaluation_sha256": chosen.evaluation.source.sha256,
        "skipped": skipped,
    }


def calibration_of(seed: int) -> str:
    """Return the name of the file with a draw's normalised pixels."""
    return f"calibration-{seed}.npy"


def normalised(pixels: Pixels, how: Preprocessing) -> Pixels:
    """Return (N, C, H, W) pixels in [0, 255] as the unfolded network takes them."""
    mean, std = (np.array(v, np.float32)[:, None, None] * 255 for v in (how.mean, how.std))
    return np.asarray((pixels - mean) / std, np.float32)


def _decode(
    path: Path, images: ImageSet, how: Preprocessing, skipped: list[str], *, normalise: bool
) -> NDArray[np.int64]:
    """Write a set's pixels to an .npy file; return the labels, -1 where there is none."""
    from calib.batches import batches, check_readable

    left_out: list[str] = []
    shape = (len(images.entries), how.channels, how.input_size, how.input_size)
    array, labels = open_memmap(path, "w+", np.float32, shape), list[int]()
    for entries, pixels in batches(images, how, BATCH, skipped=left_out):
        start = len(labels)
        labels += [-1 if entry.label is None else entry.label for entry in entries]
        array[start : len(labels)] = normalised(pixels, how) if normalise else pixels
    array.flush()
    check_readable(images.label, len(images.entries), left_out)
    if left_out:
        np.save(path, np.array(array[: len(labels)]))
    skipped += left_out
    return np.array(labels, np.int64)


def _mapped(path: Path) -> Pixels:
    found: Pixels = np.load(path, mmap_mode="r")
    return found


# --- this project ---------------------------------------------------------------------------------


def make_ours(out: Path, kept: Path, recipe: Mapping[str, Any]) -> list[Row]:
    """Run the pipeline up to its artifacts and keep these.

    Args:
        out: The run folder, used again: what an earlier run made is not made twice.
        kept: Takes the artifacts, which the next run of another model would replace.
        recipe: A `Recipe` as JSON.

    Returns:
        One row per artifact, with its path.
    """
    from pipeline.display import Display
    from pipeline.exports import ARTIFACTS
    from pipeline.recipe import Recipe
    from pipeline.run import Steps, execute

    wanted = Recipe.model_validate(recipe)
    finished = execute(wanted, out, Steps(verify=False, bench=False), Display())
    assert finished.report is not None, "the run was asked to export"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(out / ARTIFACTS, kept)
    return [
        {
            "runtime": row.runtime,
            "scheme": row.scheme,
            "placement": row.placement,
            "profile": row.profile,
            "integer_layers": row.proof.integer_layers if row.proof else None,
            "path": str(kept / Path(row.path).relative_to(ARTIFACTS)),
            "size_bytes": row.size_bytes,
        }
        for row in finished.report.artifacts
    ]


# --- artifacts ------------------------------------------------------------------------------------


def evaluate(work: Path, how: Preprocessing, artifact: Row) -> Row:
    """Run an artifact over the evaluation images and hold it against the float network.

    Args:
        work: As `prepare` left it.
        how: For what takes normalised pixels.
        artifact: Its `runtime`, `path` and whether it is `ours`.
    """
    from pipeline.logits import compare

    lay_out, run = open_artifact(artifact["runtime"], Path(artifact["path"]))
    logits = [
        run(lay_out(image))[0].copy()
        for image in _inputs(_mapped(work / EVALUATION), how, ours=artifact["ours"])
    ]
    reference, labels = np.load(work / LOGITS), np.load(work / LABELS)
    found = asdict(compare(reference, np.stack(logits), labels))
    wanted = ("n", "top1", "drop_pp", "drop_ci95_pp", "agreement_with_float", "sqnr_db")
    return {name: found[name] for name in wanted}


def time_all(
    work: Path, how: Preprocessing, artifacts: Mapping[str, Row], threads: int = 1
) -> dict[str, Row]:
    """Time the artifacts of one runtime, which take turns; CPU time of the whole process."""
    pixels = _mapped(work / EVALUATION)[:1]
    runs: dict[str, tuple[Runner, Pixels]] = {}
    for label, artifact in artifacts.items():
        lay_out, run = open_artifact(artifact["runtime"], Path(artifact["path"]), threads)
        image = lay_out(next(_inputs(pixels, how, ours=artifact["ours"])))
        runs[label] = run, image
        for _ in range(WARM_UP):
            run(image)
    samples: dict[str, list[float]] = {label: [] for label in runs}
    for label in [label for _ in range(ROUNDS) for label in runs]:
        run, image = runs[label]
        for _ in range(PER_ROUND):
            begin = time.process_time_ns()
            run(image)
            samples[label].append((time.process_time_ns() - begin) / 1e6)
    return {k: {"cpu_p50_ms": percentile(v, 50), "cpu_ms": v} for k, v in samples.items()}


def _inputs(pixels: Pixels, how: Preprocessing, *, ours: bool) -> Iterator[Pixels]:
    for image in pixels:
        single = np.array(image[None])
        yield single if ours else normalised(single, how)


def open_artifact(runtime: str, path: Path, threads: int = 1) -> tuple[Runner, Runner]:
    """Return what lays out one NCHW image as the artifact takes it, and what runs it."""
    match runtime:
        case "onnx":
            return np.ascontiguousarray, _onnx(path, threads)
        case "openvino":
            return np.ascontiguousarray, _openvino(path, threads)
        case "tflite":
            return _tflite(path, threads)
        case "coreml":
            return np.ascontiguousarray, _coreml(path, threads)
    raise UsageError(f"unknown runtime: {runtime}", allowed=", ".join(SUFFIXES), do="Correct it")


def _onnx(path: Path, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0]


def _openvino(path: Path, threads: int) -> Runner:
    import openvino

    # f32 as in this project's own sessions: elsewhere than in integers nothing is rounded.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    settings |= {"INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda image: request.infer([image])[0]


def _tflite(path: Path, threads: int) -> tuple[Runner, Runner]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def lay_out(image: Pixels) -> Any:
        first = tuple(given["shape"]) == image.shape
        laid = np.ascontiguousarray(image if first else image.transpose(0, 2, 3, 1))
        scale, zero = given["quantization"]
        if not scale:
            return laid
        limits = np.iinfo(given["dtype"])
        return np.clip(np.rint(laid / scale + zero), limits.min, limits.max).astype(given["dtype"])

    def run(image: Any) -> Pixels:
        interpreter.set_tensor(given["index"], image)
        interpreter.invoke()
        logits: NDArray[Any] = interpreter.get_tensor(made["index"])
        scale, zero = made["quantization"]
        return (logits.astype(np.float32) - zero) * np.float32(scale) if scale else logits

    return lay_out, run


def _coreml(path: Path, threads: int) -> Runner:
    if base.kind_here(base.runtime("coreml")) == "interpreted":
        import torch

        from targets.runtimes._mil import Interpreter
        from targets.runtimes._mil_file import read_program

        torch.set_num_threads(threads)
        run = Interpreter(read_program(path))
        (given,) = run.program.inputs
        return lambda image: next(iter(run(**{given: image}).values()))
    import coremltools as ct

    model = ct.models.MLModel(str(path))
    name = model.get_spec().description.input[0].name
    return lambda image: next(iter(model.predict({name: image}).values()))
