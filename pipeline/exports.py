"""The artifacts of a run: what each runtime is asked for, and the stages that write it.

In: a recipe and a folder with a quantized model. Out: one `Artifact` per runtime and scheme.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.placements import PLACEMENTS, widest
from pipeline.recipe import NONE
from pipeline.records import (
    FLOATING,
    PROFILE_OF_ISA,
    SCHEMES,
    Artifact,
    Calibration,
    Export,
    Layout,
    Proof,
    Wanted,
)
from pipeline.stages import STAGES
from pipeline.store import Stage, publish, sha256_file
from targets import base
from targets.base import ARTIFACT_STEM, check_expressible, placement_of
from targets.devices.local import host_isa, isa_flags

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from pipeline.recipe import Recipe
    from pipeline.records import Isa, Profile
    from pipeline.stages import Stages
    from pipeline.worker import Worker
    from targets.base import Runtime

ARTIFACTS = "artifacts"
"""Their place in a run folder."""
NO_LAYOUTS: Mapping[str, Layout] = {}
MODEL_FILES = ("params.json", "tensors.safetensors")
"""What `pipeline.quantize` writes."""


class Exports:
    """What a recipe wants written.

    Args:
        recipe: Everything the run depends on.
        layouts: Of each runtime; those left out have its default.

    Raises:
        EdgeError: A runtime is unknown, is not installed, or does not express what is asked of it.
    """

    def __init__(self, recipe: Recipe, layouts: Mapping[str, Layout] = NO_LAYOUTS) -> None:
        self.recipe = recipe
        self.layouts = layouts
        _check_placement(recipe)
        self.targets = [base.runtime(name) for name in dict.fromkeys(recipe.runtimes)]
        for target in self.targets:
            base.require_installed(target)
            for wanted in self.exports(target):
                check_expressible(wanted, target)

    def laid_out(self, layouts: Mapping[str, Layout]) -> Exports:
        """Return the same with other layouts."""
        return Exports(self.recipe, layouts)

    def isa(self, target: Runtime) -> Isa:
        """Return what a runtime's artifacts are made for."""
        default = target.capabilities.default_isa or host_isa()
        return default if self.recipe.isa == "auto" else self.recipe.isa

    def exports(self, target: Runtime) -> list[Export]:
        """Return a runtime's artifacts: the float one, which others are held against, comes first.

        There is no other where its layout says that integers are not faster.
        """
        layout = self.layouts.get(target.name) or self.default_layout(target, "")
        scheme = layout.scheme
        return [
            Export(
                runtime=target.name,
                scheme=one,
                placement=(layout.placement or NONE) if one not in FLOATING else NONE,
                graph_form=layout.graph_form if one != "float" else layout.float_form,
                gelu=target.capabilities.gelu,
                profile=self._profile(target) if one not in FLOATING else None,
                batch=self.recipe.batch,
                float_stages=layout.float_stages if one not in FLOATING else (),
            )
            for one in SCHEMES
            if one in {"float", scheme}
        ]

    def default_layout(self, target: Runtime, reason: str) -> Layout:
        """Return what a runtime takes where nothing was measured, and why that is."""
        can, scheme = target.capabilities, self.recipe.scheme
        quantized = scheme not in FLOATING
        return Layout(
            runtime=target.name,
            source="default",
            reason=reason,
            isa=self.isa(target),
            asked=scheme,
            scheme=scheme,
            placement=placement_of(target, self.recipe.placement) if quantized else None,
            graph_form=can.graph_forms[0],
            float_form=can.graph_forms[0],
        )

    def integers(self) -> Wanted:
        """Say what the integers are made for: the widest placement of all artifacts.

        Where none is asked, that of every runtime's default, so that a runtime that is exported
        later gets the same integers; with `--tune full` that of every candidate.
        """
        scheme = self.recipe.scheme
        if scheme in FLOATING:
            return Wanted(calibration=Calibration(method="min-max"))  # no artifact will hold them
        asked = self.recipe.placement
        targets = base.runtimes().values() if asked is None else self.targets
        placements = {placement_of(target, asked) for target in targets}
        if asked is None and self.recipe.tune == "full":
            placements = {name for one in self.targets for name in one.capabilities.placements}
        return Wanted(
            scheme=scheme,
            placement=widest(placements),
            calibration=self.recipe.calibration(),
            float_layers=self.recipe.float_layers,
        )

    def profile(self) -> Profile:
        """Return the profile that loses most of those that artifacts will have."""
        return "avx2" if "avx2" in map(self._profile, self.targets) else "full"

    def write(self, stages: Stages, model: Path, *, kept: bool = True) -> list[Artifact]:
        """Return the artifacts of a model, written where they are missing.

        Args:
            stages: Of the run.
            model: Folder with params.json and tensors.safetensors.
            kept: Whether they are the run's: those that are not stay in their stages.
        """

        def export(target: Runtime) -> list[Artifact]:
            # One worker for all schemes: the frameworks are slow to import.
            with stages.worker(f"export-{target.name}") as worker:
                wanted = self.exports(target)
                made = [self._artifact(stages, worker, one, model) for one in wanted]
            return [_published(stages, one) for one in made] if kept else made

        found = [item for items in stages.side_by_side(export, self.targets) for item in items]
        if kept:
            _remove_others(stages.out / ARTIFACTS, {one.name for one in found})
        return found

    def one(self, stages: Stages, model: Path, wanted: Export) -> Artifact:
        """Return one artifact where its stage left it; it is not the run's yet."""
        with stages.worker(f"export-{wanted.runtime}") as worker:
            return self._artifact(stages, worker, wanted, model)

    def _profile(self, target: Runtime) -> Profile:
        return PROFILE_OF_ISA[self.isa(target)]

    def _artifact(
        self,
        stages: Stages,
        worker: Worker,
        wanted: Export,
        model: Path,
    ) -> Artifact:
        """Return an artifact where its stage left it."""
        target = base.runtime(wanted.runtime)
        done = stages.do(
            Stage(
                name=f"export-{wanted.runtime}-{wanted.scheme}",
                modules=("targets.export", type(target).__module__),
                inputs={name: sha256_file(model / name) for name in MODEL_FILES},
                # The proof is this host's: a runtime chooses its kernels by ISA.
                settings={**asdict(wanted), "host": isa_flags()},
                libraries=("torch", "numpy", *target.capabilities.distributions),
            ),
            "targets.export:export_stage",
            worker=worker,
            model=str(model),
            export=asdict(wanted),
        )
        made = done.value
        return Artifact(
            export=wanted,
            path=f"{done.folder.relative_to(stages.out)}/{made['path']}",
            sha256=made["sha256"],
            size_bytes=made["size_bytes"],
            sites=tuple(made["sites"]),
            proof=Proof(**made["proof"]),
            files=made["files"],
            export_seconds=done.seconds,
            export_peak_memory_bytes=done.peak_memory_bytes,
        )


