"""report.json: the contract that the pages, the gate and outsiders read.

In: the records of a run. Out: one `Report`, whose JSON Schema ships as reports/report.schema.json.
Missing is null, never 0. Fractions lie in [0, 1]; `drop_pp` is in percentage points, positive is a
loss; times are milliseconds.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ArtifactError
from pipeline.records import (
    Accuracy,
    Agreement,
    Breakdown,
    Fraction,
    Kind,
    Latency,
    Layout,
    Parity,
    PositiveInt,
    Profile,
    Proof,
    RangeMethod,
    Scheme,
    Training,
    Tuning,
)
from pipeline.store import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

REPORT, SCHEMA_FILE = "report.json", "report.schema.json"

CheckOutcome = Literal["pass", "fail", "inconclusive", "not_run"]


class _Model(BaseModel):
    # Further keys are allowed by the contract: an older reader takes a newer report.
    model_config = ConfigDict(frozen=True, extra="allow")


class Host(_Model):
    """The machine that made the report."""

    cpu: str
    isa: tuple[str, ...]
    os: str
    python: str
    packages: dict[str, str]


class Device(_Model):
    """What artifacts were measured on, as it described itself.

    `hardware` is what of its description no upgrade changes, empty where that is all. `isa` has its
    flags as far as kernels are chosen by them; `versions` is of what runs there, as
    far as it is not the host's; `accelerated` says that something else than its CPU computes.
    """

    name: str
    kind: Kind
    description: str
    hardware: str = ""
    isa: tuple[str, ...]
    cores: PositiveInt
    versions: dict[str, str] = Field(default_factory=dict)
    accelerated: bool = False


class Model(_Model):
    """The checkpoint, and what was counted on its network."""

    checkpoint_sha256: str
    dialect: str
    variant: str
    params: int
    macs: int
    input_size: int
    classes: int


class DataSource(_Model):
    """Images that were used: where from, how many, and the hash of their list and contents.

    `skipped` names those that could not be decoded.
    """

    source: str
    n: int
    sha256: str
    skipped: tuple[str, ...] = ()


class Data(_Model):
    """What calibrated and what evaluated; null where nothing did.

    `preprocessing` has the fields of `pipeline.records.Preprocessing`, for both.
    """

    calibration: DataSource | None
    evaluation: DataSource | None
    preprocessing: dict[str, Any] | None = None


class FloatResult(_Model):
    """The float model's own accuracy on the evaluation images."""

    top1: float | None
    n: int | None


class ArtifactRow(_Model):
    """One artifact with everything measured on it."""

    runtime: str
    scheme: Scheme
    placement: str
    graph_form: str
    path: str
    sha256: str
    size_bytes: PositiveInt
    accuracy: Accuracy
    latency: tuple[Latency, ...]
    profile: Profile | None = None
    gelu: str | None = None
    batch: int | str = 1
    float_stages: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()
    proof: Proof | None = None
    files: dict[str, str] = Field(default_factory=dict)
    export_seconds: float | None = None
    export_peak_memory_bytes: int | None = None


class Check(_Model):
    """One question the gate asked, and why it was answered so."""

    name: str
    outcome: CheckOutcome
    value: float | None
    limit: float | None
    why: str


class Gate(_Model):
    """The gate's word and the checks behind it."""

    outcome: Annotated[CheckOutcome, Field(description="not_run where no budget was given")]
    checks: tuple[Check, ...]


class Site(_Model):
    """One place where activations are quantized, and what the calibration chose there.

    The fields are those of `pipeline.records.SiteCalibration` and `Quantization`. `sqnr_db` is
    taken behind what reads the site, with this site alone quantized; `plain_sqnr_db` is the same
    with the plain grid: min-max, not rescaled. A spread is the widest channel's range over the
    median channel's.
    """

    site: str
    role: str
    range_method: RangeMethod
    strength: Fraction
    minimum: float
    maximum: float
    clipped: Fraction
    spread_before: float
    spread_after: float
    sqnr_db: float
    plain_sqnr_db: float
    scale: float
    zero_point: int
    bits: int


class Calibration(_Model):
    """How the grids of the activations were chosen, and which.

    `settings` has the fields of `pipeline.records.Calibration`; `images` is their source, `none`
    where they were synthetic; `sample` counts those that the choices were tried on; `sites` is in
    network order.
    """

    settings: dict[str, Any]
    scheme: Scheme
    placement: str
    float_layers: tuple[str, ...] = ()
    images: str | None = None
    sample: int | None = None
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]


class Report(_Model):
    """The whole document."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    host: Host
    model: Model
    data: Data
    float_result: Annotated[FloatResult, Field(alias="float")]
    artifacts: tuple[ArtifactRow, ...]
    agreement: tuple[Agreement, ...]
    gate: Gate
    calibration: Annotated[
        Calibration | None, Field(description="null where no activation is quantized beforehand")
    ] = None
    tuning: Annotated[Tuning | None, Field(description="null where no --max-drop was given")] = None
    training: Annotated[Training | None, Field(description="null where nothing was trained")] = None
    layouts: Annotated[
        tuple[Layout, ...], Field(description="one per runtime: graph form and placement")
    ] = ()
    breakdowns: Annotated[
        tuple[Breakdown, ...], Field(description="where the time of artifacts goes")
    ] = ()
    parity: Annotated[
        tuple[Parity, ...], Field(description="outputs on devices, beside this host's")
    ] = ()
    devices: Annotated[
        tuple[Device, ...], Field(description="those that answered, now or in an earlier run")
    ] = ()

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    def device(self, name: str) -> Device | None:
        """Return what a device said of itself; None where that is not known."""
        return next((one for one in self.devices if one.name == name), None)


def write_report(path: Path, report: Report) -> None:
    """Write report.json whole or not at all."""
    write_atomic(path, report.model_dump_json(by_alias=True, indent=2).encode() + b"\n")


def read_report(path: Path) -> Report:
    """Read report.json, or the one in a run folder.

    Raises:
        ArtifactError: There is none, or it does not follow the contract.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"no report at {file} ({error.strerror})",
            allowed=f"a folder that `convnext-edge run` wrote, or its {REPORT}",
            do="Run `convnext-edge run --out DIR` first",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(
            f"{file} does not follow the report contract: {where}: {first['msg']}",
            allowed="schema 1, as reports/report.schema.json has it",
            do="Run `convnext-edge run` again with this version",
        ) from error


def json_schema() -> str:
    """Return the JSON Schema of report.json, as it ships in reports/report.schema.json."""
    schema = Report.model_json_schema(by_alias=True)
    return json.dumps(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2
    )
