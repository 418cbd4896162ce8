"""The graph form and placement that each runtime runs fastest, by measurement on a device.

In: a quantized model and what a recipe exports. Out: a `Layout` for every runtime. The candidates
take turns on the device, heat by heat; after each heat the slower half leaves. The best of those in
integers is taken where it is faster than the best float one and keeps to the accuracy budget; else
the next; else the float one. The measurements are kept under the runtime's versions, the device,
the network's shape and the candidates: weights do not change them.

A choice holds for the ISA it was measured on. Artifacts for another one are measured on a device
that stands in for it, by instructions where that one counts; where there is none they take their
runtime's default.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter
optimization", 2016 (successive halving).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from pipeline.benchmark import noise_image
from pipeline.candidates import (
    Clock,
    Effort,
    candidates,
    failed,
    faster_half,
    figures,
    in_order,
    is_faster,
    rank,
    ratio_of,
    timed,
    usable,
)
from pipeline.errors import ArtifactError, DeviceError, WorkerError
from pipeline.layouts import network_key
from pipeline.records import FLOATING, Candidate, Export, Layout
from pipeline.store import Stage, file_stem, installed_versions
from reports.layouts import ONE_CANDIDATE, TUNE_OFF, placed
from targets import base
from targets.devices.local import isa_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.exports import Exports
    from pipeline.records import Accuracy, Architecture, Artifact, Isa
    from pipeline.stages import Stages
    from pipeline.worker import Progress, Worker
    from targets.base import Device, DeviceInfo, Runtime, Samples

ROUNDS: dict[Effort, int] = {"quick": 6, "full": 12}
"""Of the first heat; the next has twice as many for half the candidates."""
HEAT_SECONDS: dict[Effort, float] = {"quick": 10, "full": math.inf}
"""How long a later heat may last before it has fewer rounds than that; never fewer than before."""
LEAST_PER_ROUND, MOST_PER_ROUND, MACS_PER_ROUND = 2, 64, 300e6
"""Inferences: of a small network many, so that a turn lasts longer than what disturbs it."""
STAND_INS: Mapping[Isa, str] = {"arm": "emulated-arm64:phone"}
"""Devices on which artifacts for an ISA are measured that the run's own device has not."""
MOST_COUNTED_MACS = 1.5e9
"""Of one inference: emulated, more would take longer than anybody who did not ask for it waits."""
MEASURED, SAMPLES = "candidates.json", "samples.json"

