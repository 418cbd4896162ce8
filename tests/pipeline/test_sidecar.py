"""What is taken from the files beside a checkpoint, and what is refused in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import pipeline.embedded
from pipeline.errors import CheckpointError
from pipeline.locate import Located, locate
from pipeline.records import Preprocessing
from pipeline.sidecar import Sidecar, read_sidecar


def _read(folder: Path, content: Any) -> Sidecar:
    (folder / "net.json").write_text(json.dumps(content))
    return read_sidecar(_plain(folder))


def _plain(folder: Path) -> Located:
    return Located(name="net", files=(folder / "net.safetensors",))


def _hub(config: Any = None, preprocessor: Any = None) -> Sidecar:
    folder = Path("nowhere")
    located = Located(
        name="net",
        files=(folder / "model.safetensors",),
        folder=folder,
        config=config or {},
        preprocessor=preprocessor or {},
    )
    return read_sidecar(located)


# --- this project's own ---------------------------------------------------------------------------


def test_without_a_sidecar_nothing_is_stated(tmp_path: Path) -> None:
    assert read_sidecar(_plain(tmp_path)) == Sidecar()
    assert _hub() == Sidecar()


def test_known_keys_are_taken_and_others_left(tmp_path: Path) -> None:
    stated = {
        "input_size": 64,
        "mean": [0.1, 0.2, 1],
        "std": [0.5, 0.5, 0.5],
        "crop_mode": "squash",
        "antialias": False,
        "interpolation": "lanczos",
        "resize_size": 70,
    }
    eps = {"norm_eps": 1e-5, "head_norm_eps": 1e-12}
    sidecar = _read(tmp_path, {**stated, **eps, "classes": ["cat", 7], "epochs": 90})
    assert sidecar.preprocessing == {**stated, "mean": (0.1, 0.2, 1.0), "std": (0.5, 0.5, 0.5)}
    assert sidecar.labels == ("cat", "7")
    assert (sidecar.norm_eps, sidecar.head_norm_eps) == (1e-5, 1e-12)
    assert sidecar.source == "net.json"
    Preprocessing(**sidecar.preprocessing)


@pytest.mark.parametrize("name", ["net.pth.tar", "net.ckpt"])
def test_the_sidecar_has_the_name_without_the_ending(tmp_path: Path, name: str) -> None:
    (tmp_path / "net.json").write_text('{"input_size": 64}')
    sidecar = read_sidecar(Located(name="net", files=(tmp_path / name,)))
    assert sidecar.preprocessing == {"input_size": 64}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            "bilinear from 32 to 64, no antialias; no crop",
            {"interpolation": "bilinear", "antialias": False, "crop_ratio": 1.0},
        ),
        ("Bicubic with antialias", {"interpolation": "bicubic", "antialias": True}),
        ("nearest, not bilinear", {"interpolation": "nearest"}),
        ("without antialiasing, without crop", {"antialias": False, "crop_ratio": 1.0}),
        ("to 64 somehow", {}),
    ],
)
def test_a_sentence_is_read_for_its_words(
    tmp_path: Path, sentence: str, expected: dict[str, Any]
) -> None:
    assert _read(tmp_path, {"resize": sentence}).preprocessing == expected


def test_a_stated_key_wins_over_the_sentence(tmp_path: Path) -> None:
    sidecar = _read(tmp_path, {"resize": "bilinear, no crop", "crop_ratio": 0.9})
    assert sidecar.preprocessing == {"interpolation": "bilinear", "crop_ratio": 0.9}


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", ""])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"net\.json cannot be used"):
        read_sidecar(_plain(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_size", "big"),
        ("input_size", 22.4),
        ("input_size", True),
        ("input_size", 0),
        ("input_size", 10**30),
        ("resize_size", -1),
        ("crop_ratio", "0.9"),
        ("crop_ratio", 1.5),
        ("crop_ratio", float("nan")),
        ("crop_mode", "border"),
        ("interpolation", 3),
        ("interpolation", ["bicubic"]),
        ("antialias", "no"),
        ("mean", 0.5),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, float("inf"), 0.5]),
        ("mean", [10**400, 1, 1]),
        ("std", [0.5, 0, 0.5]),
        ("classes", "cats"),
        ("classes", [["cat"]]),
        ("norm_eps", 0),
        ("head_norm_eps", "1e-6"),
    ],
)
def test_a_wrong_value_is_refused_by_file_and_key(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^net\.json: .*\(key {key}\)"):
        _read(tmp_path, {key: value})


def test_a_count_of_classes_names_none(tmp_path: Path) -> None:
    assert _read(tmp_path, {"classes": 10}).labels is None


def test_the_embedded_sidecar_names_ten_digits() -> None:
    folder = Path(pipeline.embedded.__file__).parent
    sidecar = read_sidecar(locate(folder / "digits.safetensors"))
    assert sidecar.labels == tuple("0123456789")
    assert sidecar.preprocessing["input_size"] == 32


# --- Hugging Face transformers --------------------------------------------------------------------

HF_CONFIG = {
    "model_type": "convnext",
    "architectures": ["ConvNextForImageClassification"],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 288,
    "id2label": {"1": "goldfish", "0": "tench", "2": "shark"},
}
OLD_PROCESSOR = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}


def test_a_processor_of_transformers_is_read_in_its_old_form() -> None:
    sidecar = _hub(HF_CONFIG, OLD_PROCESSOR)
    assert sidecar.preprocessing == {
        "antialias": True,
        "input_size": 224,
        "crop_mode": "center",
        "crop_ratio": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    assert sidecar.labels == ("tench", "goldfish", "shark")
    assert (sidecar.norm_eps, sidecar.head_norm_eps) == (None, 1e-12)
    assert sidecar.source == "preprocessor_config.json, config.json"
    Preprocessing(**sidecar.preprocessing)


def test_from_384_pixels_on_both_sides_are_squashed() -> None:
    at = {
        size: _hub({}, {**OLD_PROCESSOR, "size": {"shortest_edge": size}}).preprocessing
        for size in (383, 384)
    }
    assert at[384]["crop_mode"] == "squash"
    assert "crop_ratio" not in at[384]
    assert (at[383]["crop_mode"], at[383]["crop_ratio"]) == ("center", 0.875)


@pytest.mark.parametrize("size", [32, 100, 224, 236, 288, 320, 383])
@pytest.mark.parametrize("ratio", [None, 0.875, 0.9, 0.95, 1.0])
def test_the_resized_side_is_the_one_of_transformers(size: int, ratio: float | None) -> None:
    processor = {"size": {"shortest_edge": size}} | ({"crop_pct": ratio} if ratio else {})
    ours = Preprocessing(**_hub({}, processor).preprocessing)
    assert ours.resize_size is None
    theirs = int(size / (ratio or 224 / 256))
    assert math.floor(ours.input_size / ours.crop_ratio) == theirs


@pytest.mark.parametrize(
    ("number", "name"), [(0, "nearest"), (1, "lanczos"), (2, "bilinear"), (3, "bicubic")]
)
def test_pillows_filters_by_number(number: int, name: str) -> None:
    assert _hub({}, {"resample": number}).preprocessing["interpolation"] == name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_resize", False),
        ("do_normalize", False),
        ("do_rescale", False),
        ("do_rescale", 1),
        ("rescale_factor", 1 / 127.5),
        ("resample", 4),
        ("resample", "bicubic"),
        ("resample", True),
        ("crop_pct", 1.2),
        ("image_mean", "grey"),
        ("image_std", [0.1, 0.1, -0.1]),
        ("size", "224"),
        ("size", {"height": 224, "width": 224}),
        ("feature_extractor_type", "ViTFeatureExtractor"),
    ],
)
def test_a_processor_that_works_otherwise_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: .*\(key {key}\)"):
        _hub({}, {**OLD_PROCESSOR, key: value})


def test_a_crop_after_the_crop_is_refused_unless_it_crops_nothing() -> None:
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    assert _hub({}, {**OLD_PROCESSOR, **crop}).preprocessing["input_size"] == 224
    with pytest.raises(CheckpointError, match="key crop_size"):
        _hub({}, {**OLD_PROCESSOR, **crop, "size": 256})


def test_the_images_size_counts_only_where_nothing_else_says() -> None:
    assert _hub(HF_CONFIG).preprocessing == {"input_size": 288}
    assert _hub({"image_size": [96, 96]}).preprocessing == {"input_size": 96}
    assert _hub(HF_CONFIG, {"size": 224}).preprocessing["input_size"] == 224
    with pytest.raises(CheckpointError, match="key image_size"):
        _hub({"image_size": [96, 64]})


def test_labels_that_nobody_gave_are_none() -> None:
    assert _hub({"id2label": {str(i): f"LABEL_{i}" for i in range(12)}}).labels is None
    ordered = {str(i): f"class {i}" for i in reversed(range(12))}
    assert _hub({"id2label": ordered}).labels == tuple(f"class {i}" for i in range(12))


@pytest.mark.parametrize(
    "labels", [{"0": "a", "2": "c"}, {"a": "b"}, {"0": 3}, ["a", "b"], {"1": "a", "2": "b"}]
)
def test_labels_with_gaps_are_refused(labels: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: .*\(key id2label\)"):
        _hub({"id2label": labels})


def test_another_activation_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"hidden act 'relu' .*Allowed: gelu"):
        _hub({**HF_CONFIG, "hidden_act": "relu"})


# --- timm -----------------------------------------------------------------------------------------

TIMM_CFG = {
    "tag": "fb_in1k",
    "input_size": [3, 288, 288],
    "fixed_input_size": False,
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "num_classes": 1000,
}
TIMM_SETTINGS = {
    "antialias": True,
    "input_size": 288,
    "crop_ratio": 0.95,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}


def test_timms_configuration_is_read_in_both_forms() -> None:
    new = _hub({"architecture": "convnext_tiny", "pretrained_cfg": TIMM_CFG})
    assert new.preprocessing == _hub({"architecture": "convnext_tiny", **TIMM_CFG}).preprocessing
    assert new.preprocessing == TIMM_SETTINGS
    assert new.source == "config.json"
    Preprocessing(**new.preprocessing)


def test_timms_labels_and_eps_are_read() -> None:
    config = {"pretrained_cfg": TIMM_CFG, "label_names": ["n01", "n02"]}
    sidecar = _hub({**config, "model_args": {"norm_eps": 1e-5, "conv_mlp": True}})
    assert sidecar.labels == ("n01", "n02")
    assert (sidecar.norm_eps, sidecar.head_norm_eps) == (1e-5, None)
    inside = {"pretrained_cfg": {**TIMM_CFG, "label_names": ["a"]}}
    assert _hub(inside).labels == ("a",)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop_mode", "border"),
        ("crop_mode", "squash"),  # with crop_pct 0.95 it still crops
        ("interpolation", "random"),
        ("crop_pct", 0),
        ("crop_pct", 1.1),
        ("input_size", [3, 288, 224]),
        ("input_size", 288),
        ("input_size", [3, "288", "288"]),
        ("mean", [None, 0.5, 0.5]),
        ("std", [0.5]),
    ],
)
def test_what_timm_does_and_this_project_does_not_is_refused(key: str, value: Any) -> None:
    config = {"pretrained_cfg": {**TIMM_CFG, key: value}}
    if (key, value) == ("std", [0.5]):  # of grey: the records hold it against the mean
        assert _hub(config).preprocessing["std"] == (0.5,)
        return
    with pytest.raises(CheckpointError, match=rf"config\.json: .*\(key pretrained_cfg\.{key}\)"):
        _hub(config)


def test_timm_squashes_where_nothing_is_cropped() -> None:
    config = {"pretrained_cfg": {**TIMM_CFG, "crop_pct": 1.0, "crop_mode": "squash"}}
    assert _hub(config).preprocessing["crop_mode"] == "squash"


def test_timms_other_activation_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"key model_args\.act_layer"):
        _hub({"pretrained_cfg": TIMM_CFG, "model_args": {"act_layer": "relu"}})


# --- all together ---------------------------------------------------------------------------------


def test_the_first_source_wins_and_the_next_fill_in(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.json").write_text('{"crop_ratio": 1.0, "classes": ["a", "b", "c"]}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OLD_PROCESSOR | {"size": 384}))
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    sidecar = read_sidecar(locate(tmp_path))
    assert sidecar.labels == ("a", "b", "c")
    assert sidecar.head_norm_eps == 1e-12
    assert sidecar.preprocessing["input_size"] == 384
    assert sidecar.preprocessing["crop_ratio"] == 1.0
    # How the crop is made comes from one source: squashing is not mixed with another's ratio.
    assert "crop_mode" not in sidecar.preprocessing
    assert sidecar.source == "model.json, preprocessor_config.json, config.json"
