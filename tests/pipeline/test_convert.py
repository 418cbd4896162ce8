"""The way back: bit for bit, in every dialect, and into the other project's own loader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import checkpoint
from pipeline.convert import convert
from pipeline.convnext import ConvNeXt, seeded
from pipeline.dialect import all_dialects
from pipeline.errors import CheckpointError, UsageError
from pipeline.records import Architecture

NET = Architecture(depths=(1, 2), dims=(8, 16), classes=3)
V2 = Architecture(depths=(1, 2), dims=(8, 16), classes=3, grn=True, layer_scale=False)
OTHERS = ("meta", "timm", "torchvision", "hf")
EXPRESSES_V2 = ("meta", "timm", "hf")


def own(net: Architecture, folder: Path) -> Path:
    path = folder / "own.safetensors"
    checkpoint.save(path, seeded(net, 5), labels=("ant", "bee", "cat"))
    return path


def same(a: ConvNeXt, b: ConvNeXt) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize("to", sorted(all_dialects()))
def test_the_round_trip_is_bit_exact(to: str, suffix: str, tmp_path: Path) -> None:
    source = own(NET, tmp_path)
    convert(source, to, tmp_path / f"there{suffix}")
    there = checkpoint.load(tmp_path / f"there{suffix}")
    assert there.record.dialect == to
    convert(tmp_path / f"there{suffix}", "own", tmp_path / "back.safetensors")
    assert same(checkpoint.load_model(source), checkpoint.load_model(tmp_path / "back.safetensors"))


@pytest.mark.parametrize("there", OTHERS)
@pytest.mark.parametrize("here", OTHERS)
def test_every_pair_of_dialects(here: str, there: str, tmp_path: Path) -> None:
    net = NET
    convert(own(net, tmp_path), here, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", there, tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", here, tmp_path / "c.pth")
    first, last = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in "ac")
    first, last = (content.get("model", content) for content in (first, last))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize("to", EXPRESSES_V2)
def test_v2_where_it_can_be_expressed(to: str, tmp_path: Path) -> None:
    source = own(V2, tmp_path)
    convert(source, to, tmp_path / "v2.pth")
    assert same(checkpoint.load_model(source), checkpoint.load_model(tmp_path / "v2.pth"))


def test_what_cannot_be_expressed_is_named(tmp_path: Path) -> None:
    source = own(V2, tmp_path)
    with pytest.raises(CheckpointError, match="GRN"):
        convert(source, "torchvision", tmp_path / "v2.pth")
    assert not (tmp_path / "v2.pth").exists()


def test_half_precision_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {n: t.half() for n, t in seeded(NET, 1).state_dict().items()}
    torch.save(tensors, tmp_path / "half.pth")
    convert(tmp_path / "half.pth", "meta", tmp_path / "meta.pth")
    convert(tmp_path / "meta.pth", "own", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(back[name].dtype == torch.float16 for name in tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("net", [NET, V2], ids=["v1", "v2"])
def test_transformers_loads_the_folder_and_computes_the_same(
    net: Architecture, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification

    source = own(net, tmp_path)
    (lost,) = convert(source, "hf", tmp_path / "folder")
    assert "preprocessor_config.json" in lost
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "folder").eval()
    assert theirs.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    ours = checkpoint.load_model(source)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = ours(image).numpy(), theirs(image).logits.numpy()
    assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
    again = checkpoint.load(tmp_path / "folder")
    assert again.record.labels == ("ant", "bee", "cat")
    assert same(ours, checkpoint.build(again.record, again.tensors))
    assert again.record.architecture.head_norm_eps in {None, net.norm_eps}


def test_an_eps_that_the_other_project_has_not_is_said(tmp_path: Path) -> None:
    model = seeded(Architecture(depths=(1,), dims=(8,), classes=2, norm_eps=1e-3), 0)
    checkpoint.save(tmp_path / "own.safetensors", model, labels=None)
    lost = convert(tmp_path / "own.safetensors", "meta", tmp_path / "meta.pth")
    assert any("eps is 0.001" in sentence for sentence in lost)


@pytest.mark.parametrize(("to", "out"), [("keras", "x.pth"), ("meta", "x.h5"), ("meta", "folder")])
def test_wrong_words(to: str, out: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        convert(own(NET, tmp_path), to, tmp_path / out)
    assert not (tmp_path / out).exists()


def test_the_config_holds_what_the_tensors_say(tmp_path: Path) -> None:
    convert(own(NET, tmp_path), "hf", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["depths"] == [1, 2]
    assert config["hidden_sizes"] == [8, 16]
    assert config["layer_norm_eps"] == NET.norm_eps


@pytest.mark.parametrize(("to", "out"), [("hf", "mine"), ("timm", "mine.pth")])
def test_a_folder_of_somebody_is_never_replaced(to: str, out: str, tmp_path: Path) -> None:
    (tmp_path / out).mkdir()
    (tmp_path / out / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="thesis"):
        convert(own(NET, tmp_path), to, tmp_path / out)
    assert (tmp_path / out / "thesis.txt").read_text() == "years"


def test_an_earlier_result_is_written_over(tmp_path: Path) -> None:
    for _ in range(2):
        convert(own(NET, tmp_path), "hf", tmp_path / "folder")
    assert sorted(item.name for item in (tmp_path / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
