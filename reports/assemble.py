"""The records of a run become one `Report`.

In: what the stages left behind. Out: the document, without the gate's word, which is added last.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.store import installed_versions
from reports.document import (
    ArtifactRow,
    Calibration,
    Data,
    Device,
    FloatResult,
    Gate,
    Host,
    Model,
    Report,
    Site,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pipeline.records import (
        Accuracy,
        Agreement,
        Artifact,
        Breakdown,
        Checkpoint,
        Latency,
        Layout,
        Parity,
        QuantizedModel,
        Training,
        Tuning,
    )
    from targets.base import DeviceInfo

BASE = ("convnext-edge", "torch", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How the integers came about and how they are laid out; None for what was not done."""

    calibration: Calibration | None = None
    tuning: Tuning | None = None
    training: Training | None = None
    layouts: tuple[Layout, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured beside each artifact's own accuracy and latency."""

    float_result: FloatResult
    agreement: Sequence[Agreement]
    breakdowns: Sequence[Breakdown]
    parity: Sequence[Parity]


def host(local: DeviceInfo, distributions: Sequence[str]) -> Host:
    """Describe this machine, with the versions of what made and ran the artifacts."""
    return Host(
        cpu=local.description,
        isa=local.isa,
        os=platform.platform(),
        python=sys.version.split()[0],
        packages=installed_versions((*BASE, *distributions)),
    )


def device(info: DeviceInfo) -> Device:
    """Describe what artifacts were measured on."""
    return Device.model_validate(info, from_attributes=True)


def model(checkpoint: Checkpoint, counts: Mapping[str, Any], input_size: int) -> Model:
    """Describe the checkpoint; `counts` has `params` and `macs`."""
    return Model(
        checkpoint_sha256=checkpoint.sha256,
        dialect=checkpoint.dialect,
        variant=checkpoint.variant,
        params=counts["params"],
        macs=counts["macs"],
        input_size=input_size,
        classes=checkpoint.architecture.classes,
    )


def artifact_row(artifact: Artifact, accuracy: Accuracy, latency: Sequence[Latency]) -> ArtifactRow:
    """Lay out one artifact with what was measured on it."""
    export = artifact.export
    return ArtifactRow(
        runtime=export.runtime,
        scheme=export.scheme,
        placement=export.placement,
        graph_form=export.graph_form,
        path=artifact.path,
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        accuracy=accuracy,
        latency=tuple(latency),
        profile=export.profile,
        gelu=export.gelu,
        batch=export.batch,
        float_stages=export.float_stages,
        sites=artifact.sites,
        proof=artifact.proof,
        files=artifact.files,
        export_seconds=round(artifact.export_seconds, 3),
        export_peak_memory_bytes=artifact.export_peak_memory_bytes,
    )


def calibration(
    quantized: QuantizedModel, *, sample: int | None = None, images: str | None = None
) -> Calibration | None:
    """Lay out what the calibration chose at every site.

    Args:
        quantized: What it left.
        sample: How many images the choices were tried on, where that is known.
        images: Where they came from.

    Returns:
        The sites in network order; None where no activation is quantized beforehand.
    """
    sites = tuple(
        Site(
            site=name,
            role=name.rpartition(".")[2],
            **asdict(found),
            **asdict(quantized.sites[name]),
        )
        for name, found in quantized.chosen.items()
    )
    if not sites:
        return None
    return Calibration(
        settings=asdict(quantized.calibration),
        scheme=quantized.scheme,
        placement=quantized.placement,
        float_layers=quantized.float_layers,
        images=images,
        sample=sample,
        sites=sites,
    )


def report(
    *,
    local: DeviceInfo,
    devices: Iterable[DeviceInfo],
    distributions: Sequence[str],
    checkpoint: Model,
    data: Data,
    artifacts: Sequence[ArtifactRow],
    measured: Measured,
    chosen: Choices,
) -> Report:
    """Put the document together; the gate is still not_run."""
    return Report(
        host=host(local, distributions),
        model=checkpoint,
        data=data,
        float_result=measured.float_result,
        artifacts=tuple(artifacts),
        agreement=tuple(measured.agreement),
        gate=Gate(outcome="not_run", checks=()),
        calibration=chosen.calibration,
        tuning=chosen.tuning,
        training=chosen.training,
        layouts=chosen.layouts,
        breakdowns=tuple(measured.breakdowns),
        parity=tuple(measured.parity),
        devices=tuple({one.name: device(one) for one in devices}.values()),
    )
