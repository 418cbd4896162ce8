"""Mixed precision under a budget: the cheapest assignment that keeps to `--max-drop`.

In: a quantized model with every layer in integers. Out: the model with as many layers in float as
the budget needs, and the `Tuning` that tells how that was found.

What a layer loses is taken on calibration images; `pipeline.assign` makes a front of assignments of
it. Those are tried by bisection on the evaluation images, where the upper end of the drop's
interval decides, as it does in the gate. The choice is made once: what is measured later does not
change it. Sensitivities are taken in any case, for the report.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from pipeline.errors import ArtifactError, DataError, EdgeError
from pipeline.exports import MODEL_FILES
from pipeline.records import Assignment, Cost, Sensitivity, Tuning, to_json
from pipeline.statistics import paired_difference_interval
from pipeline.store import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pipeline.data import Chosen, Data
    from pipeline.records import Accuracy, Preprocessing, Profile
    from pipeline.stages import Done, Stages
    from pipeline.worker import Progress

TUNING = "tuning.json"
LIBRARIES = ("torch", "numpy", "scipy")
RAISE = "Give a larger --max-drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What a model is tuned from.

    Attributes:
        base: The stage that quantized every layer.
        calibration: Images that sensitivities are taken on.
        evaluation: Images that decide.
        preprocessing: Of both.
        profile: Whose integers are tried.
        max_drop_pp: Percentage points that the upper end of the drop's interval may reach.
    """

    base: Done
    calibration: Chosen
    evaluation: Chosen
    preprocessing: Preprocessing
    profile: Profile
    max_drop_pp: float


class Tuner:
    """Finds the assignment.

    Args:
        stages: Where results are kept.
        given: What it is found from.
        judge: Returns the accuracy of a reference artifact on the evaluation images, given a name,
            its path and its sha256.
        saved_ms: Measures what integers save; see `pipeline.assign.layer_costs`.
    """

    def __init__(
        self,
        stages: Stages,
        given: Basis,
        *,
        judge: Callable[[str, Path, str], Accuracy],
        saved_ms: Callable[[], Mapping[str, float]],
    ) -> None:
        self.stages = stages
        self.given = given
        self.judge = judge
        self.saved_ms = saved_ms
        self.tried: dict[tuple[str, ...], tuple[Done, Accuracy]] = {}

    def run(self) -> Path:
        """Return a folder with params.json, tensors.safetensors and tuning.json.

        Raises:
            DataError: So many images are unreadable that the others cannot decide.
            ArtifactError: No assignment keeps to the budget.
        """
        stage = Stage(
            name="tune",
            # Of its parts too, which are called by name.
            modules=("pipeline.tune", "pipeline.assign", "pipeline.verify"),
            inputs=self._inputs() | {"evaluation": self.given.evaluation.source.sha256},
            settings=self._settings() | {"max_drop_pp": self.given.max_drop_pp},
            libraries=LIBRARIES,
        )
        # Its parts are stages too, with lines of their own: they come before this one's.
        tuning = None if self.stages.is_done(stage) else self._tuned()

        def make(folder: Path, progress: Progress) -> None:
            assert tuning is not None, "a finished stage is not made"
            chosen, _ = self.tried[tuning.front[tuning.chosen].float_layers]
            for done, name in enumerate(MODEL_FILES):
                progress(done, 2)
                shutil.copyfile(chosen.folder / name, folder / name)
            (folder / TUNING).write_bytes(to_json(tuning))
            progress(2, 2)

        return self.stages.do_here(stage, make)

    def _tuned(self) -> Tuning:
        made = self.stages.do(
            Stage(
                name="sensitivity",
                modules=("pipeline.sensitivity",),
                inputs=self._inputs() | {"images": self.given.calibration.source.sha256},
                settings=self._settings(),
                libraries=(*LIBRARIES, "pillow"),
            ),
            "pipeline.sensitivity:sensitivity_stage",
            model=str(self.given.base.folder),
            selection=asdict(self.given.calibration.selection),
            preprocessing=asdict(self.given.preprocessing),
            profile=self.given.profile,
        )
        rows, saved_ms = made.value["sensitivities"], dict(self.saved_ms())
        priced = self.stages.do(
            Stage(
                name="front",
                modules=("pipeline.assign",),
                inputs={"sensitivity": made.folder.name},
                settings={"saved_ms": saved_ms},
                libraries=LIBRARIES,
            ),
            "pipeline.assign:front_stage",
            sensitivities=rows,
            saved_ms=saved_ms,
        ).value
        points = TypeAdapter(tuple[Assignment, ...]).validate_python(priced["front"])
        chosen = first_that_keeps(points, self._keeps)
        tried = {layers: accuracy for layers, (_, accuracy) in self.tried.items()}
        if chosen is None:
            raise _unreachable(self.given.max_drop_pp, tried)
        return Tuning(
            max_drop_pp=self.given.max_drop_pp,
            profile=self.given.profile,
            images=made.value["images"],
            sensitivities=TypeAdapter(tuple[Sensitivity, ...]).validate_python(rows),
            cost=TypeAdapter(Cost).validate_python(priced["cost"]),
            front=tuple(replace(p, accuracy=tried.get(p.float_layers)) for p in points),
            chosen=chosen,
        )

    def _keeps(self, point: Assignment) -> bool:
        """Try an assignment on the evaluation images."""
        name = f"candidate-{len(self.tried) + 1}"
        done = self.stages.do(
            Stage(
                name=name,
                modules=("pipeline.assign",),
                inputs=self._inputs(),
                settings=self._settings() | {"float_layers": point.float_layers},
                libraries=LIBRARIES,
            ),
            "pipeline.assign:candidate_stage",
            model=str(self.given.base.folder),
            float_layers=list(point.float_layers),
            profile=self.given.profile,
        )
        accuracy = self.judge(name, done.folder / done.value["path"], done.value["sha256"])
        self.tried[point.float_layers] = done, accuracy
        if accuracy.n is not None:
            # Some may have been unreadable.
            _check_enough(self.given.max_drop_pp, accuracy.n)
        return _upper_end(accuracy) <= self.given.max_drop_pp

    def _inputs(self) -> dict[str, str]:
        # A stage's folder is named after all that went into it.
        return {"base": self.given.base.folder.name}

    def _settings(self) -> dict[str, object]:
        return {"profile": self.given.profile, "preprocessing": asdict(self.given.preprocessing)}


