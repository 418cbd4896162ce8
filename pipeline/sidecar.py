"""What the files beside a checkpoint say: preprocessing, class names and the eps of its norms.

In: a located checkpoint. Out: its settings, as far as they are stated, the first of these winning:

1. the .json with the name of a single weights file: the fields of `Preprocessing`, `classes`,
   `norm_eps`, `head_norm_eps`; and `resize`, a sentence such as "bilinear from 32 to 64, no
   antialias; no crop", read for its words;
2. preprocessor_config.json of Hugging Face's ConvNextImageProcessor;
3. config.json of timm (`pretrained_cfg`, or the older flat form);
4. config.json of Hugging Face transformers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_args

from pipeline.errors import CheckpointError
from pipeline.locate import CONFIG, PREPROCESSOR, read_json
from pipeline.records import IMAGE_CHANNELS, CropMode, Interpolation, Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pipeline.locate import Located

DEFAULT_INPUT_SIZE = 224
MAX_SIDE = 2**16
MAX_NUMBER = 1e300
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
GEOMETRY = frozenset({"crop_ratio", "resize_size", "crop_mode"})
"""Mean something only together: they are taken from one source."""

HF_CROP_RATIO = 224 / 256
HF_SQUASH_SIZE = 384
PILLOW_FILTERS: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic")
"""By Pillow's number."""

