"""What each runtime is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.exports import Exports, foreign_in
from pipeline.recipe import Recipe


@pytest.mark.parametrize(
    ("runtimes", "isa", "profile"),
    [
        (("onnx", "tflite"), "avx2", "avx2"),
        (("onnx", "tflite"), "vnni", "full"),
        # TFLite runs on ARM unless told otherwise, wherever it is exported.
        (("tflite",), "auto", "full"),
    ],
)
def test_the_profile_is_the_one_that_loses_most(
    runtimes: tuple[str, ...], isa: str, profile: str
) -> None:
    recipe = Recipe.model_validate({"runtimes": runtimes, "isa": isa})
    assert Exports(recipe).profile() == profile


def test_integers_are_made_for_what_is_asked() -> None:
    recipe = Recipe(runtimes=("onnx",), placement="pointwise", float_layers=("stem.conv",))
    wanted = Exports(recipe).integers()
    assert (wanted.placement, wanted.float_layers) == ("pointwise", ("stem.conv",))
    assert Exports(Recipe(runtimes=("onnx",))).integers().placement == "pointwise-io"


def test_what_a_runtime_does_not_express_is_refused() -> None:
    with pytest.raises(UsageError, match="onnx does not express scheme w8a16"):
        Exports(Recipe(runtimes=("onnx",), scheme="w8a16"))


@pytest.mark.parametrize(
    ("scheme", "placement", "named"),
    [
        ("w8a8", "bogus", r"unknown placement: bogus\. Allowed: pointwise, pointwise-downsample"),
        ("float16", "bogus", "unknown placement: bogus"),
        ("float16", "all", "--placement all with --scheme float16, which has no integers"),
    ],
)
def test_a_placement_that_says_nothing_is_refused(scheme: str, placement: str, named: str) -> None:
    recipe = {"runtimes": ("openvino",), "scheme": scheme, "placement": placement}
    with pytest.raises(UsageError, match=named):
        Exports(Recipe.model_validate(recipe))


@pytest.mark.parametrize(
    ("name", "strangers"),
    [
        ("onnx-w8a8/notes.txt", 1),
        ("onnx-w8a8/model.engine", 1),
        ("onnx-w8a8/.mine", 1),
        ("mine/model.onnx", 1),
        ("mine.txt", 1),
        ("onnx-w8a8/model.onnx", 0),
        ("onnx-w8a8/weights.bin", 0),  # a runtime may write what it likes
        ("onnx-w8a8/.DS_Store", 0),
    ],
)
def test_what_no_run_wrote_is_found_among_artifacts(
    name: str, strangers: int, tmp_path: Path
) -> None:
    stage = tmp_path / "stages" / "export-onnx-w8a8-0123"
    stage.mkdir(parents=True)
    for wrote in ("model.onnx", "weights.bin", "stage.json"):
        (stage / wrote).write_text("")
    file = tmp_path / "artifacts" / name
    file.parent.mkdir(parents=True)
    file.write_text("")
    found = foreign_in(tmp_path)
    assert (found is not None) == bool(strangers)
    assert found is None or file.is_relative_to(found)


def test_artifacts_whose_stages_were_thrown_away_are_no_strangers(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts" / "openvino-float"
    folder.mkdir(parents=True)
    for name in ("model.xml", "model.bin"):
        (folder / name).write_text("")
    assert foreign_in(tmp_path) is None
    (folder / "notes.txt").write_text("mine")
    assert foreign_in(tmp_path) == folder / "notes.txt"