_CANDIDATES = TypeAdapter(tuple[Candidate, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Under which candidates are measured.

    Attributes:
        device: Where.
        threads: Of an inference.
        architecture: Of the network: with `image_shape` it says how long a candidate takes.
        macs: Multiply-accumulates of one image.
        float_layers: Layers that no candidate has in integers.
        image_shape: NCHW of one input.
        effort: How many candidates and rounds.
        asked: Whether to measure what is missing, or only to take over what was measured before.
        counts: Whether the device counts instructions, and takes no times.
        stands_in: Whether nobody asked for this device, so that nobody waits long for it.
    """

    device: Device
    threads: int
    architecture: Architecture
    macs: int
    float_layers: tuple[str, ...]
    image_shape: tuple[int, int, int, int]
    effort: Effort
    asked: bool
    counts: bool = False
    stands_in: bool = False

    def elsewhere(self, isa: Isa) -> Conditions | None:
        """Return the same where a device stands in for an ISA; None where none does."""
        if isa not in STAND_INS:
            return None
        device = base.device(STAND_INS[isa])
        counts = counts_instructions(device)
        threads = 1 if counts else self.threads
        return replace(self, device=device, counts=counts, threads=threads, stands_in=True)

    @property
    def network(self) -> str:
        """What tells a network of this shape from others."""
        return network_key(self.architecture, self.image_shape, self.float_layers)

    @property
    def per_round(self) -> int:
        """How many inferences a candidate makes when it is its turn."""
        wanted = MACS_PER_ROUND / (self.macs * self.image_shape[0])
        return round(min(max(wanted, LEAST_PER_ROUND), MOST_PER_ROUND))

    @property
    def clock(self) -> Clock:
        """By what candidates are ranked: CPU time says nothing of several threads."""
        if self.counts:
            return "instructions"
        return "cpu" if self.threads == 1 else "wall"


class Autotuner:
    """Chooses a layout for every runtime.

    Args:
        stages: Where measurements are kept.
        exports: What a recipe exports.
        given: How they are measured.
        keeps: Tells whether an artifact keeps to the accuracy budget, and its accuracy; None where
            nothing decides that.
    """

    def __init__(
        self,
        stages: Stages,
        exports: Exports,
        given: Conditions,
        keeps: Callable[[Artifact], tuple[bool, Accuracy]] | None,
    ) -> None:
        self.stages = stages
        self.exports = exports
        self.given = given
        self.keeps = keeps

    def run(self, model: Path) -> dict[str, Layout]:
        """Return the layout of every runtime that is exported.

        Args:
            model: Folder with params.json and tensors.safetensors.
        """
        return {target.name: self._layout(target, model) for target in self.exports.targets}

    def _layout(self, target: Runtime, model: Path) -> Layout:
        why, tuner = self._why_not(target), self
        given = self._stand_in(target)
        if why is not None and given is not None:
            tuner = Autotuner(self.stages, self.exports, given, self.keeps)
            there = tuner._why_not(target)
            why = there and f"{why}; {given.device.name}: {there}"
        if why is not None:
            return self.exports.default_layout(target, why)
        return tuner._measured(target, model)

    def _why_not(self, target: Runtime) -> str | None:
        """Say why the device cannot tell what is fastest for a runtime's artifacts."""
        if self.given.effort == "off":
            return TUNE_OFF
        info = self.given.device.probe()
        if isinstance(info, base.NotRun):
            return info.reason
        cannot = self.given.device.can_run(target)
        if cannot is not None:
            return cannot.reason
        made_for, has = self.exports.isa(target), isa_of(info.isa)
        if made_for != has:
            return f"its artifacts are for {made_for}, and {info.name} has {has or 'none it names'}"
        return None

    def _stand_in(self, target: Runtime) -> Conditions | None:
        """Return where a runtime is measured that runs here, but not as it does on its own ISA."""
        info, isa = self.given.device.probe(), self.exports.isa(target)
        if self.given.effort == "off" or isinstance(info, base.NotRun) or isa == isa_of(info.isa):
            return None
        return self.given.elsewhere(isa) if self.given.device.can_run(target) is None else None

    def _measured(self, target: Runtime, model: Path) -> Layout:
        info = self.given.device.probe()
        assert isinstance(info, base.DeviceInfo), "_why_not has seen to it"
        wanted = candidates(
            target.capabilities,
            self.exports.exports(target),
            self.given.effort,
            asked=self.exports.recipe.placement is not None,
            flags=info.isa,
        )
        if len(wanted) == 1:
            return self.exports.default_layout(target, ONE_CANDIDATE)
        stage = self._stage(target, info, wanted)
        known, why = self.stages.finished(stage), self._not_now(info)
        if known is None and why is not None:
            return self.exports.default_layout(target, why)
        # What failed may not fail again, nor with another checkpoint's weights.
        again = known is not None and why is None and lacks_some(known)

        def make(folder: Path, progress: Progress) -> None:
            self._measure(target, model, wanted, folder, progress)

        try:
            folder = self.stages.do_here(stage, make, anew=again)
        except (WorkerError, ArtifactError, DeviceError) as error:
            if known is not None:
                return self._chosen(target, model, info, measured_in(known))
            if isinstance(error, DeviceError) and not self.given.stands_in:
                raise  # a default would take the place of what was chosen there before
            return self.exports.default_layout(target, f"measuring failed: {error}")
        found = measured_in(folder)
        return self._chosen(target, model, info, found)

    def _not_now(self, info: DeviceInfo) -> str | None:
        """Say why what is missing is not measured."""
        if not self.given.asked:
            return "not measured: run `convnext-edge tune RUN_DIR`"
        large = self.given.macs * self.given.image_shape[0] > MOST_COUNTED_MACS
        if large and self.given.stands_in and self.given.effort == "quick":
            return (
                f"so large a network takes minutes on {info.name}: "
                "`convnext-edge tune RUN_DIR --effort full` waits for it"
            )
        return None

    def _stage(self, target: Runtime, info: DeviceInfo, wanted: Sequence[Export]) -> Stage:
        return Stage(
            name=f"tune-{file_stem(info.name)}-{target.name}",
            modules=(
                "pipeline.autotune",
                "targets.export",
                type(target).__module__,
                type(self.given.device).__module__,
            ),
            inputs={},
            settings={
                "architecture": asdict(self.given.architecture),
                "image_shape": self.given.image_shape,
                "float_layers": self.given.float_layers,
                "candidates": [asdict(one) for one in wanted],
                "device": asdict(info),
                "threads": self.given.threads,
                "effort": self.given.effort,
            },
            libraries=target.capabilities.distributions,
        )

    # --- measuring -----------------------------------------------------------------------------

    def _measure(
        self,
        target: Runtime,
        model: Path,
        wanted: Sequence[Export],
        folder: Path,
        progress: Progress,
    ) -> None:
        found, paths = dict[Export, Candidate](), dict[Export, Path]()
        log = f"tune-{target.name}"
        # Where the run's own stages are: a temporary folder elsewhere may be too small.
        with TemporaryDirectory(dir=folder) as place:
            with self.stages.worker(log) as worker:  # and gone before anything is measured
                for index, export in enumerate(wanted):
                    progress(index, len(wanted))
                    made = _exported(worker, model, export, Path(mkdtemp(dir=place)))
                    if isinstance(made, Candidate):
                        found[export] = made
                    else:
                        paths[export] = made
            raw = self._heats(paths, found, progress)
            if self.given.effort == "full":

                def make(one: Export) -> Path | Candidate:
                    with self.stages.worker(log) as worker:
                        return _exported(worker, model, one, Path(mkdtemp(dir=place)))

                raw += self._by_stage(paths, found, make, progress)
        clock = usable(self.given.clock, found.values())
        ranked = sorted(found.values(), key=lambda one: rank(one, clock))
        (folder / MEASURED).write_bytes(_CANDIDATES.dump_json(tuple(ranked), indent=1))
        (folder / SAMPLES).write_bytes(TypeAdapter(list[list[base.Samples]]).dump_json(raw))

    def _heats(
        self, paths: Mapping[Export, Path], found: dict[Export, Candidate], progress: Progress
    ) -> list[list[Samples]]:
        """Run heat after heat, each with the faster half of the one before."""
        left, rounds, raw = list(paths), ROUNDS[self.given.effort], list[list[base.Samples]]()
        while left:
            samples = self._turns(left, paths, rounds, progress)
            raw.append(samples)
            found |= self._timed(left, samples, heat=len(raw) - 1)
            ran = [one for export in left if (one := found[export]).outcome == "measured"]
            stay = faster_half(ran, usable(self.given.clock, ran))
            if self.given.counts or len(stay) == len(left):
                return raw  # counts repeat: another heat would say the same
            left = [export for export in left if found[export] in stay]
            rounds = self._rounds_after(rounds, stay)
        return raw

    def _rounds_after(self, rounds: int, stay: Sequence[Candidate]) -> int:
        """Return twice as many rounds, as far as those who stay leave time for them."""
        a_round = self.given.per_round * sum(one.wall_p50_ms or 0.0 for one in stay) / 1000
        if 2 * rounds * a_round <= HEAT_SECONDS[self.given.effort]:
            return 2 * rounds
        return max(rounds, int(HEAT_SECONDS[self.given.effort] / a_round))

    def _by_stage(
        self,
        paths: dict[Export, Path],
        found: dict[Export, Candidate],
        make: Callable[[Export], Path | Candidate],
        progress: Progress,
    ) -> list[list[Samples]]:
        """Try the best integers with the blocks of a stage in float, and of all where that pays.

        The blocks of a stage have one shape, so what pays for one pays for the others.
        """
        depth = len(self.given.architecture.depths)
        clock = usable(self.given.clock, found.values())
        everything = list(found)
        order = in_order(list(found.values()), clock)
        floats = [one for one in paths if one.scheme == "float" and figures(found[one], clock)[0]]
        best = everything[order[0]] if order else None
        if best is None or best.scheme in FLOATING or not floats or depth == 1:
            return []
        plain = min(floats, key=lambda one: rank(found[one], clock))

        def added(*stages: int) -> Export | None:
            one = replace(best, float_stages=stages)
            made = make(one)
            if isinstance(made, Candidate):
                found[one] = made
                return None
            paths[one] = made
            return one

        singles = [one for stage in range(depth) if (one := added(stage)) is not None]
        rounds, last = ROUNDS[self.given.effort], found[best].heat
        first = [plain, best, *singles]
        samples = self._turns(first, paths, rounds, progress)
        tried = self._timed(first, samples, heat=0)
        found |= {one: tried[one] for one in singles}
        pays = tuple(
            stage
            for one, item in zip(singles, samples[2:], strict=True)
            for stage in one.float_stages
            if is_faster(item, samples[1], clock, self.given.per_round)
        )
        if not 0 < len(pays) < depth:
            return [samples]
        alone = replace(best, float_stages=pays)
        mixed = alone if alone in paths else added(*pays)
        if mixed is None:
            return [samples]
        final = [plain, best, mixed]
        more = self._turns(final, paths, 2 * rounds, progress)
        found |= self._timed(final, more, heat=last + 1)
        return [samples, more]

    def _turns(
        self,
        exports: Sequence[Export],
        paths: Mapping[Export, Path],
        rounds: int,
        progress: Progress,
    ) -> list[Samples]:
        """Let exports take turns on the device."""
        jobs = [
            base.Job(label=str(i), runtime=export.runtime, path=paths[export])
            for i, export in enumerate(exports)
        ]
        return self.given.device.measure(
            jobs,
            noise_image(self.given.image_shape),
            rounds=1 if self.given.counts else rounds,
            per_round=self.given.per_round,
            threads=self.given.threads,
            progress=progress,
        )

    def _timed(
        self, exports: Sequence[Export], samples: Sequence[Samples], *, heat: int
    ) -> dict[Export, Candidate]:
        clock, per_round = self.given.clock, self.given.per_round
        return timed(exports, samples, clock, per_round=per_round, heat=heat)

    # --- choosing ------------------------------------------------------------------------------

    def _chosen(
        self, target: Runtime, model: Path, info: DeviceInfo, found: Sequence[Candidate]
    ) -> Layout:
        floats = [one for one in found if one.scheme == "float" and one.outcome == "measured"]
        clock, asked = usable(self.given.clock, found), self.exports.recipe.scheme
        order = in_order(found, clock)
        if not floats or (asked != "float" and not order):
            # The export itself then says what is wrong with it.
            return self.exports.default_layout(target, "no candidate could be measured")
        kept, seen, why, slower = None, dict[int, Candidate](), "", ""
        for index in order:
            one = found[index]
            ratio, (low, high) = ratio_of(one, clock)
            took = f"{ratio:.2f} ({low:.2f} to {high:.2f}) of the best float one's"
            took += " instructions" if self.given.counts else f" {clock} time"
            if high > 1 and asked not in FLOATING:
                slower = slower or f"{placed(one)} in form {one.graph_form} takes {took}"
                continue
            kept, why = one, took
            if self.keeps is None:
                break
            artifact = self.exports.one(self.stages, model, self._export(target, one, floats[0]))
            keeps, accuracy = self.keeps(artifact)
            seen[index] = replace(one, accuracy=accuracy)
            if keeps:
                break
            kept = None
        if kept is None and seen:
            why = "no candidate that is faster than float keeps to the accuracy budget"
        elif kept is None:
            why = f"no integers are shown to be faster: {slower}" if slower else "its fastest form"
        return Layout(
            runtime=target.name,
            source="measured",
            reason=why,
            isa=self.exports.isa(target),
            asked=asked,
            device=info.name,
            threads=self.given.threads,
            input_size=self.given.image_shape[-1],
            network=self.given.network,
            versions=installed_versions(target.capabilities.distributions),
            clock=clock,
            candidates=tuple(seen.get(i, one) for i, one in enumerate(found)),
            scheme=kept.scheme if kept else "float",
            placement=kept.placement if kept and kept.scheme not in FLOATING else None,
            float_stages=kept.float_stages if kept else (),
            graph_form=(kept or floats[0]).graph_form,
            float_form=floats[0].graph_form,
        )

    def _export(self, target: Runtime, one: Candidate, best: Candidate) -> Export:
        layout = replace(
            self.exports.default_layout(target, ""),
            scheme=one.scheme,
            placement=one.placement if one.scheme not in FLOATING else None,
            float_stages=one.float_stages,
            graph_form=one.graph_form,
            float_form=best.graph_form,
        )
        return self.exports.laid_out({target.name: layout}).exports(target)[-1]


def _exported(worker: Worker, model: Path, export: Export, folder: Path) -> Path | Candidate:
    """Write a candidate; one that takes the worker's process with it takes no other one."""
    try:
        made = worker.call(
            "targets.export:export_stage",
            model=str(model),
            export=asdict(export),
            folder=str(folder),
        )
    except (WorkerError, ArtifactError) as error:
        return failed(export, str(error))
    return folder / str(made.value["path"])


def measured_in(folder: Path) -> tuple[Candidate, ...]:
    """Read the candidates that a finished stage measured."""
    return _CANDIDATES.validate_json((folder / MEASURED).read_bytes())


def lacks_some(folder: Path) -> bool:
    """Return whether a candidate failed in a finished stage."""
    return any(one.outcome == "failed" for one in measured_in(folder))


def counts_instructions(device: Device) -> bool:
    """Return whether a device counts instructions, and takes no times."""
    info = device.probe()
    return isinstance(info, base.DeviceInfo) and info.kind == "emulated"
