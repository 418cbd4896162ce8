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


@pytest.mark.parametrize(
    ("to", "suffix"),
    [
        (to, suffix)
        for to in sorted(all_dialects())
        for suffix in (".safetensors", ".pth", ".bin")
        if to != "own" or suffix == ".safetensors"
    ],
)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (tensor + 1e-3 * torch.rand(tensor.shape, generator=generator).double()).to(dtype)
        for name, tensor in seeded(NET, 1).state_dict().items()
    }
    torch.save(tensors, tmp_path / "start.pth")
    convert(tmp_path / "start.pth", "meta", tmp_path / "meta.pth")
    convert(tmp_path / "meta.pth", "own", tmp_path / "back.safetensors")
    back = checkpoint.load(tmp_path / "back.safetensors").stored
    assert all(back[name].dtype == dtype for name in tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_own_goes_only_where_its_metadata_fits(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"for own a file ending in \.safetensors"):
        convert(own(NET, tmp_path), "own", tmp_path / f"net{suffix}")


@pytest.mark.parametrize(
    "net",
    [
        Architecture(depths=(1,), dims=(8,), classes=3, head_norm_first=True),
        Architecture(depths=(1,), dims=(8,), classes=3, stem="overlap_act", stem_width=8),
        Architecture(depths=(1,), dims=(8,), classes=3, norm_eps=1e-3, head_norm_eps=0.1),
    ],
)
def test_own_keeps_what_tensors_do_not_show(net: Architecture, tmp_path: Path) -> None:
    convert(own(net, tmp_path), "own", tmp_path / "again.safetensors")
    record = checkpoint.load(tmp_path / "again.safetensors").record
    assert record.architecture == net
    assert record.labels == ("ant", "bee", "cat")


def test_preprocessing_that_is_left_behind_is_said(tmp_path: Path) -> None:
    source = own(NET, tmp_path)
    source.with_suffix(".json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
    for to, out in (("meta", "m.pth"), ("own", "o.safetensors"), ("hf", "folder")):
        lost = convert(source, to, tmp_path / out)
        assert any("how images are prepared" in sentence for sentence in lost), to


@pytest.mark.parametrize("net", [NET, V2], ids=["v1", "v2"])
def test_transformers_loads_the_folder_and_computes_the_same(
    net: Architecture, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification

    source = own(net, tmp_path)
    assert convert(source, "hf", tmp_path / "folder") == []
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
