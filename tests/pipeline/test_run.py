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
from pipeline.recipe import Budget, Recipe, load_recipe
from pipeline.records import Accuracy, Architecture, QuantizedModel
from pipeline.run import _keeps, added_to, preprocessing_of, trained_on
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


def folder_of(out: Path, recipe: Recipe, *runtimes: str) -> Path:
    for name in runtimes:
        (out / "artifacts" / f"{name}-float").mkdir(parents=True)
    (out / "recipe.json").write_text(recipe.model_dump_json())
    return out


def test_a_runtime_is_added_to_those_that_are_there_and_nothing_else_changes(
    tmp_path: Path,
) -> None:
    budget = Budget(max_drop_pp=0.5)
    stored = Recipe(runtimes=("onnx", "openvino"), gate=budget, device="cpu:avx2", threads=2)
    out = folder_of(tmp_path, stored, "onnx")
    # openvino was named and never exported: it is not made now either.
    found = added_to(out, Recipe(runtimes=("tflite",)), {"runtimes"})
    assert found == stored.model_copy(update={"runtimes": ("onnx", "tflite")})
    other = Budget(max_drop_pp=2.0)
    found = added_to(out, Recipe(runtimes=("tflite",), gate=other), {"runtimes", "gate"})
    assert (found.gate, found.device) == (other, "cpu:avx2")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"batch": 2}),
        ({}, {"isa": "vnni"}),
        ({}, {"scheme": "float16"}),
        ({}, {"calibration_images": 16}),
        ({"tune": "full"}, {}),
        ({}, {"tune": "full"}),
        ({"max_drop": 1.0}, {"max_drop": 1.0}),
    ],
)
def test_what_may_change_other_runtimes_artifacts_adds_nothing(
    before: dict[str, Any], now: dict[str, Any], tmp_path: Path
) -> None:
    out = folder_of(tmp_path, Recipe(runtimes=("onnx",), **before), "onnx")
    asked = Recipe(runtimes=("tflite",), **now)
    assert added_to(out, asked, set(now)) == asked


def test_a_folder_without_a_recipe_or_artifacts_adds_nothing(tmp_path: Path) -> None:
    asked = Recipe(runtimes=("tflite",))
    assert added_to(tmp_path, asked, set()) == asked
    assert added_to(folder_of(tmp_path, Recipe(runtimes=("onnx",))), asked, set()) == asked
    (tmp_path / "recipe.json").write_text("{")
    assert added_to(tmp_path, asked, set()) == asked


@pytest.mark.parametrize(
    ("lost", "gained", "keeps"),
    [
        (0, 0, True),  # the interval ends at 0.4 points
        (12, 4, True),  # it straddles the limit: the gate will say inconclusive
        (60, 10, False),
    ],
)
def test_a_candidate_keeps_to_the_budget_unless_it_would_fail_the_gate(
    lost: int, gained: int, *, keeps: bool
) -> None:
    found = Accuracy(outcome="measured", n=1000, lost=lost, gained=gained)
    asked: list[Any] = []
    artifact: Any = "an artifact"

    def accuracy_of(one: Any) -> Accuracy:
        asked.append(one)
        return found

    assert _keeps(accuracy_of, 1.0, artifact) == (keeps, found)
    assert asked == [artifact]


@pytest.mark.parametrize(("outcome", "keeps"), [("not_run", True), ("failed", False)])
def test_a_candidate_that_cannot_be_judged_keeps_unless_it_failed(
    outcome: Any, *, keeps: bool
) -> None:
    found = Accuracy(outcome=outcome, reason="why")
    artifact: Any = "an artifact"
    assert _keeps(lambda _: found, 1.0, artifact) == (keeps, found)
