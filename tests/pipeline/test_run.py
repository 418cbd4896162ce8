"""What a run takes from the recipe and what from the files beside the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint
from pipeline.convnext import seeded
from pipeline.locate import locate
from pipeline.quantize import write
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Architecture, QuantizedModel
from pipeline.run import preprocessing_of, trained_on
from pipeline.sidecar import read_sidecar


@pytest.mark.parametrize(
    ("stated", "flags", "expected"),
    [
        ({"resize_size": 256}, {"crop_ratio": 0.95}, (235, "center")),
        ({"crop_mode": "squash"}, {"crop_ratio": 0.5}, (448, "center")),
        ({"crop_ratio": 0.5, "mean": [0.1] * 3}, {}, (448, "center")),
        ({"crop_ratio": 0.5}, {"crop_mode": "squash"}, (256, "squash")),
    ],
)
def test_a_flag_of_the_crop_is_not_undone_by_the_sidecar(
    stated: dict[str, Any], flags: dict[str, Any], expected: tuple[int, str], tmp_path: Path
) -> None:
    net = Architecture(depths=(1,), dims=(8,), classes=10)
    checkpoint.save(tmp_path / "net.safetensors", seeded(net, 0), labels=None)
    (tmp_path / "net.json").write_text(json.dumps({"input_size": 224, **stated}))
    recipe = load_recipe(
        None, {"checkpoint": str(tmp_path / "net.safetensors"), "preprocessing": flags}
    )
    how = preprocessing_of(recipe, read_sidecar(locate(tmp_path / "net.safetensors")))
    assert (how.shorter_side, how.crop_mode) == expected


def test_training_goes_on_from_the_integers_of_a_folder_that_was_tuned_in_full(
    small_model: tuple[QuantizedModel, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", *small_model)
    stored = Recipe(tune="full", runtimes=("onnx",))
    (tmp_path / "recipe.json").write_text(stored.model_dump_json())
    recipe = trained_on(tmp_path, {})
    assert recipe.finetune is not None
    assert (recipe.tune, recipe.placement) == ("quick", small_model[0].placement)
    (tmp_path / "recipe.json").write_text(Recipe(runtimes=("onnx",)).model_dump_json())
    assert trained_on(tmp_path, {}).placement is None
