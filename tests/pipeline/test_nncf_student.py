"""NNCF trains our integers: what it computes is what the record holds, before and after."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.collect import collect
from pipeline.arithmetic import round_weights
from pipeline.convnext import seeded
from pipeline.distributed import Group
from pipeline.errors import MissingRuntimeError, TrainingError, UsageError
from pipeline.fold import fold
from pipeline.nncf_quantizers import HOOKS, check_mappable, nncf_torch
from pipeline.nncf_student import NncfLayer, NncfStudent
from pipeline.quantize import Given, layer_grid, quantize
from pipeline.records import (
    PROFILES,
    Architecture,
    Export,
    Finetuning,
    Preprocessing,
    Profile,
    QuantizedModel,
    Scheme,
    Wanted,
)
from pipeline.student import float_network
from pipeline.training_loop import Feed, Loop
from pipeline.worker import silent
from targets.base import runtimes
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

Arrays = dict[str, NDArray[Any]]

SIZE = 32
NET = Architecture(depths=(1, 1), dims=(16, 32), classes=10)
HOW = Preprocessing(input_size=SIZE)
UPDATES, BATCH = 5, 4
LEARNING = Finetuning(
    engine="nncf",
    epochs=1,
    batch=BATCH,
    rate=0.3,
    scale_rate=0.01,
    warm_up=0.0,
    average=0.0,
    block_weight=0.0,
)
BLOCK = "stages/0/blocks/0"
ASYMMETRIC: dict[str, Any] = {
    "num_bits": 8,
    "mode": "asymmetric",
    "signedness_to_force": None,
    "narrow_range": False,
    "half_range": False,
    "scale_shape": (1,),
    "logarithm_scale": False,
    "is_quantized_on_export": False,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n: int, seed: int) -> NDArray[np.float64]:
    """Blurred noise, in float64: the proofs leave no room for float32's."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(n, 3, 4, 4, generator=generator, dtype=torch.float64)
    fine = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
    return fine.clamp(0, 255).numpy()


