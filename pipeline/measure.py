"""The measuring stages of a run: verify and bench, artifact by artifact.

In: exported artifacts. Out: an `Accuracy` and a `Latency` for each, and every pair's `Agreement`.
One artifact that fails is a row that says so; the others go on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from calib.batches import spare_workers
from pipeline import benchmark
from pipeline.errors import ArtifactError, DeviceError, WorkerError
from pipeline.profiled import told
from pipeline.records import (
    Accuracy,
    Agreement,
    Artifact,
    Breakdown,
    Checkpoint,
    Latency,
    Preprocessing,
)
from pipeline.store import Stage, file_stem, publish
from reports.document import FloatResult
from targets import base
from targets.devices.local import isa_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pipeline.data import Chosen, Data
    from pipeline.stages import Done, Stages
    from pipeline.worker import Progress

SAMPLES = "samples"
NOT_ASKED_VERIFY = "not asked: run `convnext-edge verify RUN_DIR`"
NOT_ASKED_BENCH = "not asked: run `convnext-edge bench RUN_DIR`"
NOT_ASKED_THERE = "not asked in this run: `convnext-edge bench RUN_DIR --device {}` asks again"
JUDGED_AT_A_TIME = 32
DATA_LIBRARIES = ("torch", "numpy", "pillow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What verifying gave; `skipped` names images that could not be decoded."""

    float_result: FloatResult
    accuracies: list[Accuracy]
    agreement: list[Agreement]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Against:
    """What artifacts are held against: the float network on some images.

    Attributes:
        n: How many images.
        reference: The stage that ran it.
        inputs: That stage's, which every artifact's contains.
        arguments: Of the stages' functions.
    """

    n: int
    reference: Done
    inputs: dict[str, str]
    arguments: dict[str, Any]


class Verification:
    """Runs artifacts over the evaluation images.

    Args:
        stages: Where results are kept.
        loaded: The checkpoint stage.
        model: Its record.
        preprocessing: Of the images.
        asked: Whether to run what is missing, or only to take over what was finished before.
    """

    def __init__(
        self,
        stages: Stages,
        loaded: Done,
        model: Checkpoint,
        preprocessing: Preprocessing,
        *,
        asked: bool,
    ) -> None:
        self.stages = stages
        self.loaded = loaded
        self.model = model
        self.how = asdict(preprocessing)
        self.asked = asked

    def run(self, artifacts: Sequence[Artifact], data: Data) -> Verified:
        """Return the float result, one accuracy per artifact, and every pair's agreement."""
        if data.evaluation is None:
            return self._nothing(artifacts, data.why_not)
        if not self.asked and not self.stages.is_done(self._reference(data.evaluation)):
            return self._nothing(artifacts, NOT_ASKED_VERIFY)
        against = self._against(data.evaluation)

        def verify(artifact: Artifact) -> tuple[Accuracy, Path | None]:
            return self._artifact(artifact, against, beside=len(artifacts))

        results = self.stages.side_by_side(verify, artifacts)
        measured = [
            {"export": asdict(artifact.export), "kind": accuracy.kind, "folder": str(folder)}
            for artifact, (accuracy, folder) in zip(artifacts, results, strict=True)
            if folder is not None
        ]
        value = against.reference.value
        return Verified(
            float_result=FloatResult(top1=value["top1"], n=value["n"]),
            accuracies=[accuracy for accuracy, _ in results],
            agreement=self._agreement(measured),
            skipped=tuple(value["skipped"]),
        )

    def of(self, evaluation: Chosen) -> Callable[[Artifact], Accuracy]:
        """Return what tells the accuracy of an artifact on these images."""
        against = self._against(evaluation)
        return lambda artifact: self._artifact(artifact, against, beside=1)[0]

    def judge(self, evaluation: Chosen) -> Callable[[str, Path, str], Accuracy]:
        """Return what tells the accuracy, on these images, of artifacts of the reference.

        Returns:
            A function of a stage's name, an artifact that belongs to no run, and its sha256.
        """
        against = self._against(evaluation)
        target = base.runtime("reference")

        def accuracy(name: str, path: Path, sha256: str) -> Accuracy:
            stage = self._stage(
                name,
                {**against.inputs, "artifact": sha256},
                (type(target).__module__,),
                target.capabilities.distributions,
            )
            what = {"runtime": target.name, "path": str(path), "batch": JUDGED_AT_A_TIME}
            return self._measured(stage, against, what, beside=1)[0]

        return accuracy

    def _against(self, evaluation: Chosen) -> _Against:
        """Run the float network, where that is not done, which others are held against."""
        arguments: dict[str, Any] = {
            "model": str(self.loaded.folder),
            "selection": asdict(evaluation.selection),
            "preprocessing": self.how,
        }
        n, stage = evaluation.source.n, self._reference(evaluation)
        reference = self.stages.do(
            stage,
            "pipeline.verify:float_stage",
            shared=True,
            workers=spare_workers(n, self.stages.cores),
            **arguments,
        )
        return _Against(n=n, reference=reference, inputs=dict(stage.inputs), arguments=arguments)

    def _reference(self, evaluation: Chosen) -> Stage:
        # A stage's folder is named after all that went into it.
        inputs = {"loaded": self.loaded.folder.name, "images": evaluation.source.sha256}
        return self._stage("reference", inputs, (), ())

    def _stage(
        self,
        name: str,
        inputs: dict[str, str],
        modules: Sequence[str],
        libraries: Sequence[str],
    ) -> Stage:
        return Stage(
            name=f"verify-{name}",
            modules=("pipeline.verify", *modules),
            inputs=inputs,
            settings={
                "preprocessing": self.how,
                "labels": self.model.labels,
                "host": isa_flags(),
            },
            libraries=(*DATA_LIBRARIES, *libraries),
        )

    def _artifact(
        self, artifact: Artifact, against: _Against, *, beside: int
    ) -> tuple[Accuracy, Path | None]:
        target = base.runtime(artifact.export.runtime)
        if (cannot := target.can_run()) is not None:
            return Accuracy(outcome="not_run", reason=cannot.reason), None
        stage = self._stage(
            artifact.name,
            {**against.inputs, **artifact.files},
            (type(target).__module__,),
            target.capabilities.distributions,
        )
        if not self.asked and not self.stages.is_done(stage):
            return Accuracy(outcome="not_run", reason=NOT_ASKED_VERIFY), None
        path = str(self.stages.out / artifact.path)
        what = {"runtime": target.name, "path": path, "batch": artifact.export.batch}
        return self._measured(stage, against, what, beside=beside)

    def _measured(
        self, stage: Stage, against: _Against, artifact: dict[str, Any], *, beside: int
    ) -> tuple[Accuracy, Path | None]:
        cores = self.stages.cores
        try:
            done = self.stages.do(
                stage,
                "pipeline.verify:artifact_stage",
                shared=True,
                **against.arguments,
                reference=str(against.reference.folder),
                workers=spare_workers(against.n, cores, beside=min(beside, cores)),
                artifact=artifact,
            )
        except (WorkerError, ArtifactError) as error:
            return Accuracy(outcome="failed", reason=str(error)), None
        return TypeAdapter(Accuracy).validate_python(done.value), done.folder

    def _agreement(self, measured: list[dict[str, Any]]) -> list[Agreement]:
        stage = Stage(
            name="agreement",
            modules=("pipeline.verify",),
            inputs={str(i): Path(item["folder"]).name for i, item in enumerate(measured)},
            settings={},
            libraries=("numpy",),
        )
        done = self.stages.do(stage, "pipeline.verify:agreement_stage", artifacts=measured)
        return TypeAdapter(list[Agreement]).validate_python(done.value)

    @staticmethod
    def _nothing(artifacts: Sequence[Artifact], reason: str) -> Verified:
        nothing = Accuracy(outcome="not_run", reason=reason)
        return Verified(
            float_result=FloatResult(top1=None, n=None),
            accuracies=[nothing for _ in artifacts],
            agreement=[],
            skipped=(),
        )


