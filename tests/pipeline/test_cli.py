"""What a user can do wrong: one line, the right exit code, and nothing half-made."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import safetensors.torch
import torch
from PIL import Image

from pipeline import checkpoint
from pipeline.cli_run import err_console, out_console
from pipeline.convnext import seeded
from pipeline.dialect import all_dialects
from pipeline.records import Architecture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CLI = (sys.executable, "-P", "-m", "pipeline.cli")
ERROR_LINE = re.compile(r"error: (?P<got>.+?)\. Allowed: (?P<allowed>.+?)\. (?P<do>[A-Z].+)\.")
TINY = Architecture(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), classes=2)
INTERRUPTED = 130
DIGITS = Path(__file__).parents[2] / "pipeline" / "embedded" / "digits.safetensors"
FEW = ("--calibration-images", "32")
WITHOUT_ONNXRUNTIME = """
import importlib.metadata as metadata

_version = metadata.version


def version(name):
    if name == "onnxruntime":
        raise metadata.PackageNotFoundError(name)
    return _version(name)


metadata.version = version
"""


class Place(NamedTuple):
    """Where a case works: `tmp` is its own, `exported` the run folder that all share."""

    tmp: Path
    exported: Path

    @property
    def out(self) -> Path:
        """The run folder that the command is given."""
        return self.tmp / "out"


class Asked(NamedTuple):
    """A command line, the environment it adds, and whether it starts from a loaded model."""

    words: Sequence[str | Path]
    environment: dict[str, str] | None = None
    loaded: bool = False


class Case(NamedTuple):
    """A mistake: how to make it, what its line must name, and its exit code."""

    name: str
    make: Callable[[Place], Asked]
    names: tuple[str, ...]
    code: int = 1


def _run(
    words: Sequence[str | Path], cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the embedded model with ONNX and TFLite artifacts."""
    folder = tmp_path_factory.mktemp("exported")
    words = ["export", "--out", "run", "--runtimes", "onnx,tflite", "--scheme", "float"]
    _run([*words, "--calibration-images", "8", "--eval", "none"], folder)
    assert (folder / "run" / "report.json").is_file()
    return folder / "run"


# --- bad files ----------------------------------------------------------------------------------


def _image(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (colour, colour, colour)).save(path)