@cache
def given(net: Architecture = NET) -> Given:
    """A network in which every kind of rescaling has something to do."""
    model = seeded(net, 0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm.weight", "norm.bias")) and tensor.ndim == 1:
                tensor[:2] *= 60
            if name.endswith("depthwise.bias"):
                tensor[3] += 20
            if ".pw" in name and tensor.ndim > 1:
                tensor.mul_(5)  # or the branches would hardly count
    folded, sample = fold(model, HOW), images(32, 1).astype(np.float32)
    return Given(folded=folded, statistics=collect(folded, [sample]), sample=sample)


@cache
def quantized(scheme: Scheme, placement: str) -> tuple[QuantizedModel, Arrays]:
    wanted = Wanted(scheme=scheme, placement=placement)
    return quantize(given(), HOW, wanted, labels=None, parents={})


def of_integers(
    record: QuantizedModel, arrays: Arrays, pixels: NDArray[np.float64], profile: Profile
) -> NDArray[np.float64]:
    """The logits that the reference computes from the record, in float64."""
    can = runtimes()["reference"].capabilities
    export = Export(
        runtime="reference",
        scheme=record.scheme,
        placement=record.placement,
        graph_form=can.graph_forms[0],
        gelu=can.gelu,
        profile=profile,
    )
    wide: Any = pixels
    logits: Any = evaluate(build_graph(record, arrays, can, export), wide)
    assert logits.dtype == np.float64
    return cast("NDArray[np.float64]", logits)


def of_nncf(student: NncfStudent, pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    with torch.no_grad():
        return cast("NDArray[np.float64]", student(torch.from_numpy(pixels)).numpy())


def apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def loop(student: NncfStudent, folder: Path, how: Finetuning = LEARNING) -> Loop:
    """A training of `UPDATES` updates."""

    def batches(epoch: int, start: int) -> Iterator[Any]:
        for step in range(start, UPDATES):
            pixels = torch.from_numpy(images(BATCH, 100 * epoch + step)).to(student.dtype)
            yield pixels.numpy(), np.arange(BATCH, dtype=np.int64)

    teacher = float_network(student.record, student.start).to(student.dtype)
    feed = Feed(per_epoch=UPDATES, batches=batches)
    cpu = torch.device("cpu")
    return Loop(student, teacher, how, feed, keep=folder, ranks=Group(), device=cpu)


def student_of(scheme: Scheme, placement: str) -> NncfStudent:
    return NncfStudent(*quantized(scheme, placement), torch.float64)


def with_another(student: NncfStudent, hook: str) -> None:
    """Put one more of NNCF's quantizers in, and see that it is at work."""
    command = {
        "hook_names_in_model": [hook],
        "module_path": "nncf.torch.quantization.layers",
        "module_cls_name": "AsymmetricQuantizer",
        "module_config": ASYMMETRIC,
    }
    before = of_nncf(student, images(1, 2))
    nncf_torch().load_from_config(student.network, {"compression_state": [command]})
    student.to(student.dtype)
    assert apart(of_nncf(student, images(1, 2)), before) > 1e-6


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pointwise", "pointwise-io", "all"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_before_training_it_computes_what_the_integers_do(scheme: Scheme, placement: str) -> None:
    record, arrays = quantized(scheme, placement)
    student, pixels = student_of(scheme, placement), images(8, 2)
    exact = of_integers(record, arrays, pixels, "avx2")
    assert apart(of_nncf(student, pixels), exact) < 1e-5
    rescaled = {name.rpartition(".")[0].rpartition(".")[2] for name in arrays if "rescale/" in name}
    if placement == "all":
        assert {"stem_out", "dw_out", "ln_out", "res_out", "head_in"} < rescaled
        assert {"rescale/stages.0.scale", "rescale/stages.1.scale"} < arrays.keys()
    with torch.no_grad():
        floats = given().folded(torch.from_numpy(pixels).float()).double().numpy()
    assert apart(exact, floats) > 1e-3  # or nothing could be found out


def test_other_networks_have_other_sites_and_layers_may_stay_float() -> None:
    net = Architecture(
        depths=(2, 1),
        dims=(16, 32),
        classes=6,
        layer_scale=False,
        grn=True,
        stem="overlap_act",
        stem_width=8,
        head_norm_first=True,
        head_width=24,
    )
    floats = ("stages.0.blocks.0.depthwise", "stages.0.blocks.1.pw2", "stages.1.downsample.conv")
    wanted = Wanted(float_layers=floats)
    record, arrays = quantize(given(net), HOW, wanted, labels=None, parents={})
    student, pixels = NncfStudent(record, arrays, torch.float64), images(8, 2)
    assert not student.trained.keys() & set(floats)
    assert apart(of_nncf(student, pixels), of_integers(record, arrays, pixels, "avx2")) < 1e-5


def test_weights_alone_can_be_quantized() -> None:
    record, arrays = quantized("w8", "all")
    pixels = images(8, 2)
    student = student_of("w8", "all")
    assert not student.sites
    assert apart(of_nncf(student, pixels), of_integers(record, arrays, pixels, "avx2")) < 1e-5


@pytest.mark.parametrize(("scheme", "placement"), [("w8a8", "pointwise"), ("w4a8", "all")])
def test_half_precision_does_not_reach_the_quantizers(scheme: Scheme, placement: str) -> None:
    student = NncfStudent(*quantized(scheme, placement))
    pixels = torch.from_numpy(images(2, 2)).float()
    with torch.no_grad():
        full = student(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(student(pixels), full)


def test_paths_are_dropped_while_it_trains() -> None:
    student, pixels = student_of("w8a8", "all"), images(8, 2)
    whole = of_nncf(student, pixels)
    generator = torch.Generator().manual_seed(0)
    student.drop_paths(0.5, generator, (0, 1))
    changed = np.abs(of_nncf(student, pixels) - whole).max(axis=1) > 1e-6 * np.abs(whole).max()
    assert changed.any()


# --- what is learnt -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "placement"),
    [("w8a8", "pointwise"), ("w8a8", "all"), ("w4a8", "pointwise-io"), ("w4a8", "all")],
)
def test_what_was_trained_is_what_the_record_holds(
    scheme: Scheme, placement: str, tmp_path: Path
) -> None:
    record, arrays = quantized(scheme, placement)
    student, pixels = student_of(scheme, placement), images(8, 2)
    learnt = {id(p) for group in student.groups() for p in group}
    frozen = {
        n: v.clone() for n, v in student.state_dict(keep_vars=True).items() if id(v) not in learnt
    }
    loop(student, tmp_path).train(silent)

    after, trained = student.quantized()
    logits = of_nncf(student, pixels)
    assert apart(of_integers(after, trained, pixels, "full"), logits) < 1e-5
    assert apart(of_integers(record, arrays, pixels, "avx2"), logits) > 1e-3  # it learnt something
    assert after == record
    assert trained.keys() == arrays.keys()
    for name, layer in student.trained.items():
        for profile in PROFILES:
            now, before = f"{profile}/{name}", f"avx2/{name}"
            assert (trained[f"{now}.weight"] != arrays[f"{before}.weight"]).mean() > 0.01, name
            assert (trained[f"{now}.bias"] != arrays[f"{before}.bias"]).any(), name
            assert np.array_equal(trained[f"{now}.weight_scale"], arrays[f"{before}.weight_scale"])
        assert {id(layer.weight), id(layer.bias)} <= learnt
    assert len(learnt) == 2 * len(student.trained)
    assert {id(p) for p in student.parameters() if p.requires_grad} == learnt
    state = student.state_dict()
    assert len(frozen) > len(student.trained)
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    for name, array in trained.items():
        if name.startswith(("float/", "rescale/")):
            assert np.array_equal(array, arrays[name]), name


def test_single_precision_gives_the_same_but_for_single_steps(tmp_path: Path) -> None:
    student, pixels = NncfStudent(*quantized("w8a8", "all")), images(8, 2)
    loop(student, tmp_path).train(silent)
    with torch.no_grad():
        logits = student(torch.from_numpy(pixels).float()).double().numpy()
    assert apart(of_integers(*student.quantized(), pixels, "full"), logits) < 1e-2


def test_untrained_integers_come_back() -> None:
    record, arrays = quantized("w8a8", "all")
    after, read = student_of("w8a8", "all").quantized()
    assert after == record
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype, name
        assert np.array_equal(read[name], arrays[name.replace("full/", "avx2/")]), name


def test_integers_are_read_through_nncfs_rounding() -> None:
    """Whatever its quantizer makes of a weight: here one step more."""
    _, arrays = quantized("w4a8", "pointwise")
    student, name = student_of("w4a8", "pointwise"), "stages.0.blocks.0.pw1"
    unit = student.trained[name].unit[:, None]
    quantizer = student.network.get_submodule(f"{HOOKS}.pre_hooks.{BLOCK}/pw1/linear/0__1.0")
    quantizer.register_forward_hook(lambda _module, _inputs, output: output + unit)
    _, read = student.quantized()
    before = arrays[f"avx2/{name}.weight"]
    assert np.array_equal(read[f"full/{name}.weight"], np.minimum(before + 1, 7))


def test_a_training_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    how = replace(LEARNING, drop_path=0.3, block_weight=0.1)
    whole = student_of("w8a8", "all")
    loop(whole, tmp_path / "whole", how).train(silent)
    parts = tmp_path / "parts"
    first = loop(student_of("w8a8", "all"), parts, how)

    def stop(done: int, total: int, note: str = "") -> None:
        del total, note
        if done == 2:
            first.stop()

    with pytest.raises(TrainingError, match="stopped after update"):
        first.train(stop)
    resumed = student_of("w8a8", "all")
    loop(resumed, parts, how).train(silent)
    found, wanted = resumed.quantized()[1], whole.quantized()[1]
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    assert all(map(torch.equal, resumed.groups()[0], whole.groups()[0]))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_what_left_the_headroom_is_put_back(scheme: Scheme, tmp_path: Path) -> None:
    student = student_of(scheme, "all")
    loop(student, tmp_path, replace(LEARNING, rate=2.0)).train(silent)
    _, arrays = student.quantized()
    left = set()
    for name in student.trained:
        full, avx2 = (arrays[f"{profile}/{name}.weight"] for profile in ("full", "avx2"))
        grid = layer_grid(scheme, name, full.shape, "avx2")
        allowed = round_weights(avx2.astype(np.float64), grid)
        assert np.array_equal(allowed, avx2), name
        if np.array_equal(round_weights(full.astype(np.float64), grid), full):
            assert np.array_equal(avx2, full), name
        else:
            left.add(name)
            assert np.abs(avx2.astype(int) - full).max() < 4 * UPDATES, name
        for what in (f"{name}.weight_scale", f"{name}.bias"):
            assert np.array_equal(arrays[f"avx2/{what}"], arrays[f"full/{what}"])
    assert "stem.conv" in left  # its channels make no pairs
    assert any("downsample" in name for name in left)
    assert not any("depthwise" in name for name in left)
    assert any(".pw" in name for name in left) == (scheme == "w8a8")


# --- what has no place ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hook",
    [
        f"post_hooks.{BLOCK}/add/0__0.0",
        f"pre_hooks.{BLOCK}/add/0__0.0",
        f"post_hooks.{BLOCK}/norm/layer_norm/0__0.0",
        f"pre_hooks.{BLOCK}/norm/layer_norm/0__0.0",
        f"pre_hooks.{BLOCK}/pw1/linear/0__1.1",
    ],
)
def test_a_quantizer_without_a_place_is_refused_by_name(hook: str) -> None:
    student = student_of("w8a8", "all")
    check_mappable(student.network, student.places)
    with_another(student, hook)
    with pytest.raises(TrainingError) as caught:
        student.quantized()
    assert hook in caught.value.got
    assert caught.value.got.count("_hooks.") == 1


@pytest.mark.parametrize(
    ("hook", "state", "said"),
    [
        (f"pre_hooks.{BLOCK}/pw1/linear/0__1.0", "scale", "another scale"),
        (f"pre_hooks.{BLOCK}/pw1/linear/0__0.0", "input_low", "zero point"),
        (f"pre_hooks.{BLOCK}/pw2/linear/0__0.0", "enabled", "off"),
    ],
)
def test_a_grid_that_moved_is_refused_by_name(hook: str, state: str, said: str) -> None:
    student = student_of("w8a8", "pointwise")
    with torch.no_grad():
        values = student.network.state_dict()
        values[f"{HOOKS}.{hook}.{state}"] = values[f"{HOOKS}.{hook}.{state}"] * 0.9
        student.network.load_state_dict(values)
    with pytest.raises(TrainingError) as caught:
        student.quantized()
    assert f"{hook} ({said}" in caught.value.got


def test_bits_that_changed_are_refused_by_name() -> None:
    student = student_of("w4a8", "pointwise")
    hook = f"pre_hooks.{BLOCK}/pw1/linear/0__1.0"
    quantizer: Any = student.network.get_submodule(f"{HOOKS}.{hook}")
    quantizer.num_bits = 8
    with pytest.raises(TrainingError, match=r"pw1/linear/0__1\.0 \(integers from -128 to 127"):
        student.quantized()


def test_a_quantizer_that_is_never_called_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(_layer: NncfLayer, name: str) -> str:
        return f"{name.replace('.', '/')}/matmul/0"

    monkeypatch.setattr(NncfLayer, "operation", renamed)
    with pytest.raises(TrainingError, match=r"pw1/matmul/0__1\.0 \(called 0 times"):
        student_of("w8a8", "pointwise")


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dynamic", "float"])
def test_other_schemes_are_refused_by_name(scheme: Scheme) -> None:
    record, arrays = quantized("w8a8", "pointwise")
    with pytest.raises(UsageError, match=rf"scheme {scheme}\. Allowed: w8a8, w4a8 or w8\."):
        NncfStudent(replace(record, scheme=scheme), arrays)


# --- nncf -----------------------------------------------------------------------------------------


def test_without_nncf_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.delitem(sys.modules, "nncf.torch", raising=False)
    with pytest.raises(MissingRuntimeError, match=r"pip install 'convnext-edge\[nncf\]'"):
        student_of("w8a8", "pointwise")


def test_without_nvcc_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of("w8a8", "pointwise")

    def fails(_image: torch.Tensor) -> torch.Tensor:
        raise import_module("nncf").InstallationError

    monkeypatch.setattr(student.network, "forward", fails)
    with pytest.raises(MissingRuntimeError, match="nvcc"):
        of_nncf(student, images(1, 2))


@pytest.mark.parametrize("before", [None, "false"])
def test_the_environment_stays_as_it_was(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    if before is not None:
        monkeypatch.setenv("CI", before)
    nncf_torch()
    assert os.environ.get("CI") == before


def test_telemetry_is_off(tmp_path: Path) -> None:
    """In a process of its own: NNCF sends nothing where it sees pytest."""
    kept = {n: v for n, v in os.environ.items() if n not in {"CI", "NNCF_CI", "NNCF_DEV"}}
    code = (
        "from pipeline.nncf_quantizers import nncf_torch; nncf_torch(); import nncf.telemetry as t;"
        "print(type(t.telemetry).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "MagicMock"
    assert not [path for path in tmp_path.rglob("*cid*") if path.is_file()]
