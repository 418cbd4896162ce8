"""Folding keeps the function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pipeline.embedded
from pipeline.checkpoint import load_model
from pipeline.convnext import ChannelNorm, ConvNeXt, LayerScale, seeded
from pipeline.fold import fold
from pipeline.records import Architecture, Preprocessing

IMAGENET = Preprocessing(input_size=32)
HALF = Preprocessing(input_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
UNEVEN = Preprocessing(input_size=32, mean=(0.0, 0.9, -0.3), std=(0.01, 1.0, 3.0))

NETS = {
    "odd": Architecture(depths=(1, 2, 1), dims=(7, 13, 21), classes=5),
    "no-scale": Architecture(depths=(1, 1), dims=(8, 16), classes=3, layer_scale=False),
    "one-stage": Architecture(depths=(2,), dims=(11,), classes=2, patch=2, kernel=3, expansion=3),
    "four-stages": Architecture(depths=(1, 1, 3, 1), dims=(8, 12, 20, 28), classes=10),
}


def _pixels(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (3, 3, 32, 32), generator=generator).to(dtype)


def _logits(model: ConvNeXt, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    dtype = next(model.parameters()).dtype
    pixels = _pixels(dtype)
    mean, std = (
        torch.tensor(values, dtype=dtype)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    with torch.no_grad():
        return model((pixels / 255 - mean) / std), fold(model, preprocessing)(pixels)


def _error(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())


def _trained() -> ConvNeXt:
    return load_model(Path(pipeline.embedded.__file__).parent / "digits.safetensors")


@pytest.mark.parametrize("preprocessing", [IMAGENET, UNEVEN], ids=["imagenet", "uneven"])
@pytest.mark.parametrize("name", NETS)
def test_seeded_nets_give_the_same_logits(name: str, preprocessing: Preprocessing) -> None:
    model = seeded(NETS[name], seed=11)
    if preprocessing is IMAGENET:
        assert _error(*_logits(model, preprocessing)) < 1e-5
    assert _error(*_logits(model.double(), preprocessing)) < 1e-12


def test_the_trained_checkpoint_gives_the_same_logits() -> None:
    model = _trained()
    assert _error(*_logits(model, HALF)) < 1e-5
    assert _error(*_logits(model.double(), HALF)) < 1e-12


def test_another_normalisation_gives_other_logits() -> None:
    model = seeded(NETS["odd"], seed=11).double()
    expected, _ = _logits(model, IMAGENET)
    with torch.no_grad():
        found = fold(model, HALF)(_pixels(torch.float64))
    assert _error(expected, found) > 1e-3


def test_the_given_model_is_left_as_it_is() -> None:
    model = seeded(NETS["odd"], seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model, IMAGENET)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_stem_keeps_an_affine_and_no_scale_is_left(dtype: torch.dtype) -> None:
    folded = fold(seeded(NETS["odd"], seed=3).to(dtype), IMAGENET)
    affine = [
        name
        for name, module in folded.named_modules()
        if isinstance(module, ChannelNorm) and module.weight is not None
    ]
    assert affine == ["stem.norm"]
    assert not any(isinstance(module, LayerScale) for module in folded.modules())
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}
    assert folded.folded
    assert not folded.training
