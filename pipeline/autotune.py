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

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import TypeAdapter

from pipeline.benchmark import noise_image
from pipeline.errors import ArtifactError, DeviceError, WorkerError
from pipeline.placements import PLACEMENTS
from pipeline.records import ACTIVATION_BITS, FLOATING, Candidate, Export, Layout
from pipeline.statistics import percentile, ratio_interval
from pipeline.store import Stage, file_stem, library_versions
from targets import base
from targets.devices.local import isa_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from pipeline.exports import Exports
    from pipeline.records import Accuracy, Architecture, Artifact, Isa
    from pipeline.stages import Stages
    from pipeline.worker import Progress
    from targets.base import Capabilities, Device, DeviceInfo, Runtime, Samples

Effort = Literal["off", "quick", "full"]
Clock = Literal["cpu", "wall", "instructions"]

ROUNDS: dict[Effort, int] = {"quick": 6, "full": 12}
"""Of the first heat; the next has twice as many for half the candidates."""
LEAST_PER_ROUND, MOST_PER_ROUND, MACS_PER_ROUND = 3, 64, 300e6
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
        most_macs: Of a network that is measured there.
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
    most_macs: float = np.inf

    def elsewhere(self, isa: Isa) -> Conditions | None:
        """Return the same where a device stands in for an ISA; None where none does."""
        if isa not in STAND_INS:
            return None
        device = base.device(STAND_INS[isa])
        counts = counts_instructions(device)
        threads = 1 if counts else self.threads
        most = MOST_COUNTED_MACS if counts and self.effort == "quick" else np.inf
        return replace(self, device=device, counts=counts, threads=threads, most_macs=most)

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
            return "--tune off"
        info = self.given.device.probe()
        if isinstance(info, base.NotRun):
            return info.reason
        cannot = self.given.device.can_run(target)
        if cannot is not None:
            return cannot.reason
        made_for, has = self.exports.isa(target), isa_of(info.isa)
        if made_for != has:
            return f"its artifacts are for {made_for}, and {info.name} has {has or 'none it names'}"
        if self.given.macs * self.given.image_shape[0] > self.given.most_macs:
            return (
                "so large a network takes minutes there; to wait for it run "
                f"`convnext-edge tune RUN_DIR --device {info.name}`"
            )
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
            return self.exports.default_layout(target, "there is nothing to choose from")
        stage = self._stage(target, info, wanted)
        if not self.given.asked and not self.stages.is_done(stage):
            why = "not measured: run `convnext-edge tune RUN_DIR`"
            return self.exports.default_layout(target, why)

        def make(folder: Path, progress: Progress) -> None:
            self._measure(target, model, wanted, folder, progress)

        try:
            folder = self.stages.do_here(stage, make)
        except (WorkerError, ArtifactError, DeviceError) as error:
            return self.exports.default_layout(target, f"measuring failed: {error}")
        found = _CANDIDATES.validate_json((folder / MEASURED).read_bytes())
        return self._chosen(target, model, info, found)

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
        # Where the run's own stages are: a temporary folder elsewhere may be too small.
        with TemporaryDirectory(dir=folder) as place:
            for index, export in enumerate(wanted):
                progress(index, len(wanted))
                inner = Path(place) / str(index)
                inner.mkdir()
                made = self._exported(target, model, export, inner)
                if isinstance(made, Candidate):
                    found[export] = made
                else:
                    paths[export] = made
            raw = self._heats(paths, found, progress)
        ranked = sorted(found.values(), key=lambda one: _rank(one, self.given.clock))
        (folder / MEASURED).write_bytes(_CANDIDATES.dump_json(tuple(ranked), indent=1))
        (folder / SAMPLES).write_bytes(TypeAdapter(list[list[base.Samples]]).dump_json(raw))

    def _exported(
        self, target: Runtime, model: Path, export: Export, folder: Path
    ) -> Path | Candidate:
        """Write a candidate; one whose process dies takes no other one with it."""
        try:
            with self.stages.worker(f"tune-{target.name}") as worker:
                made = worker.call(
                    "targets.export:export_stage",
                    model=str(model),
                    export=asdict(export),
                    folder=str(folder),
                )
        except (WorkerError, ArtifactError) as error:
            return _failed(export, error)
        return folder / str(made.value["path"])

    def _heats(
        self, paths: Mapping[Export, Path], found: dict[Export, Candidate], progress: Progress
    ) -> list[list[Samples]]:
        """Run heat after heat, each with the faster half of the one before."""
        left, rounds, raw = list(paths), ROUNDS[self.given.effort], list[list[base.Samples]]()
        image = noise_image(self.given.image_shape)
        while left:
            jobs = [
                base.Job(label=str(i), runtime=export.runtime, path=paths[export])
                for i, export in enumerate(left)
            ]
            samples = self.given.device.measure(
                jobs,
                image,
                rounds=1 if self.given.counts else rounds,
                per_round=self.given.per_round,
                threads=self.given.threads,
                progress=progress,
            )
            raw.append(samples)
            found |= _timed(left, samples, self.given, heat=len(raw) - 1)
            stay = faster_half([found[export] for export in left], self.given.clock)
            if self.given.counts or len(stay) == len(left):
                return raw  # counts repeat: another heat would say the same
            left = [export for export in left if found[export] in stay]
            rounds *= 2
        return raw

    # --- choosing ------------------------------------------------------------------------------

    def _chosen(
        self, target: Runtime, model: Path, info: DeviceInfo, found: Sequence[Candidate]
    ) -> Layout:
        floats = [one for one in found if one.scheme == "float" and one.outcome == "measured"]
        quantized, order = self.exports.recipe.scheme != "float", in_order(found, self.given.clock)
        if not floats or (quantized and not order):
            # The export itself then says what is wrong with it.
            return self.exports.default_layout(target, "no candidate could be measured")
        kept, seen, why, slower = None, dict[int, Candidate](), "", ""
        for index in order:
            one = found[index]
            ratio, (low, high) = _ratio(one, self.given.clock)
            took = f"{ratio:.2f} ({low:.2f} to {high:.2f}) of the best float one's"
            took += " instructions" if self.given.counts else f" {self.given.clock} time"
            if high > 1:
                slower = slower or f"{one.placement} in form {one.graph_form} takes {took}"
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
            device=info.name,
            threads=self.given.threads,
            input_size=self.given.image_shape[-1],
            versions={
                name: version
                for name, version in library_versions(target.capabilities.distributions).items()
                if version is not None
            },
            clock=self.given.clock,
            candidates=tuple(seen.get(i, one) for i, one in enumerate(found)),
            scheme=kept.scheme if kept else "float",
            placement=_placement(kept) if kept else None,
            graph_form=(kept or floats[0]).graph_form,
            float_form=floats[0].graph_form,
        )

    def _export(self, target: Runtime, one: Candidate, best: Candidate) -> Export:
        layout = replace(
            self.exports.default_layout(target, ""),
            scheme=one.scheme,
            placement=_placement(one),
            graph_form=one.graph_form,
            float_form=best.graph_form,
        )
        return self.exports.laid_out({target.name: layout}).exports(target)[-1]