def first_that_keeps(
    points: Sequence[Assignment], keeps: Callable[[Assignment], bool]
) -> int | None:
    """Return the index of the cheapest assignment that keeps to a budget, tried by bisection.

    Args:
        points: Cheapest first; each is taken to lose less than those before it. Where that is not
            so, a cheaper one than the one returned may keep to the budget too.
        keeps: Tells whether one does. Everything in integers is tried first: it mostly does.

    Returns:
        Its index, None where none of those tried does.
    """
    if keeps(points[0]):
        return 0
    broken, kept = 0, len(points)
    while kept - broken > 1:
        middle = (broken + kept) // 2
        if keeps(points[middle]):
            kept = middle
        else:
            broken = middle
    return kept if kept < len(points) else None


def _upper_end(accuracy: Accuracy) -> float:
    if accuracy.drop_ci95_pp is None:
        raise ArtifactError(
            f"the reference could not be tried ({accuracy.reason})",
            allowed="an artifact that runs",
            do="See the log in RUN_DIR/logs",
        )
    return accuracy.drop_ci95_pp[1]


def check_decidable(max_drop_pp: float, data: Data) -> None:
    """Check that the evaluation images can show whether a budget is kept to.

    Raises:
        DataError: There are none, or so few that predictions that do not change at all would not
            be enough.
    """
    if data.evaluation is None:
        raise DataError(
            f"--max-drop {max_drop_pp:g} without evaluation images: {data.why_not}",
            allowed="labelled images, on which a drop can be seen",
            do="Give --eval, or leave --max-drop out",
        )
    _check_enough(max_drop_pp, data.evaluation.source.n)


def _check_enough(max_drop_pp: float, n: int) -> None:
    least = 100 * paired_difference_interval(0, 0, n)[1]
    if least > max_drop_pp:
        shown = f"{math.ceil(100 * least) / 100:.2f}"
        raise DataError(
            f"--max-drop {max_drop_pp:g} with {n:,} readable evaluation images: if not one of them"
            f" changed, the drop's interval would still reach {shown} points",
            allowed=f"{shown} or more, or more images",
            do=f"{RAISE}, or more images with --eval",
        )


def _unreachable(limit: float, tried: Mapping[tuple[str, ...], Accuracy]) -> EdgeError:
    best = min(tried, key=lambda layers: _upper_end(tried[layers]))
    return ArtifactError(
        f"--max-drop {limit:g} is not kept to by any of {len(tried)} assignments tried: the best"
        f" one leaves {len(best)} layers in float, and its drop's interval reaches"
        f" {_upper_end(tried[best]):.2f} points",
        allowed="a budget that integers can keep to",
        do=f"{RAISE}, or take a scheme with more bits",
    )