def _bomb() -> bytes:
    """A PNG of a few bytes that says it is 60000 pixels a side."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


class _RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def _state() -> dict[str, torch.Tensor]:
    return seeded(TINY, 0).state_dict()


def _from_checkpoint(place: Place, name: str, *, size: int = 32, data: str = "digits") -> Asked:
    words: list[str | Path] = ["quantize", "--out", place.out, "--checkpoint", place.tmp / name]
    return Asked([*words, "--data", data, "--input-size", str(size), "--eval", "none"])


def _from_data(place: Place, *more: str | Path) -> Asked:
    words: list[str | Path] = ["quantize", "--out", place.out, "--data", place.tmp / "data", *more]
    return Asked(words, loaded=True)


def _no_checkpoint(place: Place) -> Asked:
    return _from_checkpoint(place, "absent.pth")


def _folder_as_checkpoint(place: Place) -> Asked:
    (place.tmp / "folder.pth").mkdir()
    return _from_checkpoint(place, "folder.pth")


def _truncated_pickle(place: Place) -> Asked:
    path = place.tmp / "cut.pth"
    torch.save(_state(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return _from_checkpoint(place, "cut.pth")


def _truncated_safetensors(place: Place) -> Asked:
    path = place.tmp / "cut.safetensors"
    checkpoint.save(path, seeded(TINY, 0), labels=None)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return _from_checkpoint(place, "cut.safetensors")


def _pickle_with_code(place: Place) -> Asked:
    torch.save({"model": _RunsCode(place.tmp / "marker")}, place.tmp / "code.pth")
    return _from_checkpoint(place, "code.pth")


def _plain_pickle_with_code(place: Place) -> Asked:
    (place.tmp / "plain.pth").write_bytes(pickle.dumps(_RunsCode(place.tmp / "marker")))
    return _from_checkpoint(place, "plain.pth")


def _not_a_convnext(place: Place) -> Asked:
    torch.save({"layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3)}, place.tmp / "resnet.pth")
    return _from_checkpoint(place, "resnet.pth")


def _nan_weights(place: Place) -> Asked:
    state = _state()
    next(iter(state.values())).view(-1)[0] = float("nan")
    torch.save(state, place.tmp / "nan.pth")
    return _from_checkpoint(place, "nan.pth")


def _sparse_weights(place: Place) -> Asked:
    state = {name: t.to_sparse() if t.ndim == 2 else t for name, t in _state().items()}
    torch.save(state, place.tmp / "sparse.pth")
    return Asked(["inspect", place.tmp / "sparse.pth"])


def _pickle_of_itself(place: Place) -> Asked:
    wrapped: dict[str, object] = {}
    wrapped["model"] = wrapped
    torch.save(wrapped, place.tmp / "loop.pth")
    return Asked(["inspect", place.tmp / "loop.pth"])


def _huge_metadata(place: Place) -> Asked:
    stated = {"architecture": {"depths": [10**7], "dims": [4], "classes": 2}}
    metadata = {checkpoint.METADATA_KEY: json.dumps(stated)}
    path = place.tmp / "huge.safetensors"
    safetensors.torch.save_file(_state(), path, metadata)
    return Asked(["inspect", path])


def _bad_sidecar(place: Place) -> Asked:
    checkpoint.save(place.tmp / "tiny.safetensors", seeded(TINY, 0), labels=None)
    (place.tmp / "tiny.json").write_text('{"input_size": "big"}')
    return Asked(["inspect", place.tmp / "tiny.safetensors"])


def _odd_input_size(place: Place) -> Asked:
    checkpoint.save(place.tmp / "tiny.safetensors", seeded(TINY, 0), labels=None)
    return _from_checkpoint(place, "tiny.safetensors", size=50)


def _no_data(place: Place) -> Asked:
    checkpoint.save(place.tmp / "tiny.safetensors", seeded(TINY, 0), labels=None)
    words: list[str | Path] = [
        "quantize",
        "--out",
        place.out,
        "--checkpoint",
        place.tmp / "tiny.safetensors",
    ]
    return Asked([*words, "--input-size", "32"])


def _empty_data(place: Place) -> Asked:
    (place.tmp / "data").mkdir()
    return _from_data(place)


def _absent_data(place: Place) -> Asked:
    return _from_data(place)


def _damaged_zip(place: Place) -> Asked:
    path = place.tmp / "data"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.bmp", bytes(10_000))
    data = path.read_bytes()
    path.write_bytes(data[:36] + b"\xff" * 4 + data[40:])
    return _from_data(place, "--eval", "none")


def _zip_without_directory(place: Place) -> Asked:
    path = place.tmp / "data"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", bytes(1000))
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PKxx"))
    return _from_data(place, "--eval", "none")


def _text_as_image(place: Place) -> Asked:
    (place.tmp / "data").mkdir()
    (place.tmp / "data" / "notes.jpg").write_text("not an image\n")
    return _from_data(place, "--eval", "none")


def _bomb_as_image(place: Place) -> Asked:
    (place.tmp / "data").mkdir()
    (place.tmp / "data" / "bomb.png").write_bytes(_bomb())
    return _from_data(place, "--eval", "none")


def _mixed_data(place: Place) -> Asked:
    _image(place.tmp / "data" / "0" / "a.png", 10)
    _image(place.tmp / "data" / "b.png", 20)
    return _from_data(place)


def _more_classes_than_model(place: Place) -> Asked:
    for index in range(11):
        _image(place.tmp / "data" / f"class{index}" / "a.png", 10 * index)
    words: list[str | Path] = ["quantize", "--out", place.out, "--eval", place.tmp / "data"]
    return Asked(words, loaded=True)


# --- bad words ----------------------------------------------------------------------------------


def _unknown_runtime(place: Place) -> Asked:
    return Asked(["run", "--out", place.out, "--runtimes", "onnx,tensorrt"])


def _unknown_scheme(place: Place) -> Asked:
    return Asked(["run", "--out", place.out, "--scheme", "w4a4"])


def _bad_mean(place: Place) -> Asked:
    return Asked(["run", "--out", place.out, "--mean", "grey"])


def _unwritable_out(place: Place) -> Asked:
    (place.tmp / "file").write_text("")
    return Asked(["quantize", "--out", place.tmp / "file" / "out"])


def _runtime_not_installed(place: Place) -> Asked:
    site = place.tmp / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WITHOUT_ONNXRUNTIME)
    words: list[str | Path] = ["run", "--out", place.out, "--runtimes", "onnx"]
    return Asked(words, environment={"PYTHONPATH": str(site)})


def _recipe(place: Place, text: str) -> Asked:
    (place.tmp / "recipe.toml").write_text(text)
    return Asked(["run", "--out", place.out, "--recipe", place.tmp / "recipe.toml"])


def _malformed_recipe(place: Place) -> Asked:
    return _recipe(place, 'data = "digits\n')


def _unknown_recipe_key(place: Place) -> Asked:
    return _recipe(place, "colour = 3\n")


def _gate_on_no_run(place: Place) -> Asked:
    return Asked(["gate", place.tmp])


def _report_on_no_run(place: Place) -> Asked:
    return Asked(["report", place.tmp])


# --- bad artifacts ------------------------------------------------------------------------------


def _predict_truncated(place: Place, suffix: str) -> Asked:
    whole = next(place.exported.glob(f"artifacts/*-float/model{suffix}"))
    cut = place.tmp / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    _image(place.tmp / "a.png", 100)
    return Asked(["predict", cut, place.tmp / "a.png"])


def _predict_truncated_onnx(place: Place) -> Asked:
    return _predict_truncated(place, ".onnx")


def _predict_truncated_tflite(place: Place) -> Asked:
    return _predict_truncated(place, ".tflite")


def _predict_no_image(place: Place) -> Asked:
    (place.tmp / "notes.txt").write_text("not an image\n")
    artifact = place.exported / "artifacts" / "onnx-float" / "model.onnx"
    return Asked(["predict", artifact, place.tmp / "notes.txt"])


def _explain_artifact(place: Place) -> Asked:
    return Asked(["explain", place.exported / "artifacts" / "onnx-float" / "model.onnx"])


def _foreign_artifact(place: Place) -> Asked:
    mine = shutil.copytree(place.exported, place.tmp / "mine")
    (mine / "artifacts" / "onnx-float" / "notes.txt").write_text("mine")
    words = ("export", "--runtimes", "onnx", "--scheme", "float", "--eval", "none")
    return Asked([*words, "--calibration-images", "8", "--out", mine])


def _images_of(place: Place, *device: str) -> Asked:
    return Asked(["verify", place.exported, "--images", "20", *device])


def _outputs_on_nothing(place: Place) -> Asked:
    return Asked(["verify", place.exported, "--device", "cpu:avx2"])


def _budget(place: Place, text: str) -> Asked:
    (place.tmp / "budget.toml").write_text(text)
    return Asked(["gate", place.exported, "--budget", place.tmp / "budget.toml"])


def _limit_beside_gate(place: Place) -> Asked:
    return _budget(place, "max_size_ratio = 0.01\n[gate]\nmax_float_layers = 9\n")


def _unknown_requirement(place: Place) -> Asked:
    return _budget(place, 'require = ["onyx"]\n')


# --- any ConvNeXt, from anywhere ----------------------------------------------------------------


def _own(place: Place, architecture: Architecture = TINY) -> Path:
    path = place.tmp / "tiny.safetensors"
    checkpoint.save(path, seeded(architecture, 0), labels=None)
    return path


def _hub_without_network(place: Place) -> Asked:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(place.tmp / "hub")}
    return Asked(["inspect", "hf:someone/convnext"], environment=nowhere)


def _hub_without_owner(place: Place) -> Asked:
    return Asked(["inspect", "hf:convnext"], environment={"HF_HOME": str(place.tmp / "hub")})


def _unknown_weights(place: Place) -> Asked:
    return Asked(["inspect", _own(place), "--weights", "best"])


def _cut_timm(place: Place) -> Asked:
    return _cut(place, "timm", "stages.1.blocks.0.mlp.fc2.bias")


def _cut_torchvision(place: Place) -> Asked:
    return _cut(place, "torchvision", "features.1.0.layer_scale", "features.7.0.block.5.bias")


def _half_a_norm(place: Place) -> Asked:
    return _cut(place, "torchvision", "features.0.1.weight")


def _cut(place: Place, dialect: str, *names: str) -> Asked:
    whole = all_dialects()[dialect].original(_state(), TINY)
    for name in names:
        del whole[name]
    torch.save(whole, place.tmp / "cut.pth")
    return Asked(["inspect", place.tmp / "cut.pth"])


def _absent_average(place: Place) -> Asked:
    torch.save({"model": _state()}, place.tmp / "plain.pth")
    return Asked(["inspect", place.tmp / "plain.pth", "--weights", "ema"])


def _backbone_only(place: Place) -> Asked:
    state = {n: t for n, t in _state().items() if not n.startswith("head.")}
    torch.save({n: t for n, t in state.items() if n != "norm.weight"}, place.tmp / "trunk.pth")
    return Asked(["inspect", place.tmp / "trunk.pth"])


def _rms_norm(place: Place) -> Asked:
    tensors = {
        "stem.0.weight": torch.ones(4, 3, 4, 4),
        "stem.0.bias": torch.ones(4),
        "stem.1.weight": torch.ones(4),
        "stages.0.blocks.0.conv_dw.weight": torch.ones(4, 1, 7, 7),
        "stages.0.blocks.0.conv_dw.bias": torch.ones(4),
        "stages.0.blocks.0.norm.weight": torch.ones(4),
        "head.norm.weight": torch.ones(4),
        "head.fc.weight": torch.ones(2, 4),
        "head.fc.bias": torch.ones(2),
    }
    torch.save(tensors, place.tmp / "zepto.pth")
    return Asked(["inspect", place.tmp / "zepto.pth"])


def _convert_to_nobody(place: Place) -> Asked:
    return Asked(["convert", _own(place), "--to", "keras", "--out", place.tmp / "a.pth"])


def _convert_to_odd_ending(place: Place) -> Asked:
    return Asked(["convert", _own(place), "--to", "meta", "--out", place.tmp / "a.h5"])


def _convert_what_cannot_be(place: Place) -> Asked:
    v2 = replace(TINY, grn=True, layer_scale=False)
    out = place.tmp / "a.pth"
    return Asked(["convert", _own(place, v2), "--to", "torchvision", "--out", out])


def _grey_network_with_colours(place: Place) -> Asked:
    _own(place, replace(TINY, in_channels=1))
    return _from_checkpoint(place, "tiny.safetensors")


def _unknown_class_order(place: Place) -> Asked:
    _own(place)
    asked = _from_checkpoint(place, "tiny.safetensors")
    return Asked([*asked.words, "--class-order", place.tmp / "absent.txt", "--eval", "digits"])


def _predict_from_pipe(place: Place) -> Asked:
    os.mkfifo(place.tmp / "pipe.png")
    artifact = place.exported / "artifacts" / "onnx-float" / "model.onnx"
    return Asked(["predict", artifact, place.tmp / "pipe.png"])


def _even_kernel(place: Place) -> Asked:
    state = _state()
    name = next(name for name in state if state[name].shape[-1] == 7)
    state[name] = state[name][..., :4, :4].contiguous()
    torch.save(state, place.tmp / "even.pth")
    return Asked(["inspect", place.tmp / "even.pth"])


def _deep_metadata(place: Place) -> Asked:
    metadata = {checkpoint.METADATA_KEY: "[" * 200_000}
    path = place.tmp / "deep.safetensors"
    safetensors.torch.save_file({"conv.weight": torch.zeros(3)}, path, metadata)
    return Asked(["inspect", path])


def _class_name_that_steers(place: Place) -> Asked:
    path = _own(place)
    path.with_suffix(".json").write_text(json.dumps({"classes": ["cat", "\x1b[2Jdog"]}))
    return Asked(["inspect", path])


def _loop_of_links(place: Place) -> Asked:
    (place.tmp / "data").symlink_to(place.tmp / "data")
    return Asked(["quantize", "--out", place.out, "--data", place.tmp / "data"])


def _odd_words(*more: str) -> Asked:
    return Asked(["quantize", *more])


CASES = (
    Case("unknown flag", lambda _: _odd_words("--sead", "1"), ("--sead", "--seed"), code=2),
    Case("no argument", lambda _: Asked(["verify"]), ("run_dir", "verify --help"), code=2),
    Case("unknown command", lambda _: Asked(["quantise"]), ("quantise", "--help"), code=2),
    Case("foreign file", _foreign_artifact, ("notes.txt", "move what is yours"), code=2),
    Case("images of nobody", _images_of, ("--images 20", "--device"), code=2),
    Case("images of local", lambda p: _images_of(p, "--device", "local"), ("local",), code=2),
    Case("outputs on nothing", _outputs_on_nothing, ("--eval none",), code=2),
    Case("limit beside gate", _limit_beside_gate, ("max_size_ratio", "[gate]"), code=2),
    Case("unknown requirement", _unknown_requirement, ("'onyx'", "onnx, openvino"), code=2),
    Case("no word", lambda _: _odd_words("--checkpoint", ""), ("checkpoint is ''",), code=2),
    Case("number in quotes", lambda p: _recipe(p, "seed = '3'\n"), ("seed is '3'",), code=2),
    Case("no threads", lambda _: Asked(["run", "--threads", "0"]), ("--threads", "1"), code=2),
    Case("batch of words", lambda _: _odd_words("--batch", "two"), ("`dynamic`",), code=2),
    Case("explain an artifact", _explain_artifact, ("model.onnx", "--latency")),
    Case("missing tensor", _cut_timm, ("missing stages.1.blocks.0.mlp.fc2.bias",)),
    Case("missing scale", _cut_torchvision, ("cut.pth", "missing stages.3.blocks.0.pw2.bias (can")),
    Case("half a norm", _half_a_norm, ("unknown features.0.1.bias",)),
    Case("flag without value", lambda _: Asked(["run", "--data"]), ("--data", "run --he"), code=2),
    Case("pipe as image", _predict_from_pipe, ("pipe.png", "not a file")),
    Case("even kernel", _even_kernel, ("even.pth", "side 4", "odd sides")),
    Case("deep metadata", _deep_metadata, ("deep.safetensors", "conv.weight")),
    Case("class name that steers", _class_name_that_steers, ("x1b", "printable names")),
    Case("loop of links", _loop_of_links, ("data", "no such folder")),
    Case("superscript batch", lambda _: _odd_words("--batch", "²"), ("batch", "²"), code=2),
    Case("tiny crop", lambda _: _odd_words("--crop-ratio", "5e-324"), ("0.05",), code=2),
    Case("huge input", lambda _: _odd_words("--input-size", "9" * 20), ("4096",), code=2),
    Case(
        "no runtime", lambda _: _odd_words("--runtimes", ","), ("runtimes", "at least one"), code=2
    ),
    Case("name not UTF-8", lambda _: _odd_words("--data", "d\udcff"), ("UTF-8",), code=2),
    Case("overlong place", lambda _: _odd_words("--data", "d" * 5000), ("name too long",)),
    Case("hub without network", _hub_without_network, ("hf:someone/convnext", "network")),
    Case("hub without owner", _hub_without_owner, ("hf:convnext", "hf:owner/name")),
    Case("unknown weights", _unknown_weights, ("--weights best", "auto, model, ema"), code=2),
    Case("absent average", _absent_average, ("plain.pth", "moving average", "model")),
    Case("backbone only", _backbone_only, ("trunk.pth", "backbone only")),
    Case("RMSNorm", _rms_norm, ("zepto.pth", "timm", "RMSNorm")),
    Case("convert to nobody", _convert_to_nobody, ("keras", "torchvision"), code=2),
    Case("convert to an odd ending", _convert_to_odd_ending, ("a.h5", ".safetensors"), code=2),
    Case("convert what cannot be", _convert_what_cannot_be, ("torchvision", "GRN")),
    Case("grey network", _grey_network_with_colours, ("takes 1 channels", "--mean 0.5")),
    Case("unknown class order", _unknown_class_order, ("absent.txt",)),
    Case("no checkpoint", _no_checkpoint, ("no such checkpoint", "absent.pth", ".safetensors")),
    Case("folder as checkpoint", _folder_as_checkpoint, ("folder.pth is a folder",)),
    Case("truncated pickle", _truncated_pickle, ("cut.pth", "truncated or damaged")),
    Case("truncated safetensors", _truncated_safetensors, ("cut.safetensors", "truncated")),
    Case("pickle with code", _pickle_with_code, ("code.pth", "run code", "refused")),
    Case("plain pickle with code", _plain_pickle_with_code, ("plain.pth", "run code", "refused")),
    Case("not a ConvNeXt", _not_a_convnext, ("layer1.0.conv1.weight", "names like", "stages.")),
    Case("NaN weights", _nan_weights, ("nan.pth", "stem", "NaN", "finite weights")),
    Case("sparse weights", _sparse_weights, ("sparse.pth", "sparse_coo", "dense tensors")),
    Case("pickle of itself", _pickle_of_itself, ("loop.pth", "without named tensors")),
    Case("huge metadata", _huge_metadata, ("huge.safetensors", "agrees with the tensors")),
    Case("bad sidecar", _bad_sidecar, ("input size 'big'", "multiples of 32")),
    Case("odd input size", _odd_input_size, ("input size 50", "multiples of 32", "32 or 64")),
    Case("no data", _no_data, ("checkpoint without data", "--data"), code=2),
    Case("empty data", _empty_data, ("holds no images", ".jpg")),
    Case("absent data", _absent_data, ("no such folder or file", "a folder of images")),
    Case("damaged zip", _damaged_zip, ("a.bmp", "unreadable", "damaged")),
    Case("zip without directory", _zip_without_directory, ("data cannot be read", "archive")),
    Case("text as image", _text_as_image, ("notes.jpg", "unreadable", "damaged")),
    Case("decompression bomb", _bomb_as_image, ("bomb.png", "pixels", "at most")),
    Case("mixed data", _mixed_data, ("is mixed", "one folder per class")),
    Case(
        "more classes than the model",
        _more_classes_than_model,
        ("has 11 classes, the model 10", "exactly the model's classes"),
    ),
    Case("unknown runtime", _unknown_runtime, ("tensorrt", "onnx", "tflite"), code=2),
    Case("unknown scheme", _unknown_scheme, ("w4a4", "float", "w8a8"), code=2),
    Case("mean of words", _bad_mean, ("--mean", "grey", "three numbers"), code=2),
    Case("unwritable out", _unwritable_out, ("cannot write", "file/out", "--out")),
    Case("runtime not installed", _runtime_not_installed, ("onnxruntime missing", "[onnx]")),
    Case("malformed recipe", _malformed_recipe, ("recipe.toml", "TOML"), code=2),
    Case("unknown recipe key", _unknown_recipe_key, ("colour", "checkpoint, data"), code=2),
    Case("gate on no run", _gate_on_no_run, ("is not a run folder", "convnext-edge run")),
    Case("report on no run", _report_on_no_run, ("report.json",)),
    Case("truncated .onnx", _predict_truncated_onnx, ("cut.onnx", "convnext-edge")),
    Case("truncated .tflite", _predict_truncated_tflite, ("cut.tflite", "convnext-edge")),
    Case("predict on no image", _predict_no_image, ("notes.txt", "not a readable image")),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_says_a_mistake_in_one_line(case: Case, tmp_path: Path, exported: Path) -> None:
    place = Place(tmp_path, exported)
    asked = case.make(place)
    if asked.loaded:
        for folder in exported.glob("stages/checkpoint-*"):
            shutil.copytree(folder, place.out / "stages" / folder.name)
    done = _run(asked.words, tmp_path, asked.environment)

    assert done.returncode == case.code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    assert ERROR_LINE.fullmatch(lines[0]), lines[0]
    for word in case.names:
        assert word in lines[0]
    assert not list(tmp_path.rglob(".partial-*"))
    assert not (place.out / "artifacts").exists()
    assert not (tmp_path / "marker").exists(), "the pickle's code ran"


def test_no_words_give_the_help_and_version_the_version(tmp_path: Path) -> None:
    for environment in ({}, {"TYPER_USE_RICH": "0"}):
        done = _run([], tmp_path, environment)
        assert done.returncode == 2
        assert "Usage" in done.stdout + done.stderr
        assert "error:" not in done.stdout + done.stderr
    assert re.fullmatch(r"convnext-edge \d+\.\d+.*\n", _run(["--version"], tmp_path).stdout)


@pytest.mark.parametrize(("where", "code"), [(">&-", 0), (">/dev/full", 1)])
def test_standard_output_that_takes_nothing_is_no_traceback(
    where: str, code: int, tmp_path: Path
) -> None:
    command = " ".join([*CLI, "inspect", str(DIGITS), where])
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("cannot use standard output (No space left" in done.stderr) is bool(code)


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for console in (out_console, err_console):
        console.print("emulated-arm64:phone: it counts", markup=False, highlight=False)
    assert capsys.readouterr() == ("emulated-arm64:phone: it counts\n",) * 2
