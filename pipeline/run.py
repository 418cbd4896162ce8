"""The composition root: a recipe becomes a run folder.

In: a `Recipe` and a folder. Out: in that folder the artifacts, report.json, pages and the gate's
word. Every stage is looked up in the store first and runs in a worker process where it is missing.

    checkpoint -> calibrate -> quantize -> tune -> finetune -> export -> verify -> bench -> report
                                          (where asked)       (each per artifact)   -> gate
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from calib.batches import spare_workers
from pipeline.autotune import Autotuner, Conditions, counts_instructions
from pipeline.conclude import JUNIT, PAGES, SUMMARY, conclude
from pipeline.data import choose
from pipeline.dialect import dialect_modules
from pipeline.distributed import ranks_here
from pipeline.errors import ArtifactError, UsageError
from pipeline.exports import ARTIFACTS, MODEL_FILES, Exports, folders_in, foreign_in
from pipeline.finetune import Course, Finetuner, require_trainable
from pipeline.lab import PLACES, Lab, check_threads, kept_places, places_json
from pipeline.layouts import LAYOUTS, kept_layouts, network_key
from pipeline.loaded import read_record
from pipeline.locate import locate
from pipeline.measure import Timing, Verification, time_saved
from pipeline.parity import Outputs
from pipeline.placements import check_layers
from pipeline.recipe import Recipe, load_recipe
from pipeline.recorder import METRICS
from pipeline.records import (
    FLOATING,
    Artifact,
    Checkpoint,
    Layout,
    Parity,
    Place,
    Preprocessing,
    QuantizedModel,
    Training,
    Tuning,
    to_json,
)
from pipeline.sidecar import DEFAULT_INPUT_SIZE, GEOMETRY, read_sidecar
from pipeline.stages import Done, Stages
from pipeline.store import Stage, publish, sha256_file, write_atomic
from pipeline.tune import TUNING, Basis, Tuner, check_decidable
from pipeline.worker import end_all, ending
from reports import assemble, document
from reports.document import REPORT
from reports.gate import paired_check
from targets import base
from targets.devices.local import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from pipeline.data import Data
    from pipeline.display import Display
    from pipeline.records import Accuracy, Latency
    from pipeline.sidecar import Sidecar
    from pipeline.worker import Worker
    from reports.document import Report
    from targets.base import DeviceInfo

EMBEDDED = Path(__file__).parent / "embedded" / "digits.safetensors"
EMBEDDED_RECIPE = Path(__file__).parent / "embedded" / "recipe.toml"

RECIPE, MODEL = "recipe.json", "model"
"""Places in a run folder, beside artifacts/, stages/, logs/, samples/ and what `pipeline.conclude`
writes."""
OF_MEASURING = {"runtimes", "gate", "baseline", "bench", "device", "threads", "tune"}
"""Of a recipe: what one runtime's artifacts do not depend on, where nothing is tuned in full."""
PUBLISHED, LEFT = (MODEL, ARTIFACTS, PAGES), (REPORT, JUNIT, SUMMARY, LAYOUTS, PLACES)
"""Folders and files that another model takes the place of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How far a run goes; a step that is not asked still takes over what was finished before.

    `choose` chooses the runtimes' layouts; without it those of the last run that did are kept.
    `places` are devices beside the recipe's own: there `bench` takes times and `verify` compares
    the outputs of so many `images`; without `here` the recipe's own is left alone.
    `again` measures what `bench` is asked for anew.
    `restart` throws an unfinished training away instead of going on from it; `beside` is a run
    folder that this one follows, whose finished stages count as well.
    """

    export: bool = True
    verify: bool = True
    bench: bool = True
    choose: bool = True
    here: bool = True
    places: tuple[Place, ...] = ()
    images: int = 100
    again: bool = False
    restart: bool = False
    beside: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a run leaves behind; `report` is None where it ended before exporting."""

    report: Report | None
    made: tuple[str, ...]
    reused: tuple[str, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """The errors of every measurement that failed."""
        if self.report is None:
            return ()
        results: list[Accuracy | Latency | Parity] = [*self.report.parity]
        for row in self.report.artifacts:
            results += [row.accuracy, *row.latency]
        return tuple(str(r.reason) for r in results if r.outcome == "failed")


def execute(recipe: Recipe, out: Path, steps: Steps, display: Display) -> Finished:
    """Run the stages that a recipe asks for.

    Args:
        recipe: Everything the run depends on.
        out: The run folder; made where it is missing.
        steps: How far to go.
        display: Where progress is shown.

    Returns:
        The report as written to report.json, and which stages were made or reused.

    Raises:
        EdgeError: One line for the user; finished stages are kept.
    """
    try:
        return _Run(recipe, out, display, steps.beside).execute(steps)
    except BaseException:
        # Ctrl-C included: a thread that waits for a worker must not keep the process alive.
        end_all()
        raise
    finally:
        ending.clear()


def stored_recipe(out: Path) -> Recipe:
    """Read the recipe that a run folder was made from.

    Raises:
        ArtifactError: It is not a run folder.
    """
    try:
        return Recipe.model_validate_json((out / RECIPE).read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"{out} is not a run folder ({RECIPE} is missing or damaged)",
            allowed="a folder that `convnext-edge run --out` wrote",
            do="Correct the path",
        ) from error


def trained_on(out: Path, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a run folder, with training after its calibration.

    Layers that its `--max-drop` left in float stay float, and its limit stays the gate's.

    Args:
        out: The run folder.
        changes: As of `load_recipe`.

    Raises:
        EdgeError: It is not a run folder; or a change is none that a recipe takes.
    """
    stored = stored_recipe(out)
    stated = stored.model_dump(exclude_none=True)
    if stored.max_drop is not None:
        budget = stored.budget()
        assert budget is not None
        left = quantized_model(out / MODEL).float_layers
        stated |= {"gate": budget.model_dump(exclude_none=True), "float_layers": left}
        del stated["max_drop"]
    if stored.tune == "full":
        # Its integers are of every placement: training goes on from those.
        stated |= {"tune": "quick", "placement": quantized_model(out / MODEL).placement}
    # A table that says nothing asks for training as it is by default.
    return load_recipe(None, {"finetune": {"engine": "own"}, **stated}, changes)