def counts_instructions(device: Device) -> bool:
    """Return whether a device counts instructions, and takes no times."""
    info = device.probe()
    return isinstance(info, base.DeviceInfo) and info.kind == "emulated"


def candidates(
    can: Capabilities,
    defaults: Sequence[Export],
    effort: Effort,
    *,
    asked: bool = False,
    flags: Collection[str] = (),
) -> tuple[Export, ...]:
    """Return every way to lay out a runtime's artifacts that is worth measuring.

    Args:
        can: Of the runtime.
        defaults: What it exports by default: the float artifact and, unless that is all, the
            quantized one.
        effort: `quick` keeps to the default placement's layers, so that integers stay what they
            are; `full` takes every placement, and float16 where the CPU computes in it.
        asked: Whether the placement was asked for, and stays.
        flags: Of the device's CPU.

    Returns:
        Every form of the float artifact, then every form and placement of the others.
    """
    found, half = list[Export](), bool(can.half_flags & set(flags))
    for one in defaults:
        if one.scheme in FLOATING:
            found += [replace(one, graph_form=form) for form in can.graph_forms]
            continue
        for placement in [one.placement] if asked else _placements(can, one, effort):
            found += [
                replace(one, placement=placement, graph_form=form)
                for form in can.graph_forms
                if placement in can.placements_in(form)
            ]
    if half and effort == "full" and any(one.scheme not in FLOATING for one in found):
        found += [replace(one, scheme="float16") for one in found if one.scheme == "float"]
    return tuple(found)


def _placement(one: Candidate) -> str | None:
    return None if one.scheme in FLOATING else one.placement