def time_saved(timed: Iterable[tuple[Artifact, Latency]]) -> dict[str, float]:
    """Return how much less time the quantized artifacts take than their float ones.

    Returns:
        Runtime to milliseconds of wall time, of those that were measured.
    """
    return {
        artifact.export.runtime: row.float_wall_p50_ms - row.wall_p50_ms
        for artifact, row in timed
        if artifact.export.scheme != "float"
        and row.float_wall_p50_ms is not None
        and row.wall_p50_ms is not None
    }


class Timing:
    """Times artifacts on a device, runtime by runtime.

    Args:
        stages: Where results are kept.
        device: Where to run.
        threads: For the runtimes.
        image_shape: NCHW of one input.
        asked: Whether to run what is missing, or only to take over what was finished before.
        anew: Whether what is asked for is measured even where it was before.
        kept: Whether the samples are the run's: those that are not stay in their stages.
        info: What the device is, where that is known; then one of which nothing is asked is not
            reached for at all, unless it is this machine.
    """

    def __init__(
        self,
        stages: Stages,
        device: base.Device,
        *,
        threads: int,
        image_shape: tuple[int, int, int, int],
        asked: bool,
        anew: bool = False,
        kept: bool = True,
        info: base.DeviceInfo | base.NotRun | None = None,
    ) -> None:
        self.stages = stages
        self.device = device
        self.threads = threads
        self.image_shape = image_shape
        self.asked = asked
        self.anew = anew and asked
        self.kept = kept
        self.known = info is not None
        self.info = device.probe() if info is None else info

    def run(self, artifacts: Sequence[Artifact]) -> list[Latency]:
        """Return one latency per artifact."""
        info = self.info
        if isinstance(info, base.NotRun):
            lacks = benchmark.not_run(self.device.name, info, threads=self.threads)
            return [lacks for _ in artifacts]
        rows: dict[str, Latency] = {}
        for name in dict.fromkeys(artifact.export.runtime for artifact in artifacts):
            group = [artifact for artifact in artifacts if artifact.export.runtime == name]
            rows |= self._runtime(info, base.runtime(name), group)
        return [rows[artifact.name] for artifact in artifacts]

    def _runtime(
        self, info: base.DeviceInfo, target: base.Runtime, group: Sequence[Artifact]
    ) -> dict[str, Latency]:
        stage = Stage(
            name=f"bench-{file_stem(info.name)}-{target.name}",
            modules=("pipeline.benchmark", type(self.device).__module__, type(target).__module__),
            inputs={f"{a.name}/{k}": v for a in group for k, v in a.files.items()},
            settings={"device": asdict(info), "threads": self.threads},
            libraries=target.capabilities.distributions,
        )
        known = self.stages.finished(stage)
        # What failed may not fail again.
        retry = known is not None and benchmark.lacks_some(known)
        if (known is None or retry) and (cannot := self._cannot(target)) is not None:
            if known is None:
                row = benchmark.not_run(info.name, cannot, threads=self.threads, kind=info.kind)
                return {a.name: row for a in group}
            retry = False

        def make(folder: Path, progress: Progress) -> None:
            benchmark.bench(
                folder,
                self.device,
                target,
                {a.export.scheme: self.stages.out / a.path for a in group},
                image_shape=self.image_shape,
                threads=self.threads,
                progress=progress,
            )

        try:
            folder = self.stages.do_here(stage, make, anew=self.anew or retry)
        except (WorkerError, ArtifactError, DeviceError) as error:
            if known is not None and retry and not self.anew:
                folder = known  # what did not fail stays
            else:
                row = benchmark.failed(info, str(error), threads=self.threads)
                return {a.name: row for a in group}
        place = f"{file_stem(info.name)}-{self.threads}t-{target.name}"
        kept = f"{SAMPLES}/{place}/{benchmark.SAMPLES}"
        if self.kept:
            publish(folder, (self.stages.out / kept).parent, (benchmark.SAMPLES,))
        rows = benchmark.read_latencies(
            folder, info, target, threads=self.threads, samples_file=kept
        )
        return {a.name: rows[a.export.scheme] for a in group}

    def _cannot(self, target: base.Runtime) -> base.NotRun | None:
        """Say why what is missing is not measured now."""
        if self.asked or not self.known or isinstance(self.device, base.InProcesses):
            cannot = self.device.can_run(target)
            if cannot is not None or self.asked:
                return cannot
        there = self.device.name + (f" --threads {self.threads}" if self.threads > 1 else "")
        return base.NotRun(reason=NOT_ASKED_THERE.format(there) if self.known else NOT_ASKED_BENCH)

    def breakdowns(self, artifacts: Sequence[Artifact], model: Path) -> list[Breakdown]:
        """Take the time of every artifact apart, where the device's runtimes or it itself can.

        Args:
            artifacts: Those of the run.
            model: Folder with params.json and tensors.safetensors.
        """
        info = self.info
        if isinstance(info, base.NotRun):
            return []
        if isinstance(self.device, base.Profiled):
            return told(self.stages, self.device, info, artifacts, asked=self.asked)
        if not isinstance(self.device, base.InProcesses) or info.kind != "host":
            return []  # a profiler of this environment's tells what this machine's CPU does
        found = []
        for name in dict.fromkeys(artifact.export.runtime for artifact in artifacts):
            target = base.runtime(name)
            if self.device.can_run(target) is None:
                group = [artifact for artifact in artifacts if artifact.export.runtime == name]
                found += self._taken_apart(self.device, info, target, group, model)
        return found

    def _taken_apart(
        self,
        device: base.InProcesses,
        info: base.DeviceInfo,
        target: base.Runtime,
        group: Sequence[Artifact],
        model: Path,
    ) -> list[Breakdown]:
        found = []
        # One worker for all of a runtime: the frameworks are slow to import.
        log = f"breakdown-{file_stem(info.name)}-{target.name}"
        with self.stages.worker(log, environment=device.environment()) as worker:
            for one in group:
                stage = Stage(
                    name=f"breakdown-{file_stem(info.name)}-{one.name}",
                    modules=(
                        "targets.breakdown",
                        type(device).__module__,
                        type(target).__module__,
                    ),
                    inputs=one.files,
                    settings={"device": asdict(info), "image_shape": self.image_shape},
                    libraries=target.capabilities.distributions,
                )
                if not self.asked and not self.stages.is_done(stage):
                    continue
                said = {"runtime": target.name, "scheme": one.export.scheme, "device": info.name}
                try:
                    said |= self.stages.do(
                        stage,
                        "targets.breakdown:breakdown_stage",
                        worker=worker,
                        anew=self.anew,
                        name=target.name,
                        path=str(self.stages.out / one.path),
                        model=str(model),
                        image_shape=self.image_shape,
                    ).value
                except (WorkerError, ArtifactError) as error:
                    said |= {"outcome": "failed", "reason": str(error)}
                found.append(TypeAdapter(Breakdown).validate_python(said))
        return found