def added_to(out: Path, recipe: Recipe, given: Collection[str]) -> Recipe:
    """Return the recipe of a run folder with further runtimes, where nothing else would change.

    Args:
        out: The run folder, or none.
        recipe: What is exported there; it is returned where the folder's differs.
        given: Names of the settings that were stated.
    """
    try:
        stored = stored_recipe(out)
    except ArtifactError:
        return recipe
    # Those may depend on the runtimes, and on what was measured.
    full = "full" in {stored.tune, recipe.tune} or recipe.max_drop is not None
    alike = stored.model_dump(exclude=OF_MEASURING) == recipe.model_dump(exclude=OF_MEASURING)
    there = folders_in(out / ARTIFACTS)
    kept = [name for name in stored.runtimes if f"{name}-float" in there]
    if full or not alike or not kept:
        return recipe
    stated = {name: getattr(recipe, name) for name in OF_MEASURING & set(given)}
    runtimes = tuple(dict.fromkeys((*kept, *recipe.runtimes)))
    return stored.model_copy(update={**stated, "runtimes": runtimes})


def quantized_model(folder: Path) -> QuantizedModel:
    """Read the record of a quantized model, without its arrays.

    Raises:
        ArtifactError: There is none.
    """
    try:
        text = (folder / MODEL_FILES[0]).read_bytes()
        return TypeAdapter(QuantizedModel).validate_json(text)
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"{folder} holds no quantized model ({type(error).__name__})",
            allowed="the folder model/ of a finished run",
            do="Run `convnext-edge run` again",
        ) from error