def _placements(can: Capabilities, one: Export, effort: Effort) -> list[str]:
    layers = PLACEMENTS[one.placement].layers
    names = [n for n in can.placements if effort == "full" or PLACEMENTS[n].layers == layers]
    if one.scheme in ACTIVATION_BITS:
        return names
    # Without sites placements of the same layers are the same function.
    first = {PLACEMENTS[name].layers: name for name in reversed(names)}
    return [name for name in names if name in first.values()]


def faster_half(heat: Sequence[Candidate], clock: Clock) -> list[Candidate]:
    """Return who stays after a heat: of the float ones and of the others the faster half each."""
    stay = list[Candidate]()
    for floats in (True, False):
        group = [one for one in heat if (one.scheme == "float") == floats]
        group.sort(key=lambda one: _time(one, clock))
        stay += group[: max(1, len(group) // 2)]
    return stay


def in_order(found: Sequence[Candidate], clock: Clock) -> list[int]:
    """Return the indices of the candidates, float ones apart, that were measured, best first.

    Who stayed longer is better, and who was faster in the last heat of both.
    """
    measured = [
        index
        for index, one in enumerate(found)
        if one.scheme != "float" and _figures(one, clock)[1]
    ]
    return sorted(measured, key=lambda index: _rank(found[index], clock))


def _figures(
    one: Candidate, clock: Clock
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """Return what a candidate took, that over the best float one of its heat, and its interval."""
    match clock:
        case "cpu":
            return one.cpu_p50_ms, one.cpu_ratio, one.cpu_ratio_ci95
        case "wall":
            return one.wall_p50_ms, one.wall_ratio, one.wall_ratio_ci95
        case "instructions":
            return one.instructions, one.instruction_ratio, one.instruction_ratio_ends


def _ratio(one: Candidate, clock: Clock) -> tuple[float, tuple[float, float]]:
    _, ratio, ends = _figures(one, clock)
    assert ratio is not None, "in_order gives those that were measured"
    assert ends is not None
    return ratio, ends


def _rank(one: Candidate, clock: Clock) -> tuple[int, float]:
    return -one.heat, _time(one, clock)


def _time(one: Candidate, clock: Clock) -> float:
    found, _, _ = _figures(one, clock)
    return np.inf if found is None else found


def _failed(export: Export, error: Exception) -> Candidate:
    return Candidate(
        scheme=export.scheme,
        placement=export.placement,
        graph_form=export.graph_form,
        outcome="failed",
        reason=str(error),
    )


def _timed(
    exports: Sequence[Export], samples: Sequence[Samples], given: Conditions, *, heat: int
) -> dict[Export, Candidate]:
    """Derive the figures of one heat, each against its best float candidate."""
    floats = [s for e, s in zip(exports, samples, strict=True) if e.scheme == "float"]

    def median(of: Samples) -> float:
        raw = {"cpu": of.cpu_ms, "wall": of.wall_ms, "instructions": of.instructions}
        return float(np.median(raw[given.clock]))

    best = min(floats, key=median, default=None)
    found = {}
    for export, item in zip(exports, samples, strict=True):
        cpu = best and ratio_interval(item.cpu_ms, best.cpu_ms, per_round=given.per_round)
        wall = best and ratio_interval(item.wall_ms, best.wall_ms, per_round=given.per_round)
        found[export] = Candidate(
            scheme=export.scheme,
            placement=export.placement,
            graph_form=export.graph_form,
            outcome="measured",
            heat=heat,
            samples=len(item.wall_ms) or len(item.instructions),
            wall_p50_ms=percentile(item.wall_ms, 50),
            cpu_p50_ms=percentile(item.cpu_ms, 50),
            wall_ratio=wall[0] if wall else None,
            wall_ratio_ci95=wall[1:] if wall else None,
            cpu_ratio=cpu[0] if cpu else None,
            cpu_ratio_ci95=cpu[1:] if cpu else None,
            **_counted(item.instructions, best.instructions if best else ()),
        )
    return found


def _counted(ours: Sequence[int], best: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a candidate that counts make; none where there are none."""
    if not ours:
        return {}
    count = int(np.median(ours))
    if not best:
        return {"instructions": count}
    return {
        "instructions": count,
        "instruction_ratio": count / float(np.median(best)),
        "instruction_ratio_ends": (min(ours) / max(best), max(ours) / min(best)),
    }