def _check_placement(recipe: Recipe) -> None:
    if recipe.placement is None:
        return
    if recipe.placement not in PLACEMENTS:
        raise UsageError(
            f"unknown placement: {recipe.placement}",
            allowed=", ".join(PLACEMENTS),
            do="Correct --placement",
        )
    if recipe.scheme in FLOATING:
        raise UsageError(
            f"--placement {recipe.placement} with --scheme {recipe.scheme}, which has no integers",
            allowed="another --scheme, or no --placement",
            do="Leave one of them out",
        )


def _remove_others(folder: Path, shipped: Collection[str]) -> None:
    """Take away what is no longer shipped: it must not stand beside what is.

    Its stage has it still, and a run that asks for it publishes it again.
    """
    for name in folders_in(folder):
        if name not in shipped:
            shutil.rmtree(folder / name, ignore_errors=True)


def folders_in(artifacts: Path) -> list[str]:
    """Return the names of the artifacts' folders that are there."""
    names = ("-".join(pair) for pair in itertools.product(base.runtimes(), SCHEMES))
    return [name for name in names if (artifacts / name).is_dir()]


def foreign_in(out: Path) -> Path | None:
    """Return what lies among a run folder's artifacts and no run wrote, where there is something.

    Args:
        out: The run folder, whose stages know what they wrote.
    """
    ours = folders_in(out / ARTIFACTS)
    found = [one for one in (out / ARTIFACTS).glob("*") if one.name not in ours]
    for name in ours:
        stages = (out / STAGES).glob(f"export-{name}-*")
        wrote = {one.name for stage in stages for one in stage.iterdir()}
        found += [
            one
            for one in (out / ARTIFACTS / name).iterdir()
            if (one.name not in wrote if wrote else one.stem != ARTIFACT_STEM)
        ]
    # What a system leaves by itself, and what an interrupted run left, is nobody's.
    foreign = (one for one in sorted(found) if not one.name.startswith((".DS_Store", ".partial-")))
    return next(foreign, None)


def _published(stages: Stages, artifact: Artifact) -> Artifact:
    """Copy an artifact to its place in the run folder."""
    source, place = stages.out / artifact.path, f"{ARTIFACTS}/{artifact.name}"
    publish(source.parent, stages.out / place, artifact.files)
    return replace(artifact, path=f"{place}/{source.name}")
