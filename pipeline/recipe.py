"""TOML -> `Recipe`, validated.

In: a recipe file and the flags that override it. Out: one frozen `Recipe`: everything a run depends
on. Reads a file and touches nothing else.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import UsageError
from pipeline.records import (
    FLOATING,
    Calibration,
    CropMode,
    CropRatio,
    Finetuning,
    Interpolation,
    RangeMethod,
    Rounding,
    Scheme,
    Weights,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Percent = Annotated[float, Field(ge=0, le=100, strict=True)]
Ratio = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Count = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]

Word = Annotated[str, Field(min_length=1)]
Natural = Annotated[int, Field(gt=0, strict=True)]
Upto4096 = Annotated[int, Field(gt=0, le=4096, strict=True)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]
"""Strict: what TOML writes as a string is no number, and true is none either."""

_Settings = TypeVar("_Settings", bound="_Strict")

RUNTIMES = ("onnx", "openvino", "tflite", "coreml")
NONE = "none"
NNCF_SCHEMES: tuple[Scheme, ...] = ("w8a8", "w4a8", "w8")
"""What NNCF's quantizers can express of ours."""
EMPTY: Mapping[str, Any] = {}
_A_TABLE, _A_LIST = "a table: its name in [brackets], its keys below", "a list, in [brackets]"
IN_WORDS = {
    "model_type": _A_TABLE,
    "dataclass_type": _A_TABLE,
    "tuple_type": _A_LIST,
    "too_short": "a list of at least one",
    "string_too_short": "a word",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "float_type": "a number",
}
"""Kinds of pydantic's errors whose messages speak Python."""
UNKNOWN = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
"""What pydantic calls a key that there is not."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaselineBudget(_Strict):
    """How much worse than the accepted report an artifact may be."""

    max_drop_pp: Percent | None = None
    max_latency_ratio: Ratio | None = None
    max_size_ratio: Ratio | None = None
    max_instruction_ratio: Ratio | None = None


class Budget(_Strict):
    """What the gate asks. A limit that is left out is not asked.

    Attributes:
        require: Runtimes whose artifact must have been measured; a not_run there fails.
        max_drop_pp: Largest loss of top-1 against the float model, in percentage points.
        min_agreement: Smallest share of images on which two runtimes of one profile agree.
        min_agreement_across_profiles: The same for two runtimes of different profiles.
        max_latency_ratio: Largest int8 / float latency of one runtime, by `clock`.
        max_size_ratio: Largest int8 / float size of one runtime's artifacts.
        max_instruction_ratio: Largest int8 / float count of instructions, where they are counted.
        min_device_agreement: Smallest share of images on which a device gives the host's class.
        faster_than_float: Whether integers that are slower than float fail.
        max_transposes_per_block: Changes of layout that the runtime executes.
        max_quantize_ops_per_block: Quantize and dequantize operations of their own.
        max_fallback_ops_per_block: Operations for which the runtime has no fast kernel.
        max_float_layers: Layers with weights that the runtime computes in floats.
        clock: `wall` or `cpu` time.
        baseline: Limits against a stored report.
    """

    require: tuple[Word, ...] = ()
    max_drop_pp: Percent | None = None
    min_agreement: Share | None = None
    min_agreement_across_profiles: Share | None = None
    max_latency_ratio: Ratio | None = None
    max_size_ratio: Ratio | None = None
    max_instruction_ratio: Ratio | None = None
    min_device_agreement: Share | None = None
    faster_than_float: Annotated[bool, Field(strict=True)] = False
    max_transposes_per_block: Count | None = None
    max_quantize_ops_per_block: Count | None = None
    max_fallback_ops_per_block: Count | None = None
    max_float_layers: Count | None = None
    clock: Literal["wall", "cpu"] = "wall"
    baseline: BaselineBudget = BaselineBudget()


class PreprocessingOverride(_Strict):
    """Preprocessing settings that win over the sidecar and the defaults."""

    crop_ratio: CropRatio | None = None
    interpolation: Interpolation | None = None
    resize_size: Upto4096 | None = None
    crop_mode: CropMode | None = None
    antialias: Switch | None = None
    mean: tuple[Finite, ...] | None = None
    std: tuple[Annotated[Finite, Field(gt=0)], ...] | None = None


class Recipe(_Strict):
    """Everything a run depends on.

    Attributes:
        checkpoint: A checkpoint file; None is the embedded reference model.
        data: A folder, a zip or `digits`; None is `digits`, with the embedded model only.
        eval: Where the evaluation images lie when not in `data`; `none` leaves evaluation out.
        input_size: Side of the image in pixels; None takes the sidecar's.
        weights: Which of a training checkpoint's weights: `ema`, `model`, or `auto`, the EMA where
            there is one.
        label_file: Labels of a flat folder of evaluation images.
        class_order: The data's class names in the order of the model's logits: a file with one per
            line, or `sorted`; None matches by name.
        isa: Where the artifacts will run; `auto` takes each runtime's default.
        placement: Which layers run in integers; None takes each runtime's default.
        tune: Whether the graph form and, where none is asked, the placement of each runtime are
            chosen by measurement: `quick` among those that need no other integers, `full` among
            all, `off` not at all.
        method: How ranges and rescalings are chosen: `search`, or one kind of range everywhere.
        rounding: Of weights.
        max_drop: Layers are left in float until the upper end of the drop's 95 % interval is at
            most so many percentage points; None leaves none.
        float_layers: Names of layers that stay float in any case.
        finetune: How the quantized model is trained on; None leaves it as it is.
        train: Where the training images lie; None takes `data`. Where it holds train/ and val/,
            train/ is read.
    """

    checkpoint: Word | None = None
    data: Word | None = None
    eval: Word | None = None
    weights: Weights = "auto"
    label_file: Word | None = None
    class_order: Word | None = None
    input_size: Upto4096 | None = None
    scheme: Scheme = "w8a8"
    runtimes: Annotated[tuple[Word, ...], Field(min_length=1)] = RUNTIMES
    placement: Word | None = None
    tune: Literal["off", "quick", "full"] = "quick"
    method: RangeMethod | Literal["search"] = Field(
        default="search", description=f"search, {', '.join(get_args(RangeMethod))}"
    )
    rounding: Rounding = "auto"
    max_drop: Percent | None = Field(default=None, description="a number, 0 to 100")
    float_layers: tuple[Word, ...] = ()
    finetune: Finetuning | None = None
    train: Word | None = None
    calibration_images: Natural = 512
    eval_images: Natural | None = None
    seed: Whole = 0
    isa: Literal["auto", "avx2", "vnni", "arm"] = "auto"
    batch: Upto4096 | Literal["dynamic"] = Field(
        default=1, description="a number from 1 to 4096, or `dynamic`"
    )
    allow_overlap: Switch = False
    bench: Switch = True
    device: Word = "local"
    threads: Natural = 1
    preprocessing: PreprocessingOverride = PreprocessingOverride()
    gate: Budget | None = None
    baseline: Word | None = None

    @model_validator(mode="after")
    def _rounding_belongs_to_the_search(self) -> Recipe:
        if self.method != "search" and self.rounding not in {"auto", "nearest"}:
            msg = f"rounding {self.rounding} goes with method search, not {self.method}"
            raise ValueError(msg)
        return self

    @field_validator("float_layers")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _a_drop_needs_a_scheme(self) -> Recipe:
        if self.tune == "full" and (self.finetune is not None or self.max_drop is not None):
            msg = (
                "tune full chooses the integers anew, and so does not go with finetune or max_drop:"
                " take quick"
            )
            raise ValueError(msg)
        if self.max_drop is not None and self.eval == NONE:
            msg = "max_drop needs evaluation images, and eval is none"
            raise ValueError(msg)
        if self.scheme == "w8a8-dynamic" and self.max_drop is not None:
            msg = (
                "max_drop does not go with w8a8-dynamic: there the runtime quantizes activations,"
                " and the reference, which decides, does not"
            )
            raise ValueError(msg)
        if self.finetune is not None and self.scheme in {*FLOATING, "w8a8-dynamic"}:
            msg = (
                f"finetune does not go with {self.scheme}: take w8a8, w4a8, w4a4, w8a16 or w8,"
                " whose grids are this project's"
            )
            raise ValueError(msg)
        if self.finetune is not None and self.finetune.engine == "nncf":
            if self.scheme not in NNCF_SCHEMES:
                msg = (
                    f"engine nncf cannot train scheme {self.scheme}: take {', '.join(NNCF_SCHEMES)}"
                )
                raise ValueError(msg)
            if self.finetune.oscillation in {"dampen", "freeze"}:
                msg = f"oscillation {self.finetune.oscillation} does not go with engine nncf"
                raise ValueError(msg)
        if self.scheme in FLOATING and (self.max_drop is not None or self.float_layers):
            msg = (
                "max_drop and float_layers go with a scheme that has integers, not with "
                f"{self.scheme}"
            )
            raise ValueError(msg)
        return self

    def budget(self, asked: Budget | None = None) -> Budget | None:
        """Return what the gate asks; `max_drop` is a limit there too, where it has none.

        Args:
            asked: Takes the place of the recipe's own.
        """
        asked = asked or self.gate
        if self.max_drop is None:
            return asked
        asked = asked or Budget()
        if asked.max_drop_pp is None:
            asked = asked.model_copy(update={"max_drop_pp": self.max_drop})
        return asked

    def calibration(self) -> Calibration:
        """Return how scales and integers are chosen."""
        if self.method == "search":
            return Calibration(method="search", rounding=self.rounding)
        return Calibration(
            method=self.method, rounding="nearest", rescale=False, correct_bias=False
        )


def load_recipe(path: Path | None, *overrides: Mapping[str, Any]) -> Recipe:
    """Read a recipe and lay the flags over it.

    Args:
        path: A TOML file; None starts from the defaults.
        *overrides: Field name to value; None leaves what is there. Tables are laid over key by key,
            and each of these over those before it.

    Raises:
        UsageError: The file is not there, is not TOML, or says something unknown.
    """
    stated = _read_toml(path) if path is not None else {}
    merged, given = stated, dict[str, Any]()
    for override in overrides:
        merged = _laid(merged, override)
        given |= {name: value for name, value in override.items() if _says_something(value)}
    return _validated(Recipe, merged, f"the recipe {path}" if path else "the options", given)


def _laid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for name, value in over.items():
        if not _says_something(value):
            continue
        table = merged.get(name, {})
        # What is not a table is for the validation to complain about.
        both = isinstance(value, dict) and isinstance(table, dict)
        merged[name] = _laid(table, value) if both else table if isinstance(value, dict) else value
    return merged


def _says_something(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_says_something, value.values()))
    return value is not None


def load_budget(path: Path) -> Budget:
    """Read a budget: a TOML file with its keys at the top or under [gate].

    Raises:
        UsageError: The file is not there, is not TOML, or says something unknown.
    """
    stated = _read_toml(path)
    table = isinstance(stated.get("baseline"), dict)  # of a recipe it is a file's name
    known = Recipe.model_fields.keys() - ({"baseline"} if table else set())
    beside = [name for name in stated if name not in known]
    if "gate" in stated and beside:
        raise UsageError(
            f"the budget {path}: {beside[0]} stands beside [gate], where no limit is read",
            allowed="limits under [gate], or all at the top and no [gate]",
            do=f"Move {beside[0]}",
        )
    return _validated(Budget, stated.get("gate", stated), f"the budget {path}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"{path} cannot be read as TOML ({why})",
            allowed="a TOML file such as the README shows",
            do="Correct the path or the file",
        ) from error


def _validated(
    kind: type[_Settings], values: Mapping[str, Any], what: str, flags: Mapping[str, Any] = EMPTY
) -> _Settings:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            # Settings that do not go together: the message says which.
            said = first["msg"].partition(", ")[2] or first["msg"]
            raise UsageError(
                f"{what if not flags else 'the options'}: {said}",
                allowed="settings that go together",
                do="Leave one of them out",
            ) from error
        place = _place(kind, first["loc"], first["type"])
        name, got = ".".join(place), f"is {first['input']!r}"
        do = f"Correct {name}"
        if first["type"] in UNKNOWN:
            got, do = "is not known", f"Correct or remove {name}"
        raise UsageError(
            f"{'the options' if place[0] in flags else what}: {name} {got}",
            allowed=_allowed(kind, place, first),
            do=do,
        ) from error


def _place(kind: type[_Strict], location: tuple[str | int, ...], error: str) -> list[str]:
    """Return the names on the way to a value; of a choice between types pydantic adds the type."""
    table: Any = kind
    names = list[str]()
    for part in map(str, location):
        known = table is not None and part in _annotations(table)
        if known or part.isdecimal() or error in UNKNOWN:
            names.append(part)
            table = _table(table, part) if known else None
    return names or ["the table"]


def _allowed(kind: type[_Strict], place: list[str], error: Mapping[str, Any]) -> str:
    if error["type"] in UNKNOWN:
        table: Any = kind
        for name in place[:-1]:
            table = _table(table, name)
        return ", ".join(_annotations(table))
    field = kind.model_fields.get(place[0])
    if field is not None and field.description:
        return field.description
    if isinstance(error["input"], float) and not math.isfinite(error["input"]):
        return "a finite number"
    words = IN_WORDS.get(error["type"])
    expected = error.get("ctx", {}).get("expected")
    return str(words or expected or error["msg"].removeprefix("Input should be ").split(",")[0])


def _table(kind: Any, name: str) -> Any:
    """Return what a field holds where it is a table of its own, optional or not; else None."""
    annotation = _annotations(kind)[name]
    parts = (annotation, *get_args(annotation))
    return next((part for part in parts if isinstance(part, type) and _is_table(part)), None)


def _annotations(kind: Any) -> dict[str, Any]:
    """Return the fields of a table with their types."""
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _is_table(kind: type) -> bool:
    return issubclass(kind, _Strict) or is_dataclass(kind)
