"""Checkpoint files of either dialect become the same network, or one clear error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import pipeline.embedded
from pipeline import checkpoint
from pipeline.convnext import SIZES, ConvNeXt, count_macs, count_parameters, seeded, variant
from pipeline.errors import CheckpointError
from pipeline.infer import infer_architecture
from pipeline.records import Architecture

NET = Architecture(depths=(2, 1, 3), dims=(7, 13, 21), classes=5)

# Written by hand from the reference implementation, the other way round than the dialect's rules.
_TO_META = (
    (r"stem\.conv\.(\w+)", r"downsample_layers.0.0.\1"),
    (r"stem\.norm\.(\w+)", r"downsample_layers.0.1.\1"),
    (r"stages\.(\d)\.downsample\.norm\.(\w+)", r"downsample_layers.\1.0.\2"),
    (r"stages\.(\d)\.downsample\.conv\.(\w+)", r"downsample_layers.\1.1.\2"),
    (r"stages\.(\d)\.blocks\.(\d+)\.depthwise\.(\w+)", r"stages.\1.\2.dwconv.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.norm\.(\w+)", r"stages.\1.\2.norm.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.pw1\.(\w+)", r"stages.\1.\2.pwconv1.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.pw2\.(\w+)", r"stages.\1.\2.pwconv2.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.scale\.weight", r"stages.\1.\2.gamma"),
    (r"head\.norm\.(\w+)", r"norm.\1"),
    (r"head\.fc\.(\w+)", r"head.\1"),
)


def _meta_name(name: str) -> str:
    found = [m.expand(to) for rule, to in _TO_META if (m := re.fullmatch(rule, name))]
    assert len(found) == 1, name
    return found[0]


def _meta(model: ConvNeXt) -> dict[str, Tensor]:
    return {_meta_name(name): tensor for name, tensor in model.state_dict().items()}


@pytest.fixture
def net() -> ConvNeXt:
    return seeded(NET, seed=5)


def _same(model: ConvNeXt, other: ConvNeXt) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_meta_names_round_trip(
    tmp_path: Path, net: ConvNeXt, suffix: str, wrap: str | None
) -> None:
    path = tmp_path / f"net{suffix}"
    content: Any = {wrap: _meta(net), "epoch": 3} if wrap else _meta(net)
    torch.save(content, path)
    loaded = checkpoint.load(path)
    assert loaded.record.dialect == "meta"
    assert loaded.record.architecture == NET
    assert loaded.record.variant == "custom"
    assert {tensor.dtype for tensor in loaded.stored.values()} == {torch.float32}
    rebuilt = checkpoint.build(loaded.record, loaded.tensors)
    assert _same(rebuilt, net)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(rebuilt(image), net(image))


def test_meta_names_in_safetensors(tmp_path: Path, net: ConvNeXt) -> None:
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(_meta(net), path)
    assert _same(checkpoint.load_model(path), net)


def test_our_own_dialect_keeps_architecture_and_labels(tmp_path: Path) -> None:
    architecture = Architecture(depths=(1, 1), dims=(8, 12), classes=2, norm_eps=1e-5)
    model = seeded(architecture, seed=2)
    checkpoint.save(tmp_path / "own.safetensors", model, labels=("cat", "dog"))
    loaded = checkpoint.load(tmp_path / "own.safetensors")
    assert loaded.record.dialect == "own"
    assert loaded.record.architecture == architecture
    assert loaded.record.labels == ("cat", "dog")
    assert _same(checkpoint.build(loaded.record, loaded.tensors), model)


def test_half_precision_is_widened(tmp_path: Path, net: ConvNeXt) -> None:
    torch.save({name: tensor.half() for name, tensor in _meta(net).items()}, tmp_path / "net.pth")
    loaded = checkpoint.load(tmp_path / "net.pth")
    assert {tensor.dtype for tensor in loaded.stored.values()} == {torch.float16}
    assert {tensor.dtype for tensor in loaded.tensors.values()} == {torch.float32}


def test_what_is_written_is_read_again(tmp_path: Path, net: ConvNeXt) -> None:
    torch.save(_meta(net), tmp_path / "net.pth")
    (tmp_path / "net.json").write_text(json.dumps({"classes": list("abcde")}))
    loaded = checkpoint.load(tmp_path / "net.pth")
    checkpoint.write(tmp_path, loaded)
    record, tensors = checkpoint.read(tmp_path)
    assert record == loaded.record
    assert record.labels == tuple("abcde")
    assert _same(checkpoint.build(record, tensors), net)


@pytest.mark.parametrize(
    "architecture",
    [
        NET,
        Architecture(depths=(1,), dims=(4,), classes=3),
        Architecture(depths=(1, 2), dims=(8, 6), classes=3, layer_scale=False),
        Architecture(depths=(1, 12), dims=(4, 4), classes=2, patch=2, kernel=3, expansion=2),
        Architecture(depths=(1, 1), dims=(4, 8), classes=7, in_channels=1),
        Architecture(depths=(1, 1), dims=(4, 8), classes=7, grn=True, layer_scale=False),
        Architecture(depths=(1, 1), dims=(4, 8), classes=7, stem="overlap", stem_width=3),
        Architecture(depths=(1, 1), dims=(4, 8), classes=7, stem="overlap_act", stem_width=4),
        Architecture(depths=(1, 1), dims=(4, 8), classes=7, patch=2, downsample_first=True),
        Architecture(depths=(2,), dims=(4,), classes=7, patch=16, stem_norm=False),
        Architecture(depths=(1,), dims=(4,), classes=7, head_norm_first=True, head_width=9),
    ],
)
def test_the_shape_is_read_off_the_tensors(architecture: Architecture) -> None:
    tensors = seeded(architecture, seed=0).state_dict()
    traits = {"head_norm_first"} if architecture.head_norm_first else set()
    traits |= {"overlap_act"} if architecture.stem == "overlap_act" else set()
    found = infer_architecture(
        tensors, norm_eps=1e-6, head_norm_eps=None, traits=traits, where="net"
    )
    assert found == architecture


@pytest.mark.parametrize(
    ("size", "params", "macs"),
    [
        ("tiny", 28.6, 4.5),
        ("small", 50.2, 8.7),
        ("base", 88.6, 15.4),
        ("large", 197.8, 34.4),
        ("xlarge", 350.2, 60.9),
    ],
)
def test_published_sizes(size: str, params: float, macs: float) -> None:
    depths, dims = SIZES[size]
    architecture = Architecture(depths=depths, dims=dims, classes=1000)
    assert variant(architecture) == size
    assert round(count_parameters(architecture) / 1e6, 1) == params
    assert round(count_macs(architecture, 224) / 1e9, 1) == macs


def test_the_embedded_checkpoint_loads() -> None:
    path = Path(pipeline.embedded.__file__).parent / "digits.safetensors"
    loaded = checkpoint.load(path)
    assert loaded.record.architecture.classes == 10
    assert loaded.suspicions == ()


def _without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if n != name}


def test_a_missing_tensor_is_named(tmp_path: Path, net: ConvNeXt) -> None:
    torch.save(_without(_meta(net), "stages.2.1.pwconv1.bias"), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"missing stages\.2\.1\.pwconv1\.bias"):
        checkpoint.load(tmp_path / "net.pth")


def test_a_missing_head_is_named(tmp_path: Path, net: ConvNeXt) -> None:
    torch.save(_without(_meta(net), "head.weight"), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"head\.fc\.weight .* missing"):
        checkpoint.load(tmp_path / "net.pth")


def test_an_unknown_tensor_is_named(tmp_path: Path, net: ConvNeXt) -> None:
    extra = {**_meta(net), "stages.0.0.attention.weight": torch.ones(3)}
    torch.save(extra, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"unknown stages\.0\.0\.attention\.weight"):
        checkpoint.load(tmp_path / "net.pth")


def test_a_misshapen_tensor_is_named(tmp_path: Path, net: ConvNeXt) -> None:
    torch.save({**_meta(net), "norm.weight": torch.ones(3)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r": norm\.weight has shape \(3,\), not \(21,\)"):
        checkpoint.load(tmp_path / "net.pth")


def test_a_gap_between_stages_is_refused(net: ConvNeXt) -> None:
    kept = {n: t for n, t in net.state_dict().items() if not n.startswith("stages.1.")}
    with pytest.raises(CheckpointError):
        infer_architecture(kept, norm_eps=1e-6, head_norm_eps=None, traits=(), where="net")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, net: ConvNeXt, bad: float) -> None:
    tensors = _meta(net)
    tensors["head.bias"] = torch.tensor([0.0, bad, 0.0, bad, 0.0])
    torch.save(tensors, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"head\.fc\.bias hold values"):
        checkpoint.load(tmp_path / "net.pth")


def test_integer_weights_are_refused(tmp_path: Path, net: ConvNeXt) -> None:
    torch.save({**_meta(net), "head.bias": torch.ones(5, dtype=torch.int8)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"torch\.int8"):
        checkpoint.load(tmp_path / "net.pth")


def test_the_wrong_number_of_labels_is_refused(tmp_path: Path, net: ConvNeXt) -> None:
    torch.save(_meta(net), tmp_path / "net.pth")
    (tmp_path / "net.json").write_text(json.dumps({"classes": ["a", "b"]}))
    with pytest.raises(CheckpointError, match="2 class names for 5 classes"):
        checkpoint.load(tmp_path / "net.pth")


def test_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(3), "fc.bias": torch.ones(3)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"its 2 tensors begin with conv1\.weight"):
        checkpoint.load(tmp_path / "resnet.pth")


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.marker,)


def test_a_file_that_runs_code_is_refused_unrun(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"model": _Payload(marker)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="asks to run code"):
        checkpoint.load(tmp_path / "evil.pth")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(
    tmp_path: Path, net: ConvNeXt, suffix: str, share: float
) -> None:
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(_meta(net), path)
    else:
        safetensors.torch.save_file(_meta(net), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        checkpoint.load(path)


def test_what_is_no_checkpoint_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.h5").write_text("")
    (tmp_path / "folder.pth").mkdir()
    for name, said in (
        ("absent.pth", "no such checkpoint"),
        ("net.h5", r"ends in \.h5"),
        ("folder.pth", "is a folder"),
    ):
        with pytest.raises(CheckpointError, match=said):
            checkpoint.load(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        checkpoint.load(tmp_path / "list.pth")


def test_odd_weights_are_warned_of(tmp_path: Path, net: ConvNeXt) -> None:
    tensors = _meta(net)
    tensors["stages.0.1.gamma"] = torch.full((7,), 1e-6)
    tensors["stages.1.0.pwconv1.weight"] = torch.zeros(52, 13)
    torch.save(tensors, tmp_path / "net.pth")
    warnings = checkpoint.load(tmp_path / "net.pth").suspicions
    assert warnings == (
        "stages.1.blocks.0.pw1.weight: all zero",
        (
            "stages.0.blocks.1.scale.weight: constant at 1e-06, as LayerScale is initialised: "
            "untrained?"
        ),
    )


def test_examining_takes_weights_that_are_not_finite(tmp_path: Path, net: ConvNeXt) -> None:
    torch.save({**_meta(net), "head.bias": torch.full((5,), torch.nan)}, tmp_path / "net.pth")
    loaded = checkpoint.examine(tmp_path / "net.pth")
    assert loaded.not_finite == ("head.fc.bias",)
    assert loaded.suspicions == ("head.fc.bias: NaN or infinite",)


def test_an_average_of_weights_is_preferred(tmp_path: Path, net: ConvNeXt) -> None:
    other = seeded(NET, seed=6)
    torch.save({"model": _meta(net), "model_ema": _meta(other)}, tmp_path / "net.pth")
    loaded = {
        words: checkpoint.load(tmp_path / "net.pth", weights=words)
        for words in ("auto", "ema", "model")
    }
    for words, expected in (("auto", other), ("ema", other), ("model", net)):
        found = loaded[words]
        assert _same(checkpoint.build(found.record, found.tensors), expected)
    assert loaded["auto"].record.found_in == "model_ema"


def test_the_eps_of_every_norm_follows_the_dialect_and_the_sidecar(
    tmp_path: Path, net: ConvNeXt
) -> None:
    torch.save(_meta(net), tmp_path / "net.pth")
    assert checkpoint.load(tmp_path / "net.pth").record.architecture.norm_eps == 1e-6
    (tmp_path / "net.json").write_text(json.dumps({"norm_eps": 1e-5, "head_norm_eps": 1e-12}))
    architecture = checkpoint.load(tmp_path / "net.pth").record.architecture
    assert (architecture.norm_eps, architecture.head_norm_eps) == (1e-5, 1e-12)
    model = checkpoint.load_model(tmp_path / "net.pth")
    assert model.head.norm.eps == 1e-12
    assert model.stem.norm.eps == 1e-5


def test_the_input_must_fit_the_network() -> None:
    checkpoint.check_input(NET, 48)
    with pytest.raises(CheckpointError, match="not a multiple of 16") as caught:
        checkpoint.check_input(NET, 50)
    assert "48 or 64" in str(caught.value)
    grey = Architecture(depths=(1,), dims=(4,), classes=2, in_channels=1)
    checkpoint.check_channels(grey, 1)
    with pytest.raises(CheckpointError, match="takes 1 channels, mean and std are of 3"):
        checkpoint.check_channels(grey, 3)
    satellite = Architecture(depths=(1,), dims=(4,), classes=2, in_channels=8)
    with pytest.raises(CheckpointError, match="takes 8 channels"):
        checkpoint.check_channels(satellite, 8)
