"""Latency: raw samples from a device, and what follows from them.

In: the artifacts of one runtime and a device. Out: one `Latency` per artifact and the raw samples.
The jobs alternate with a null session, which shows what the harness itself costs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from pipeline.records import Latency
from pipeline.statistics import percentile, ratio_interval
from targets.base import Job, NotRun, Samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.records import Kind, Scheme
    from pipeline.worker import Progress
    from targets.base import Device, DeviceInfo, Runtime

HARNESS, SAMPLES = "harness", "samples.json"
ROUNDS, PER_ROUND = 8, 9
"""72 samples: enough for the 90th percentile (`pipeline.statistics.MINIMUM_SAMPLES`)."""

_SAMPLES = TypeAdapter(list[Samples])


def bench(
    folder: Path,
    device: Device,
    target: Runtime,
    artifacts: Mapping[Scheme, Path],
    *,
    image_shape: tuple[int, int, int, int],
    threads: int,
    progress: Progress,
) -> None:
    """Time the artifacts of one runtime, alternating with each other and with the null session.

    Args:
        folder: Takes samples.json: the raw samples, the harness's first.
        device: Where.
        target: Their runtime.
        artifacts: Scheme to path.
        image_shape: NCHW of the input.
        threads: For the runtime.
        progress: Called per turn.
    """
    image = noise_image(image_shape)
    jobs = [Job(label=HARNESS, runtime=target.name, path=None)]
    jobs += [Job(label=label, runtime=target.name, path=path) for label, path in artifacts.items()]
    samples = device.measure(
        jobs, image, rounds=ROUNDS, per_round=PER_ROUND, threads=threads, progress=progress
    )
    (folder / SAMPLES).write_bytes(_SAMPLES.dump_json(samples, indent=1))


def noise_image(shape: tuple[int, int, int, int]) -> NDArray[np.float32]:
    """Return seeded noise of an NCHW shape: its pixels cost what others cost."""
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)


def read_latencies(
    folder: Path, info: DeviceInfo, target: Runtime, *, threads: int, samples_file: str
) -> dict[str, Latency]:
    """Derive the figures of each artifact from the samples.json that `bench` wrote."""
    samples = _SAMPLES.validate_json((folder / SAMPLES).read_bytes())
    rows = latencies(info, samples, threads=threads, samples_file=samples_file)
    if not target.capabilities.accelerated:
        return rows
    return {label: replace(row, accelerated=True) for label, row in rows.items()}


def latencies(
    info: DeviceInfo, samples: Sequence[Samples], *, threads: int, samples_file: str
) -> dict[str, Latency]:
    """Derive the figures of each artifact from the raw samples of one run.

    Args:
        info: The device.
        samples: As a device gives them; the float artifact's are labelled `float`.
        threads: As measured.
        samples_file: Where the raw samples are kept, relative to the run folder.

    Returns:
        Label to latency, without the harness.
    """
    by_label = {item.label: item for item in samples}
    harness, base = by_label.pop(HARNESS), by_label.get("float")
    rows = {}
    for label, item in by_label.items():
        if item.error is not None:
            rows[label] = failed(info, item.error, threads=threads)
            continue
        row = Latency(
            device=info.name,
            outcome="measured",
            kind=info.kind,
            threads=threads,
            n=len(item.wall_ms) or len(item.instructions),
            wall_p50_ms=percentile(item.wall_ms, 50),
            wall_p90_ms=percentile(item.wall_ms, 90),
            cpu_p50_ms=percentile(item.cpu_ms, 50),
            cpu_p90_ms=percentile(item.cpu_ms, 90),
            samples_file=samples_file,
            load_ms=item.load_ms,
            first_ms=item.first_ms,
            peak_memory_bytes=item.peak_memory_bytes,
            energy_mj=item.energy_mj,
            harness_wall_p50_ms=percentile(harness.wall_ms, 50),
            harness_cpu_p50_ms=percentile(harness.cpu_ms, 50),
            versions=dict(item.versions),
            operations_on=item.operations_on or None,
            **_counts(item, base),
            before=item.before,
            after=item.after,
            accelerated=info.accelerated,
        )
        rows[label] = _beside_float(row, item, base) if base else row
    return rows


def lacks_some(folder: Path) -> bool:
    """Return whether the samples.json that `bench` wrote tells of an artifact that failed."""
    samples = _SAMPLES.validate_json((folder / SAMPLES).read_bytes())
    return any(item.error for item in samples)


def _counts(item: Samples, base: Samples | None) -> dict[str, Any]:
    """Return the fields of a row that instructions make; none where none were counted."""
    if not item.instructions:
        return {}
    count = int(np.median(item.instructions))
    said: dict[str, Any] = {
        "instructions": count,
        "instruction_spread": (max(item.instructions) - min(item.instructions)) / count,
        "instruction_kinds": dict(item.instruction_kinds),
        "instructions_by_symbol": dict(item.symbols),
    }
    if base is not None and base.instructions:
        of_float = int(np.median(base.instructions))
        said |= {"float_instructions": of_float, "instruction_ratio": count / of_float}
    return said


def _beside_float(row: Latency, item: Samples, base: Samples) -> Latency:
    wall = ratio_interval(item.wall_ms, base.wall_ms, per_round=PER_ROUND)
    cpu = ratio_interval(item.cpu_ms, base.cpu_ms, per_round=PER_ROUND)
    return replace(
        row,
        float_wall_p50_ms=percentile(base.wall_ms, 50),
        float_cpu_p50_ms=percentile(base.cpu_ms, 50),
        speedup=1 / wall[0] if wall and wall[0] else None,
        wall_ratio=wall[0] if wall else None,
        wall_ratio_ci95=wall[1:] if wall else None,
        cpu_ratio=cpu[0] if cpu else None,
        cpu_ratio_ci95=cpu[1:] if cpu else None,
    )


def not_run(
    device: str, reason: NotRun, *, threads: int | None = None, kind: Kind | None = None
) -> Latency:
    """Return the row of an artifact that could not be timed, with the reason."""
    return Latency(
        device=device, outcome="not_run", reason=reason.reason, threads=threads, kind=kind
    )


def failed(info: DeviceInfo, reason: str, *, threads: int) -> Latency:
    """Return the row of an artifact that failed on a device, with the reason."""
    return Latency(
        device=info.name, outcome="failed", reason=reason, threads=threads, kind=info.kind
    )