_HF_PROCESSOR = re.compile(r"ConvNext(ImageProcessor\w*|FeatureExtractor)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What is stated beside a checkpoint.

    Attributes:
        preprocessing: Fields of `Preprocessing` by name.
        labels: Class names in the order of the logits.
        norm_eps: Of every LayerNorm.
        head_norm_eps: Of the head's.
        source: The names of the files that said so.
    """

    preprocessing: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    norm_eps: float | None = None
    head_norm_eps: float | None = None
    source: str | None = None


def read_sidecar(located: Located) -> Sidecar:
    """Read what is stated beside a checkpoint.

    Args:
        located: Its files and configuration.

    Returns:
        The settings of all sources together; for each, the first that states it.

    Raises:
        CheckpointError: A file is no JSON object, states what is no value of its key, or asks for
            what this project cannot do.
    """
    own = _own_path(located)
    found = [] if own is None else [(own, _own(_Stated(own.name, read_json(own))))]
    folder = located.folder
    if folder is not None:
        preprocessor = _Stated(PREPROCESSOR, located.preprocessor)
        config = _Stated(CONFIG, located.config)
        found += [
            (folder / PREPROCESSOR, _hf_preprocessor(preprocessor)),
            (folder / CONFIG, _timm(config)),
            (folder / CONFIG, _hf_config(config)),
        ]
    merged, sources = Sidecar(), list[str]()
    for path, stated in found:
        together = _merged(merged, stated)
        if together != merged and path.name not in sources:
            sources.append(path.name)
        merged = together
    return Sidecar(
        preprocessing=merged.preprocessing,
        labels=merged.labels,
        norm_eps=merged.norm_eps,
        head_norm_eps=merged.head_norm_eps,
        source=", ".join(sources) or None,
    )


def _merged(first: Sidecar, then: Sidecar) -> Sidecar:
    taken = first.preprocessing
    skipped = GEOMETRY if GEOMETRY & taken.keys() else frozenset()
    added = {k: v for k, v in then.preprocessing.items() if k not in skipped}
    return Sidecar(
        preprocessing={**added, **taken},
        labels=then.labels if first.labels is None else first.labels,
        norm_eps=then.norm_eps if first.norm_eps is None else first.norm_eps,
        head_norm_eps=then.head_norm_eps if first.head_norm_eps is None else first.head_norm_eps,
    )


class _Stated:
    """The keys of one file, each read as one kind of value or refused by name."""

    def __init__(self, name: str, values: Mapping[str, Any], inside: str = "") -> None:
        self.name = name
        self.values = values
        self.inside = inside

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def within(self, key: str) -> _Stated:
        """Return the object under a key, an empty one where there is none."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise self.refused(key, "an object")
        return _Stated(self.name, value, f"{self.inside}{key}.")

    def refused(self, key: str, allowed: str) -> CheckpointError:
        """Return the error that says that a key's value is of no use."""
        shown = repr(self.values.get(key))[:80]
        return CheckpointError(
            f"{self.name}: {key.replace('_', ' ')} {shown} cannot be used (key {self.inside}{key})",
            allowed=allowed,
            do="Correct the file, or move it away and give the setting as a flag",
        )

    def size(self, key: str) -> int:
        """Read pixels."""
        value = self.values[key]
        if type(value) is not int or not 1 <= value <= MAX_SIDE:
            raise self.refused(key, "a number of pixels; most networks take multiples of 32")
        return value

    def number(self, key: str, most: float = math.inf) -> float:
        """Read a positive number of at most `most`."""
        value = self.values[key]
        if not _is_number(value) or not 0 < value <= most:
            limit = "" if math.isinf(most) else f", at most {most:g}"
            raise self.refused(key, f"a positive number{limit}")
        return float(value)

    def channels(self, key: str, *, positive: bool) -> tuple[float, ...]:
        """Read one number per channel."""
        value = self.values[key]
        if (
            not isinstance(value, list)
            or len(value) not in IMAGE_CHANNELS
            or not all(map(_is_number, value))
            or (positive and min(value) <= 0)
        ):
            raise self.refused(key, f"a list of 3 {'positive ' * positive}numbers, or 1 for grey")
        return tuple(map(float, value))

    def word(self, key: str, allowed: tuple[str, ...], why: str = "") -> str:
        """Read one of some words."""
        value = self.values[key]
        if not isinstance(value, str) or value not in allowed:
            raise self.refused(key, " or ".join(allowed) + why)
        return value

    def flag(self, key: str) -> bool:
        """Read true or false."""
        value = self.values[key]
        if not isinstance(value, bool):
            raise self.refused(key, "true or false")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """Read class names."""
        value = self.values[key]
        words = isinstance(value, list) and all(type(name) in {str, int} for name in value)
        if not words or not value:
            raise self.refused(key, "a list of class names")
        return tuple(map(str, value))


def _is_number(value: object) -> bool:
    # Comparing instead of converting: an integer can be too large for a float.
    return type(value) in {int, float} and -MAX_NUMBER < value < MAX_NUMBER  # type: ignore[operator]


# --- this project's own ---------------------------------------------------------------------------


def _own_path(located: Located) -> Path | None:
    """Return the .json with the checkpoint's name, where there is one."""
    if len(located.files) != 1:
        return None
    path = located.files[0]
    if path.name.endswith(".pth.tar"):
        path = path.with_suffix("")
    path = path.with_suffix(".json")
    return path if path.is_file() else None


def _own(stated: _Stated) -> Sidecar:
    read: dict[str, Callable[[str], Any]] = {
        "input_size": stated.size,
        "resize_size": stated.size,
        "crop_ratio": lambda key: stated.number(key, most=1),
        "crop_mode": lambda key: stated.word(key, get_args(CropMode)),
        "interpolation": lambda key: stated.word(key, get_args(Interpolation)),
        "antialias": stated.flag,
        "mean": lambda key: stated.channels(key, positive=False),
        "std": lambda key: stated.channels(key, positive=True),
    }
    assert read.keys() == {item.name for item in fields(Preprocessing)}
    settings = _from_sentence(str(stated.values.get("resize", "")))
    settings |= {key: reader(key) for key, reader in read.items() if key in stated}
    # A bare count of classes says nothing about their names.
    named = "classes" in stated and type(stated.values["classes"]) is not int
    return Sidecar(
        preprocessing=settings,
        labels=stated.names("classes") if named else None,
        norm_eps=_eps(stated, "norm_eps"),
        head_norm_eps=_eps(stated, "head_norm_eps"),
    )


def _eps(stated: _Stated, key: str) -> float | None:
    return stated.number(key, most=1) if key in stated else None


def _from_sentence(sentence: str) -> dict[str, Any]:
    words = sentence.lower()
    found: dict[str, Any] = {}
    positions = {name: words.find(name) for name in INTERPOLATIONS if name in words}
    if positions:
        found["interpolation"] = min(positions, key=positions.__getitem__)
    if "antialias" in words:
        found["antialias"] = not re.search(r"\b(no|without) antialias", words)
    if re.search(r"\b(no|without) crop", words):
        found["crop_ratio"] = 1.0
    return found


# --- Hugging Face transformers --------------------------------------------------------------------


def _hf_preprocessor(stated: _Stated) -> Sidecar:
    """Read the settings of transformers' ConvNextImageProcessor.

    Source: transformers, models/convnext/image_processing_convnext.py: below 384 pixels the shorter
    side is resized to int(S / crop_pct) and S cropped; from 384 on both sides become S.
    """
    if not stated.values:
        return Sidecar()
    side = _hf_side(stated)
    _hf_refusals(stated, side)
    settings: dict[str, Any] = {"antialias": True}
    if side is not None:
        ratio = stated.number("crop_pct", most=1) if "crop_pct" in stated else HF_CROP_RATIO
        settings["input_size"] = side
        # The floor of side / ratio is what `Preprocessing` resizes to by itself.
        settings |= (
            {"crop_mode": "center", "crop_ratio": ratio}
            if side < HF_SQUASH_SIZE
            else {"crop_mode": "squash"}
        )
    if "resample" in stated:
        number = stated.values["resample"]
        if type(number) is not int or number not in range(len(PILLOW_FILTERS)):
            known = ", ".join(f"{i} ({name})" for i, name in enumerate(PILLOW_FILTERS))
            raise stated.refused("resample", known)
        settings["interpolation"] = PILLOW_FILTERS[number]
    if "image_mean" in stated:
        settings["mean"] = stated.channels("image_mean", positive=False)
    if "image_std" in stated:
        settings["std"] = stated.channels("image_std", positive=True)
    return Sidecar(preprocessing=settings)


def _hf_refusals(stated: _Stated, side: int | None) -> None:
    """Refuse what this project does not do to an image."""
    for key in ("image_processor_type", "feature_extractor_type"):
        if key in stated and not _HF_PROCESSOR.fullmatch(str(stated.values[key])):
            raise stated.refused(key, "ConvNextImageProcessor; others resize in ways not read here")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if key in stated and not stated.flag(key):
            raise stated.refused(key, "true: every image is resized, scaled and normalised here")
    if "rescale_factor" in stated:
        factor = stated.number("rescale_factor")
        if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
            raise stated.refused("rescale_factor", "1/255: mean and std are of pixels in [0, 1]")
    if "do_center_crop" in stated and stated.flag("do_center_crop"):
        crop = stated.within("crop_size").values
        if side is None or [crop.get("height"), crop.get("width")] != [side, side]:
            raise stated.refused("crop_size", f"{side} by {side}, the size that is resized to")


def _hf_side(stated: _Stated) -> int | None:
    if "size" not in stated:
        return None
    if not isinstance(stated.values["size"], dict):
        return stated.size("size")
    size = stated.within("size")
    if "shortest_edge" not in size:
        raise stated.refused("size", "an object with shortest_edge")
    return size.size("shortest_edge")


def _hf_config(stated: _Stated) -> Sidecar:
    """Read what transformers' ConvNextConfig says beyond the architecture."""
    if "hidden_act" in stated:
        stated.word("hidden_act", ("gelu",), ", the exact one: a ConvNeXt's")
    settings: dict[str, Any] = {}
    if "image_size" in stated:
        match stated.values["image_size"]:
            case [int(height), int(width)] if height == width and 1 <= height <= MAX_SIDE:
                settings["input_size"] = height
            case _:
                settings["input_size"] = stated.size("image_size")
    return Sidecar(
        preprocessing=settings,
        labels=_hf_labels(stated),
        head_norm_eps=_eps(stated, "layer_norm_eps"),
    )


def _hf_labels(stated: _Stated) -> tuple[str, ...] | None:
    by_index = stated.within("id2label").values
    if not by_index:
        return None
    names = [by_index.get(str(index)) for index in range(len(by_index))]
    if not all(isinstance(name, str) for name in names):
        raise stated.refused("id2label", "a name for each index from 0 on")
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        return None  # what transformers writes where nobody named them
    return tuple(map(str, names))


# --- timm -----------------------------------------------------------------------------------------


def _timm(stated: _Stated) -> Sidecar:
    """Read timm's pretrained configuration.

    Source: timm, data/transforms_factory.py, transforms_imagenet_eval: `center` resizes the shorter
    side to floor(S / crop_pct), `squash` both sides, and S is cropped.
    """
    inner = "pretrained_cfg" in stated
    if not inner and "architecture" not in stated:
        return Sidecar()
    cfg = stated.within("pretrained_cfg") if inner else stated
    arguments = stated.within("model_args")
    if "act_layer" in arguments:
        arguments.word("act_layer", ("gelu",), ", the exact one: a ConvNeXt's")
    settings: dict[str, Any] = {"antialias": True}
    if "input_size" in cfg:
        settings["input_size"] = _timm_side(cfg)
    if "crop_pct" in cfg:
        settings["crop_ratio"] = cfg.number("crop_pct", most=1)
    if "crop_mode" in cfg:
        why = "; border pads the image, which is not done here"
        settings["crop_mode"] = cfg.word("crop_mode", get_args(CropMode), why)
        if settings["crop_mode"] == "squash" and settings.get("crop_ratio", 1) != 1:
            raise cfg.refused("crop_mode", "squash with crop_pct 1: nothing is cropped of it here")
    if "interpolation" in cfg:
        allowed = get_args(Interpolation)
        why = "; a random one is for training"
        settings["interpolation"] = cfg.word("interpolation", allowed, why)
    if "mean" in cfg:
        settings["mean"] = cfg.channels("mean", positive=False)
    if "std" in cfg:
        settings["std"] = cfg.channels("std", positive=True)
    place = cfg if "label_names" in cfg else stated
    return Sidecar(
        preprocessing=settings,
        labels=place.names("label_names") if "label_names" in place else None,
        norm_eps=_eps(arguments, "norm_eps"),
    )


def _timm_side(cfg: _Stated) -> int:
    match cfg.values["input_size"]:
        case [_, int(height), int(width)] if height == width and 1 <= height <= MAX_SIDE:
            return height
    raise cfg.refused("input_size", "[3, S, S], a square of S pixels")
