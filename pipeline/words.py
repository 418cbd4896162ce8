"""Words of the command line become values of a recipe.

In: the text of a flag. Out: a path, numbers, a list; or one line that says what is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe


def absolute(path: Path | None) -> str | None:
    """Return a path that holds whatever the working directory is; None stays None."""
    return str(path.absolute()) if path is not None else None


def checkpoint_place(where: str | None) -> str | None:
    """Return where a checkpoint lies: an absolute path, or the hub's name as it is."""
    from pipeline.locate import HUB_PREFIX

    # An empty word, of an unset variable, is no folder: the recipe refuses it.
    return where if not where or where.startswith(HUB_PREFIX) else str(Path(where).absolute())


def class_order_place(order: str | None) -> str | None:
    """Return an absolute path, or the word `sorted` as it is."""
    from calib.labels import SORTED

    return order if order in {None, "", SORTED} else str(Path(str(order)).absolute())


def weights_word(word: str) -> Any:
    """Return which weights are asked for.

    Raises:
        UsageError: There is no such word.
    """
    from typing import get_args

    from pipeline.records import Weights

    if word not in get_args(Weights):
        raise UsageError(
            f"--weights {word}", allowed=", ".join(get_args(Weights)), do="Correct --weights"
        )
    return word


def data_place(where: str | None) -> str | None:
    """Return where images lie: an absolute path, or the words `digits` and `none` as they are."""
    from calib.images import DIGITS
    from pipeline.recipe import NONE

    return where if where in {None, "", DIGITS, NONE} else str(Path(str(where)).absolute())


def with_places(settings: Recipe) -> Recipe:
    """Return a recipe whose places hold whatever the working directory is."""
    files = {name: getattr(settings, name) for name in ("label_file", "baseline")}
    images = {name: data_place(getattr(settings, name)) for name in ("data", "eval", "train")}
    return settings.model_copy(
        update={
            "checkpoint": checkpoint_place(settings.checkpoint),
            "class_order": class_order_place(settings.class_order),
            **images,
            **{name: absolute(Path(place) if place else None) for name, place in files.items()},
        }
    )


def listed(text: str) -> list[str]:
    """Return the words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    """Return the numbers between commas.

    Raises:
        UsageError: They are none.
    """
    if text is None:
        return None
    try:
        return tuple(float(word) for word in listed(text))
    except ValueError as error:
        raise UsageError(
            f"{flag} is {text!r}",
            allowed="three numbers, such as 0.485,0.456,0.406; or one, for grey images",
            do=f"Correct {flag}",
        ) from error
