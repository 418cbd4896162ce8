"""What is measured beside the run's own device: boards, phones, emulators, other settings.

In: a run's artifacts, and the places that they are measured at. Out: for every place the latencies
of every artifact, where their time goes, and how what they compute there compares with what they
compute here. Places of one machine take turns, those on this host first and alone; all others work
at the same time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ArtifactError, UsageError
from pipeline.measure import Timing
from pipeline.parity import Comparison
from pipeline.records import Parity, Place, PositiveInt
from pipeline.worker import end_all, ending
from targets import base
from targets.base import HOST, DeviceInfo, NotRun

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pipeline.parity import Outputs
    from pipeline.records import Artifact, Breakdown, Latency
    from pipeline.stages import Stages
    from targets.base import Device

PLACES = "devices.json"
"""Of a run folder: where its artifacts were measured, beside the recipe's own device."""
MOST_AT_ONCE = 16

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A place that answered once, and is not asked again to tell what it gave.

    Attributes:
        place: It.
        info: What it said of itself.
        images: How many outputs were compared there; None for none.
    """

    place: Place
    info: DeviceInfo
    images: PositiveInt | None = None


_KNOWN = TypeAdapter(tuple[Known, ...])


def kept_places(file: Path) -> tuple[Known, ...]:
    """Read where a run folder's artifacts were measured before; nowhere where there is no file.

    Raises:
        ArtifactError: The file is damaged.
    """
    if not file.exists():
        return ()
    allowed = "what `convnext-edge bench --device` of this version wrote"
    try:
        found = _KNOWN.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"{file} names no devices: it is damaged",
            allowed=allowed,
            do="Remove the file, and name each device again: `bench RUN_DIR --device NAME`",
        ) from error
    for one in found:
        try:
            base.device(one.place.device)
        except UsageError as error:
            raise ArtifactError(
                f"{file} names a device {one.place.device!r}: {error.got}",
                allowed=error.allowed,
                do="Remove its entry from the file; what the others gave stays",
            ) from error
    return found


def places_json(known: Sequence[Known]) -> bytes:
    """Return what `kept_places` reads."""
    return _KNOWN.dump_json(tuple(known), indent=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spot:
    """A place with its device; `asked` where what is missing there is measured."""

    place: Place
    device: Device
    info: DeviceInfo | NotRun
    asked: bool
    images: int | None

    @property
    def machine(self) -> str:
        """What it is timed on: two spots of one machine would disturb each other."""
        if isinstance(self.info, NotRun):
            return self.device.name
        return self.info.machine or self.device.name


class Lab:
    """Measures artifacts at places.

    Args:
        stages: Where results are kept.
        known: Places of earlier runs.
        asked: Those at which what is missing is measured; at the others what was finished before is
            taken over, and nothing is asked of them.
        images: How many outputs are compared at those that are asked; None where none are.
        anew: Whether times that are asked for are taken even where they were before.
        image_shape: NCHW of one input.
    """

    def __init__(
        self,
        stages: Stages,
        known: Sequence[Known],
        *,
        asked: Sequence[Place],
        images: int | None,
        image_shape: tuple[int, int, int, int],
        anew: bool = False,
    ) -> None:
        self.stages = stages
        self.anew = anew
        self.image_shape = image_shape
        self.before = before = {one.place: one for one in known}
        spots = [
            _Spot(
                place=place,
                device=base.device(place.device),
                info=before[place].info if place in before else NotRun(reason="not asked"),
                asked=place in asked,
                images=images if place in asked and images else _images_of(before.get(place)),
            )
            for place in dict.fromkeys((*before, *asked))
        ]
        self.spots = self._everywhere(spots, _asked_what_it_is)

    def known(self) -> list[Known]:
        """Return the places that have answered, now or before."""
        return [
            Known(place=spot.place, info=spot.info, images=spot.images)
            if isinstance(spot.info, DeviceInfo)
            else self.before[spot.place]
            for spot in self.spots
            if isinstance(spot.info, DeviceInfo) or spot.place in self.before
        ]

    def described(self) -> list[DeviceInfo]:
        """Return what the places say of themselves; of one device, what it says now comes last."""
        fresh = {spot.place for spot in self.spots if spot.asked}
        known = sorted(self.known(), key=lambda one: one.place in fresh)
        return [one.info for one in known]

    def latencies(self, artifacts: Sequence[Artifact], *, asked: bool) -> list[list[Latency]]:
        """Return for every artifact its latency at every place.

        Args:
            artifacts: Of the run.
            asked: Whether times are asked for at all in this run.
        """

        def time(spot: _Spot) -> list[Latency]:
            return self._timing(spot, asked=asked).run(artifacts)

        rows = self._everywhere(self.spots, time)
        return [[row[index] for row in rows] for index in range(len(artifacts))]

    def breakdowns(
        self, artifacts: Sequence[Artifact], model: Path, *, asked: bool
    ) -> list[Breakdown]:
        """Return where artifacts' time goes at those places that say so.

        Args:
            artifacts: Of the run.
            model: Folder with params.json and tensors.safetensors.
            asked: Whether times are asked for at all in this run.
        """

        def take(spot: _Spot) -> list[Breakdown]:
            return self._timing(spot, asked=asked).breakdowns(artifacts, model)

        return [row for rows in self._everywhere(self.spots, take) for row in rows]

    def parities(
        self, artifacts: Sequence[Artifact], outputs: Outputs | None, why_not: str
    ) -> list[Parity]:
        """Return how what artifacts compute at the places compares with what they compute here.

        Args:
            artifacts: Of the run.
            outputs: On what; None where there is nothing to compare on.
            why_not: The reason for that.
        """

        def compare(spot: _Spot) -> list[Parity]:
            if spot.images is None:
                return []
            if outputs is None or isinstance(spot.info, NotRun):
                reason = spot.info.reason if isinstance(spot.info, NotRun) else why_not
                return [_not_run(spot, one, reason) for one in artifacts] if spot.asked else []
            one = Comparison(
                stages=self.stages,
                device=spot.device,
                info=spot.info,
                threads=spot.place.threads,
                outputs=outputs,
                images=spot.images,
                asked=spot.asked,
            )
            return [row for artifact in artifacts for row in one.of(artifact)]

        return [row for rows in self._everywhere(self.spots, compare) for row in rows]

    def _timing(self, spot: _Spot, *, asked: bool) -> Timing:
        return Timing(
            self.stages,
            spot.device,
            threads=spot.place.threads,
            image_shape=self.image_shape,
            asked=asked and spot.asked,
            anew=self.anew,
            info=spot.info,
        )

    @staticmethod
    def _everywhere(spots: Sequence[_Spot], function: Callable[[_Spot], _Found]) -> list[_Found]:
        """Apply a function to every spot, in order: machine by machine, this host's first."""
        machines: dict[str, list[int]] = {}
        for index, spot in enumerate(spots):
            machines.setdefault(spot.machine, []).append(index)

        def in_turn(indices: Sequence[int]) -> dict[int, _Found]:
            return {index: function(spots[index]) for index in indices}

        pool = ThreadPoolExecutor(max_workers=MOST_AT_ONCE)
        try:
            found = in_turn(machines.pop(HOST, ()))
            for others in pool.map(in_turn, machines.values()):
                found |= others
        except BaseException:
            # Ctrl-C included: the threads wait for workers and boards, which know nothing of it.
            end_all()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            ending.clear()  # nothing is left that should see it
        return [found[index] for index in range(len(spots))]


def check_threads(info: DeviceInfo | NotRun, threads: int) -> None:
    """Check that a device has as many cores as threads are asked for.

    Raises:
        UsageError: It has fewer.
    """
    if isinstance(info, DeviceInfo) and threads > info.cores:
        raise UsageError(
            f"--threads {threads} on {info.name}, which has {info.cores} cores",
            allowed=f"1 to {info.cores}",
            do="Correct --threads",
        )


def _asked_what_it_is(spot: _Spot) -> _Spot:
    if not spot.asked:
        return spot
    info = spot.device.probe()
    check_threads(info, spot.place.threads)
    return replace(spot, info=info)


def _images_of(known: Known | None) -> int | None:
    return known.images if known is not None else None


def _not_run(spot: _Spot, artifact: Artifact, reason: str) -> Parity:
    return Parity(
        device=spot.device.name,
        runtime=artifact.export.runtime,
        scheme=artifact.export.scheme,
        outcome="not_run",
        reason=reason,
    )
