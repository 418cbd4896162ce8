"""A recipe file with flags over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import ValidationError

import pipeline.embedded
from pipeline.cli_run import finetune
from pipeline.errors import UsageError
from pipeline.recipe import (
    RUNTIMES,
    Budget,
    PreprocessingOverride,
    Recipe,
    load_budget,
    load_recipe,
)
from pipeline.records import Augmentation, Finetuning


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'checkpoint = "net.pth"\ndata = "photos"\nruntimes = ["onnx"]\nseed = 4\n'
        'batch = "dynamic"\n'
        '[preprocessing]\ncrop_ratio = 0.9\ninterpolation = "bilinear"\n'
        "[gate]\nmax_drop_pp = 0.5\n[gate.baseline]\nmax_size_ratio = 1.1\n"
    )
    return path


def test_without_a_file_the_defaults_stand() -> None:
    recipe = load_recipe(None, {})
    assert recipe == Recipe()
    assert recipe.runtimes == RUNTIMES
    assert recipe.gate is None
    assert recipe.calibration_images == 512


def test_a_file_is_read_whole(toml: Path) -> None:
    recipe = load_recipe(toml, {})
    assert (recipe.checkpoint, recipe.seed, recipe.batch) == ("net.pth", 4, "dynamic")
    assert recipe.runtimes == ("onnx",)
    assert recipe.gate is not None
    assert recipe.gate.max_drop_pp == 0.5
    assert recipe.gate.baseline.max_size_ratio == 1.1
    assert recipe.gate.max_latency_ratio is None


def test_flags_win_and_none_leaves_the_recipes_word(toml: Path) -> None:
    recipe = load_recipe(toml, {"seed": 9, "data": None, "bench": False})
    assert (recipe.seed, recipe.data, recipe.bench) == (9, "photos", False)


def test_preprocessing_is_laid_over_key_by_key(toml: Path) -> None:
    flags = {"preprocessing": {"crop_ratio": 1.0, "interpolation": None, "antialias": False}}
    chosen = load_recipe(toml, flags).preprocessing
    assert (chosen.crop_ratio, chosen.interpolation, chosen.antialias) == (1.0, "bilinear", False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sead = 3", "sead"),
        ("seed = 'x'", "seed"),
        ("threads = 0", "threads"),
        ("scheme = 'int4'", "scheme"),
        ("[gate]\nmax_drop = 1", "gate.max_drop"),
        ("[gate]\nmin_agreement = 1.5", "gate.min_agreement"),
        ("[preprocessing]\nstd = [0.1, 0.0, 0.1]", "preprocessing.std"),
        ("preprocessing = 3", "preprocessing"),
        ("gate = 3", "gate"),
        ("seed = ", "TOML"),
        ("x = " + "[" * 5000, "TOML"),
    ],
)
def test_a_wrong_recipe_is_a_usage_error_that_names_it(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        load_recipe(path, {})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("sead = 3", ("seed", "checkpoint")),
        ("[gate]\nmax_drop = 1", ("max_drop_pp", "require")),
        ("[gate.baseline]\nx = 1", ("max_drop_pp", "max_size_ratio")),
        ("[preprocessing]\ncrop = 1", ("crop_ratio", "antialias")),
        ("scheme = 'int4'", ("float", "w8a8")),
    ],
)
def test_what_is_allowed_is_listed(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path, {})
    for name in names:
        assert name in str(caught.value)


def test_a_wrong_flag_is_not_blamed_on_the_file(toml: Path) -> None:
    with pytest.raises(UsageError, match="the options: seed") as caught:
        load_recipe(toml, {"seed": "x"})
    assert str(toml) not in str(caught.value)


def test_a_missing_or_binary_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_recipe(tmp_path / "absent.toml", {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as TOML"):
        load_recipe(tmp_path / "binary.toml", {})


@pytest.mark.parametrize("header", ["", "[gate]\n"])
def test_a_budget_stands_alone_or_under_gate(tmp_path: Path, header: str) -> None:
    path = tmp_path / "budget.toml"
    path.write_text(f'{header}require = ["onnx"]\nmax_latency_ratio = 0.8\nclock = "cpu"\n')
    budget = load_budget(path)
    assert (budget.require, budget.max_latency_ratio, budget.clock) == (("onnx",), 0.8, "cpu")


def test_a_budget_that_is_no_table_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "budget.toml"
    path.write_text("gate = 'x'")
    with pytest.raises(UsageError, match=r"the table is 'x'\. Allowed: a table"):
        load_budget(path)


@pytest.mark.parametrize("text", ["max_drop = 1", "[gate]\nclock = 'sun'", "gate = 3"])
def test_a_wrong_budget_is_a_usage_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "budget.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match="the budget"):
        load_budget(path)


def test_the_embedded_recipe_is_valid() -> None:
    path = Path(pipeline.embedded.__file__).parent / "recipe.toml"
    assert load_recipe(path, {}).model_dump() != {}


def test_a_recipe_does_not_change() -> None:
    recipe: Any = Recipe()
    with pytest.raises(ValidationError):
        recipe.seed = 3


def test_another_rounding_goes_with_the_search_only() -> None:
    with pytest.raises(UsageError, match="rounding gptq goes with method search"):
        load_recipe(None, {"method": "min-max", "rounding": "gptq"})
    said = load_recipe(None, {"method": "min-max"}).calibration()
    assert (said.rounding, said.rescale, said.correct_bias) == ("nearest", False, False)


def test_a_budget_of_drop_is_what_the_gate_asks_too() -> None:
    assert Recipe().budget() is None
    asked = Recipe(max_drop=0.5).budget()
    assert asked is not None
    assert asked.max_drop_pp == 0.5
    own = Recipe(max_drop=0.5, gate=Budget(max_drop_pp=2.0, require=("onnx",))).budget()
    assert own == Budget(max_drop_pp=2.0, require=("onnx",))
    # One that takes the place of the recipe's own is asked for the drop as well.
    other = Recipe(max_drop=0.5).budget(Budget(require=("tflite",)))
    assert other == Budget(max_drop_pp=0.5, require=("tflite",))


def test_a_choice_between_types_is_named_as_it_is_written() -> None:
    with pytest.raises(UsageError, match="method is 'foo'") as caught:
        load_recipe(None, {"method": "foo"})
    assert "literal" not in str(caught.value)
    assert "Allowed: search, min-max" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch = 'two'", "batch is 'two'. Allowed: a number from 1 to 4096, or `dynamic`."),
        ("runtimes = 'onnx'", "runtimes is 'onnx'. Allowed: a list, in [brackets]"),
        ("runtimes = []", "runtimes is []. Allowed: a list of at least one"),
        ("seed = 'x'", "seed is 'x'. Allowed: a whole number. Correct seed"),
        ("gate = 'x'", "gate is 'x'. Allowed: a table"),
        ("[[gate]]\nx = 1", "gate is [{'x': 1}]. Allowed: a table"),
        ("finetune = 'x'", "finetune is 'x'. Allowed: a table"),
        ("[gate]\nrequire = 'onnx'", "gate.require is 'onnx'. Allowed: a list, in [brackets]"),
        ("[gate]\nmax_latency_ratio = 0", "ratio is 0. Allowed: greater than 0. Correct gate.max"),
        ("foo = 1", "foo is not known. Allowed: checkpoint, data"),
    ],
)
def test_what_is_allowed_is_said_once_and_in_words_of_toml(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path, {})
    assert said in str(caught.value)
    assert "constrained" not in str(caught.value)
    assert "Input should be" not in str(caught.value)
    assert "instance" not in str(caught.value)


@pytest.mark.parametrize("value", ["'64'", "true", "1.5"])
@pytest.mark.parametrize(
    "key",
    ["input_size", "batch", "seed", "threads", "eval_images", "[preprocessing]\nresize_size"],
)
def test_a_number_is_a_number(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f"{key} = {value}")
    with pytest.raises(UsageError):
        load_recipe(path, {})


@pytest.mark.parametrize("value", ["['0.5']", "[true]", "[nan]", "[inf]"])
@pytest.mark.parametrize("key", ["mean", "std"])
def test_means_are_finite_numbers(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f"[preprocessing]\n{key} = {value}")
    with pytest.raises(UsageError):
        load_recipe(path, {})


def test_a_layer_is_named_once() -> None:
    assert Recipe(float_layers=("a", "b", "a")).float_layers == ("a", "b")


def test_settings_that_do_not_go_together_are_said_without_the_whole_recipe() -> None:
    with pytest.raises(UsageError, match="does not go with w8a8-dynamic") as caught:
        load_recipe(None, {"scheme": "w8a8-dynamic", "max_drop": 1.0})
    assert str(caught.value).startswith("the options: max_drop")
    assert "preprocessing" not in str(caught.value)


@pytest.mark.parametrize("value", [True, "1", -1.0, 101.0, float("nan")])
def test_a_drop_is_a_number_of_points(value: Any) -> None:
    with pytest.raises(UsageError, match="Allowed: a number, 0 to 100"):
        load_recipe(None, {"max_drop": value})


def test_a_table_asks_for_training(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        'scheme = "w4a8"\ntrain = "images/"\n'
        "[finetune]\nepochs = 3\nrate = 0.02\n[finetune.augmentation]\ncrop = 0.5\n"
    )
    plain = load_recipe(file, {"finetune": {"epochs": None}})
    assert plain.finetune is not None
    assert (plain.finetune.epochs, plain.finetune.rate) == (3, 0.02)
    assert plain.finetune.augmentation.crop == 0.5
    assert plain.train == "images/"
    # Flags are laid over it key by key, tables within it too.
    flags = {"finetune": {"epochs": 1, "augmentation": {"flip": 0.0}}}
    over = load_recipe(file, flags)
    assert over.finetune is not None
    assert (over.finetune.epochs, over.finetune.rate) == (1, 0.02)
    assert (over.finetune.augmentation.crop, over.finetune.augmentation.flip) == (0.5, 0.0)
    assert load_recipe(None, {"finetune": {"epochs": None}}).finetune is None


@pytest.mark.parametrize(
    ("table", "said", "allowed"),
    [
        ("[finetune]\nepoch = 3\n", "finetune.epoch is not known", "engine, epochs, batch"),
        (
            "[finetune.augmentation]\ncut = 1\n",
            "finetune.augmentation.cut is not known",
            "crop, flip",
        ),
        ("finetune = 3\n", "finetune is 3", ""),
    ],
)
def test_what_training_does_not_know_is_said_with_what_it_knows(
    tmp_path: Path, table: str, said: str, allowed: str
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(table)
    with pytest.raises(UsageError) as caught:
        load_recipe(file, {})
    assert said in caught.value.got
    assert allowed in caught.value.allowed


def test_later_settings_lie_over_earlier_ones() -> None:
    found = load_recipe(None, {"scheme": "w8", "seed": 3}, {"scheme": None, "seed": 4})
    assert (found.scheme, found.seed) == ("w8", 4)


@pytest.mark.parametrize(
    "keys",
    [
        Recipe.model_fields,
        PreprocessingOverride.model_fields,
        Budget.model_fields,
        [item.name for item in dataclasses.fields(Finetuning)],
        [item.name for item in dataclasses.fields(Augmentation)],
    ],
    ids=["recipe", "preprocessing", "gate", "finetune", "augmentation"],
)
def test_every_key_stands_in_the_docs(
    request: pytest.FixtureRequest, keys: Collection[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|")]
    table = {"recipe": "| top |", "augmentation": "finetune.augmentation]"}
    which = request.node.callspec.id
    [stated] = [
        right for left, right in rows if table.get(which, f"[{which}]") in f"|{left}|" and right
    ]
    for key in set(keys) - {"preprocessing", "gate", "finetune", "augmentation"}:
        if (which, key) != ("gate", "baseline"):
            assert f"`{key}`" in stated, key


def test_the_flags_of_finetune_show_the_defaults_that_hold() -> None:
    defaults = {**values(Finetuning()), **values(Augmentation())}
    del defaults["augmentation"]
    shown = {}
    for name, kind in get_type_hints(finetune, include_extras=True).items():
        for option in get_args(kind)[1:]:
            if isinstance(option.show_default, str):
                shown[name] = option.show_default
    stated = {
        k: v if isinstance(v, str) else f"{v:g}" for k, v in defaults.items() if v is not None
    }
    assert shown == stated | {"images": "all"}


def values(record: Any) -> dict[str, Any]:
    return {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
