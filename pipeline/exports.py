"""The artifacts of a run: what each runtime is asked for, and the stages that write it.

In: a recipe and a folder with a quantized model. Out: one `Artifact` per runtime and scheme.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from pipeline.placements import widest
from pipeline.recipe import NONE
from pipeline.records import PROFILE_OF_ISA, SCHEMES, Artifact, Calibration, Export, Proof, Wanted
from pipeline.store import Stage, publish, sha256_file
from targets import base
from targets.base import check_expressible, placement_of
from targets.devices.local import host_isa, isa_flags

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.recipe import Recipe
    from pipeline.records import Profile, Scheme
    from pipeline.stages import Stages
    from pipeline.worker import Worker
    from targets.base import Runtime

ARTIFACTS = "artifacts"
"""Their place in a run folder."""
MODEL_FILES = ("params.json", "tensors.safetensors")
"""What `pipeline.quantize` writes."""


class Exports:
    """What a recipe wants written.

    Args:
        recipe: Everything the run depends on.

    Raises:
        EdgeError: A runtime is unknown, is not installed, or does not express what is asked of it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.targets = [base.runtime(name) for name in dict.fromkeys(recipe.runtimes)]
        for target in self.targets:
            base.require_installed(target)
            for scheme in self._schemes():
                check_expressible(self._wanted(target, scheme), target)

    def integers(self) -> Wanted:
        """Say what the integers are made for: the widest placement of all artifacts.

        Where none is asked, that of every runtime's default, so that a runtime that is exported
        later gets the same integers.
        """
        scheme = self.recipe.scheme
        if scheme == "float":
            return Wanted(calibration=Calibration(method="min-max"))  # no artifact will hold them
        asked = self.recipe.placement
        targets = base.runtimes().values() if asked is None else self.targets
        placements = {placement_of(target, asked) for target in targets}
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
        hashes = {name: sha256_file(model / name) for name in MODEL_FILES}

        def export(target: Runtime) -> list[Artifact]:
            # One worker for all schemes: the frameworks are slow to import.
            with stages.worker(f"export-{target.name}") as worker:
                made = [
                    self._artifact(stages, worker, self._wanted(target, scheme), model, hashes)
                    for scheme in self._schemes()
                ]
            return [_published(stages, one) for one in made] if kept else made

        return [item for items in stages.side_by_side(export, self.targets) for item in items]

    def _schemes(self) -> list[Scheme]:
        """The float artifact always comes along: it is what the others are held against."""
        return [scheme for scheme in SCHEMES if scheme in {"float", self.recipe.scheme}]

    def _profile(self, target: Runtime) -> Profile:
        default = target.capabilities.default_isa or host_isa()
        return PROFILE_OF_ISA[default if self.recipe.isa == "auto" else self.recipe.isa]

    def _wanted(self, target: Runtime, scheme: Scheme) -> Export:
        can, quantized = target.capabilities, scheme != "float"
        return Export(
            runtime=target.name,
            scheme=scheme,
            placement=placement_of(target, self.recipe.placement) if quantized else NONE,
            graph_form=can.graph_forms[0],
            gelu=can.gelu,
            profile=self._profile(target) if quantized else None,
            batch=self.recipe.batch,
        )

    def _artifact(
        self,
        stages: Stages,
        worker: Worker,
        wanted: Export,
        model: Path,
        hashes: dict[str, str],
    ) -> Artifact:
        """Return an artifact where its stage left it."""
        target = base.runtime(wanted.runtime)
        done = stages.do(
            Stage(
                name=f"export-{wanted.runtime}-{wanted.scheme}",
                modules=("targets.export", type(target).__module__),
                inputs=hashes,
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


def _published(stages: Stages, artifact: Artifact) -> Artifact:
    """Copy an artifact to its place in the run folder."""
    source, place = stages.out / artifact.path, f"{ARTIFACTS}/{artifact.name}"
    publish(source.parent, stages.out / place, artifact.files)
    return replace(artifact, path=f"{place}/{source.name}")