def preprocessing_of(recipe: Recipe, sidecar: Sidecar) -> Preprocessing:
    """Lay a recipe's settings over the sidecar's, and both over the defaults.

    Raises:
        UsageError: Together they make no preprocessing.
    """
    flags = recipe.preprocessing.model_dump(exclude_none=True)
    if recipe.input_size is not None:
        flags["input_size"] = recipe.input_size
    stated = sidecar.preprocessing
    if GEOMETRY & flags.keys():
        # They mean something together: a flag is not to be undone by what a file adds to it.
        stated = {name: value for name, value in stated.items() if name not in GEOMETRY}
    settings = {"input_size": DEFAULT_INPUT_SIZE, **stated, **flags}
    try:
        return Preprocessing(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0] if first["loc"] else None
        says = first["msg"].removeprefix("Value error, ")
        got = f"{name} is {first['input']!r} ({says})" if name else says
        raise UsageError(
            f"preprocessing: {got}",
            allowed=", ".join(item.name for item in fields(Preprocessing)),
            do="Correct the sidecar .json, the recipe or the flag",
        ) from error


class _Run:
    def __init__(self, recipe: Recipe, out: Path, display: Display, beside: Path | None) -> None:
        _check_place(out, beside)
        self.recipe = recipe
        self.out = out
        self.display = display
        self.exports = Exports(recipe)
        if recipe.finetune is not None:
            require_trainable(recipe.finetune)
        self.device = base.device(recipe.device)
        self.located = locate(recipe.checkpoint or EMBEDDED)
        self.sidecar = read_sidecar(self.located)
        self.preprocessing = preprocessing_of(recipe, self.sidecar)
        cores = max(1, available_cores() // ranks_here())
        self.stages = Stages(out, display, cores=cores, beside=beside)

    def execute(self, steps: Steps) -> Finished:
        if steps.bench and self.recipe.bench:
            check_threads(self.device.probe(), self.recipe.threads)
        self.display.preprocessing(self.preprocessing, self.sidecar.source)
        # Three stages that follow one another share a process: torch is slow to import.
        with self.stages.worker(MODEL) as worker:
            loaded, model = self._checkpoint(worker)
            if self.recipe.float_layers:
                placement = self.exports.integers().placement
                check_layers(self.recipe.float_layers, model.architecture, placement)
            with self.display.stage("data") as progress:
                data = choose(self.recipe, model, progress)
            if self.recipe.max_drop is not None:
                check_decidable(self.recipe.max_drop, data)
            calibrated = self._calibrate(worker, loaded, data)
            quantized = self._quantize(worker, loaded, model, data, calibrated)
        integers = quantized.folder
        if self.recipe.max_drop is not None:
            integers = self._tune(self.recipe.max_drop, steps, quantized, loaded, model, data)
        training = None
        if self.recipe.finetune is not None:
            integers, training = self._finetune(steps, integers, loaded, model, data)
        before = folders_in(self.out / ARTIFACTS)
        # Measuring takes minutes: what stands in the folder is replaced only when all is known.
        layouts, kept = dict[str, Layout](), dict[str, Layout]()
        if steps.export:
            layouts, kept = self._layouts(integers, steps, loaded, model, data)
        self._publish(integers)
        # Only now: what was refused must not stand beside the results of an earlier run.
        write_atomic(self.out / RECIPE, self.recipe.model_dump_json(indent=2).encode())
        report = None
        if steps.export:
            write_atomic(self.out / LAYOUTS, to_json(kept))
            self.exports = self.exports.laid_out(layouts)
            artifacts = self.exports.write(self.stages, integers)
            data = data.without(calibration=calibrated.value["skipped"])
            chosen = replace(
                self._choices(integers, quantized, data, training),
                layouts=tuple(layouts.values()),
            )
            report = self._report(steps, loaded, model, data, artifacts, chosen, integers)
        there = folders_in(self.out / ARTIFACTS)
        if gone := [name for name in before if name not in there]:
            self.display.note(f"not asked for, so taken out of {ARTIFACTS}/: {', '.join(gone)}")
        store = self.stages.store
        return Finished(report=report, made=tuple(store.made), reused=tuple(store.reused))

    def _report(
        self,
        steps: Steps,
        loaded: Done,
        model: Checkpoint,
        data: Data,
        artifacts: Sequence[Artifact],
        chosen: assemble.Choices,
        integers: Path,
    ) -> Report:
        verification = Verification(
            self.stages, loaded, model, self.preprocessing, asked=steps.verify and steps.here
        )
        verified = verification.run(artifacts, data)
        data = data.without(evaluation=verified.skipped)
        for images in (data.calibration, data.evaluation):
            if images is not None:
                self.display.skipped(images.source)
        asked = steps.bench and self.recipe.bench and steps.here
        timing = self._timing(model, asked=asked, anew=steps.again)
        lab = self._lab(steps, model)
        own, away = timing.run(artifacts), lab.latencies(artifacts, asked=steps.bench)
        report = assemble.report(
            local=_this_machine(),
            devices=[
                info
                for info in (*lab.described(), timing.info)
                if isinstance(info, base.DeviceInfo)
            ],
            distributions=[d for t in self.exports.targets for d in t.capabilities.distributions],
            checkpoint=assemble.model(model, loaded.value, self.preprocessing.input_size),
            data=document.Data(
                calibration=data.calibration.source,
                evaluation=data.evaluation.source if data.evaluation else None,
                preprocessing=asdict(self.preprocessing),
            ),
            artifacts=[
                assemble.artifact_row(artifact, accuracy, [latency, *others])
                for artifact, accuracy, latency, others in zip(
                    artifacts, verified.accuracies, own, away, strict=True
                )
            ],
            measured=assemble.Measured(
                float_result=verified.float_result,
                agreement=verified.agreement,
                breakdowns=[
                    *timing.breakdowns(artifacts, integers),
                    *lab.breakdowns(artifacts, integers, asked=steps.bench),
                ],
                parity=self._parity(lab, artifacts, data, integers),
            ),
            chosen=chosen,
        )
        # Only now: an interrupted run leaves the places as they were, with all that they gave.
        if lab.spots:
            write_atomic(self.out / PLACES, places_json(lab.known()))
        # What was only exported has nothing to be judged by.
        rows = report.artifacts
        outcomes = {row.accuracy.outcome for row in rows}
        outcomes |= {one.outcome for row in rows for one in row.latency}
        known = "measured" in outcomes
        budget = self.recipe.budget() if steps.verify or steps.bench or known else None
        return conclude(report, self.out, budget, baseline=self.recipe.baseline, stages=self.stages)

    # --- stages, in the order of the flow ------------------------------------------------------

    def _checkpoint(self, worker: Worker) -> tuple[Done, Checkpoint]:
        how: dict[str, Any] = {
            "where": self.located.path,
            "weights": self.recipe.weights,
            "input_size": self.preprocessing.input_size,
            "channels": self.preprocessing.channels,
        }
        stage = Stage(
            name="checkpoint",
            modules=("pipeline.checkpoint", *dialect_modules()),
            inputs={"file": self.located.sha256()},
            # What lies beside the weights counts too: names of classes, a LayerNorm's eps.
            settings={**how, "sidecar": asdict(self.sidecar)},
            libraries=("torch", "safetensors"),
        )
        done = self.stages.do(stage, "pipeline.checkpoint:load_stage", worker=worker, **how)
        for warning in done.value["warnings"]:
            self.display.note(f"[yellow]odd weights:[/] {warning}")
        return done, read_record(done.folder)

    def _calibrate(self, worker: Worker, loaded: Done, data: Data) -> Done:
        how = asdict(self.preprocessing)
        stage = Stage(
            name="calibrate",
            modules=("pipeline.calibrate",),
            # A stage's folder is named after all that went into it.
            inputs={"images": data.calibration.source.sha256, "loaded": loaded.folder.name},
            settings={"preprocessing": how},
            libraries=("torch", "numpy", "pillow"),
        )
        return self.stages.do(
            stage,
            "pipeline.calibrate:calibrate_stage",
            worker=worker,
            shared=True,
            workers=spare_workers(data.calibration.source.n, self.stages.cores),
            model=str(loaded.folder),
            selection=asdict(data.calibration.selection),
            preprocessing=how,
        )

    def _quantize(
        self, worker: Worker, loaded: Done, checkpoint: Checkpoint, data: Data, calibrated: Done
    ) -> Done:
        how, wanted = asdict(self.preprocessing), asdict(self.exports.integers())
        parents = {"checkpoint": checkpoint.sha256, "calibration": data.calibration.source.sha256}
        inputs = {**parents, "loaded": loaded.folder.name}
        statistics = calibrated.folder / calibrated.value["statistics"]
        return self.stages.do(
            Stage(
                name="quantize",
                modules=("pipeline.quantize",),
                inputs={**inputs, "statistics": sha256_file(statistics)},
                settings={"preprocessing": how, "labels": checkpoint.labels, "wanted": wanted},
                libraries=("torch", "numpy", "pillow"),
            ),
            "pipeline.quantize:quantize_stage",
            worker=worker,
            model=str(loaded.folder),
            statistics=str(statistics),
            selection=asdict(data.calibration.selection),
            preprocessing=how,
            wanted=wanted,
            parents=parents,
        )

    def _tune(
        self,
        max_drop: float,
        steps: Steps,
        quantized: Done,
        loaded: Done,
        model: Checkpoint,
        data: Data,
    ) -> Path:
        """Return the folder of a model with as many layers in float as `--max-drop` needs."""
        exam = data.evaluation
        assert exam is not None, "check_decidable has seen to it"
        verification = Verification(self.stages, loaded, model, self.preprocessing, asked=True)

        def saved_ms() -> dict[str, float]:
            artifacts = self.exports.write(self.stages, quantized.folder, kept=False)
            rows = self._timing(model, asked=True, kept=False).run(artifacts)
            return time_saved(zip(artifacts, rows, strict=True))

        given = Basis(
            base=quantized,
            calibration=data.calibration,
            evaluation=exam,
            preprocessing=self.preprocessing,
            profile=self.exports.profile(),
            max_drop_pp=max_drop,
        )
        measure = saved_ms if steps.bench and self.recipe.bench else dict
        judge = verification.judge(exam)
        return Tuner(self.stages, given, judge=judge, saved_ms=measure).run()

    def _finetune(
        self, steps: Steps, base: Path, loaded: Done, model: Checkpoint, data: Data
    ) -> tuple[Path, Training]:
        """Return the folder of the model with learnt integers, and how they were learnt."""
        how, images = self.recipe.finetune, data.training
        assert how is not None
        assert images is not None, "choose has selected them"
        judge = None
        if data.evaluation is not None:
            judge = Verification(self.stages, loaded, model, self.preprocessing, asked=True).judge(
                data.evaluation
            )
        course = Course(
            base=base,
            images=images,
            workers=spare_workers(how.epochs * images.source.n, self.stages.cores),
            checkpoint=model,
            preprocessing=self.preprocessing,
            how=how,
        )
        folder, training = Finetuner(self.stages, course, judge=judge, restart=steps.restart).run()
        self.display.skipped(images.without(training.skipped).source)
        return folder, training

    def _layouts(
        self, integers: Path, steps: Steps, loaded: Done, model: Checkpoint, data: Data
    ) -> tuple[dict[str, Layout], dict[str, Layout]]:
        """Choose the graph form and placement of every runtime, by measurement where asked.

        Returns:
            What is exported, and what is kept for a later run.
        """
        shape, float_layers = self._image_shape(model), quantized_model(integers).float_layers
        if not steps.choose:
            return kept_layouts(
                self.exports,
                self.out / LAYOUTS,
                stages=len(model.architecture.depths),
                network=network_key(model.architecture, shape, float_layers),
            )
        budget = self.recipe.budget()
        limit = budget.max_drop_pp if budget is not None else None
        given = Conditions(
            device=self.device,
            counts=counts_instructions(self.device),
            threads=self.recipe.threads,
            architecture=model.architecture,
            macs=loaded.value["macs"],
            float_layers=float_layers,
            image_shape=shape,
            effort=self.recipe.tune,
            asked=steps.bench and self.recipe.bench,
        )
        keeps = None
        if limit is not None and data.evaluation is not None and steps.verify:
            verification = Verification(self.stages, loaded, model, self.preprocessing, asked=True)
            keeps = partial(_keeps, verification.of(data.evaluation), limit)
        chosen = Autotuner(self.stages, self.exports, given, keeps).run(integers)
        return chosen, chosen

    def _image_shape(self, model: Checkpoint) -> tuple[int, int, int, int]:
        size = self.preprocessing.input_size
        batch = 1 if self.recipe.batch == "dynamic" else self.recipe.batch
        return batch, model.architecture.in_channels, size, size

    def _timing(
        self, model: Checkpoint, *, asked: bool, anew: bool = False, kept: bool = True
    ) -> Timing:
        return Timing(
            self.stages,
            self.device,
            threads=self.recipe.threads,
            image_shape=self._image_shape(model),
            asked=asked,
            anew=anew,
            kept=kept,
        )

    def _lab(self, steps: Steps, model: Checkpoint) -> Lab:
        """Return what measures at the places of this folder."""
        own = Place(device=self.device.name, threads=self.recipe.threads)
        return Lab(
            self.stages,
            [one for one in kept_places(self.out / PLACES) if one.place != own],
            asked=[place for place in steps.places if place != own],
            images=steps.images if steps.verify else None,
            anew=steps.again,
            image_shape=self._image_shape(model),
        )

    def _parity(
        self, lab: Lab, artifacts: Sequence[Artifact], data: Data, integers: Path
    ) -> list[Parity]:
        """Compare outputs on devices with this host's."""
        outputs = None
        if data.evaluation is not None:
            outputs = Outputs(
                evaluation=data.evaluation,
                preprocessing=self.preprocessing,
                exports=self.exports,
                model=integers,
            )
        return lab.parities(artifacts, outputs, data.why_not)

    def _publish(self, integers: Path) -> None:
        """Lay the model where a person looks, and take away what an earlier one left."""
        told = [name for name in (TUNING, METRICS) if (integers / name).exists()]
        if publish(integers, self.out / MODEL, (*MODEL_FILES, *told)):
            for folder in PUBLISHED[1:]:
                shutil.rmtree(self.out / folder, ignore_errors=True)
            for name in LEFT:
                (self.out / name).unlink(missing_ok=True)

    def _choices(
        self, integers: Path, quantized: Done, data: Data, training: Training | None
    ) -> assemble.Choices:
        """Read what was chosen on the way to the integers; nothing where no artifact has any."""
        if self.recipe.scheme in FLOATING:
            return assemble.Choices()
        record = quantized_model(integers)
        tuning = integers / TUNING
        return assemble.Choices(
            calibration=assemble.calibration(
                record, sample=quantized.value["sample"], images=data.calibration.source.source
            ),
            tuning=TypeAdapter(Tuning).validate_json(tuning.read_bytes())
            if tuning.exists()
            else None,
            training=training,
        )


def _keeps(
    accuracy_of: Callable[[Artifact], Accuracy], limit_pp: float, artifact: Artifact
) -> tuple[bool, Accuracy]:
    """Tell whether an artifact may be shipped under a budget: not where it would fail the gate."""
    found = accuracy_of(artifact)
    if found.lost is None or found.gained is None or found.n is None:
        return found.outcome != "failed", found
    check = paired_check("", found.lost, found.gained, found.n, limit_pp, "the float model")
    return check.outcome != "fail", found


def _check_place(out: Path, beside: Path | None) -> None:
    """Refuse a folder that holds what would be replaced and no run wrote, or that is another's."""
    place, why = out.resolve(), None
    others = [name for name in (*PUBLISHED, *LEFT) if (out / name).exists()]
    if others and not _of_a_run(out):
        why = f"holds {' and '.join(others)}, and no run wrote it"
    elif (foreign := foreign_in(out)) is not None:
        why = f"holds {foreign}, which no run wrote and which would be lost"
    elif beside is not None and place == beside.resolve():
        why = "is RUN_DIR itself, whose model and artifacts would be lost"
    elif around := next((folder for folder in place.parents if _of_a_run(folder)), None):
        why = f"lies in the run folder {around}, and would be lost with its next run"
    if why is not None:
        raise UsageError(
            f"--out {out} {why}",
            allowed="a new or empty folder, or one of an earlier run as that left it",
            do="Give another --out, or move what is yours",
        )


def _of_a_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file() or any(folder.glob("stages/*/stage.json"))


def _this_machine() -> DeviceInfo:
    info = base.device("local").probe()
    assert isinstance(info, base.DeviceInfo), "this machine is always there"
    return info
