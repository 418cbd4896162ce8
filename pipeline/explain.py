"""What the calibration chose, site by site, and what that costs, for a terminal.

In: a run folder. Out: facts as JSON-like values, and their table. They are report.json's; where it
has no calibration, or where there is no report yet, the quantized model's own.
"""

from __future__ import annotations

import json
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from rich.markup import escape

from pipeline.errors import ArtifactError, UsageError, got_of, printable
from pipeline.exports import MODEL_FILES
from pipeline.records import Breakdown, Export, QuantizedModel, Tuning
from pipeline.run import MODEL
from pipeline.tune import TUNING
from pipeline.worker import Worker, log_without_a_run
from reports import assemble, breakdowns, training, tuning
from reports.culprits import culprits, median_db, sentences, worst_first
from reports.document import REPORT, Calibration, read_report
from reports.pages import share, word
from reports.summary import drop_in_points
from reports.terminal import new_table, print_whole
from targets import base
from targets.base import of_suffix, require_installed
from targets.export import read_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console

    from pipeline.records import Accuracy

PARAMS = MODEL_FILES[0]
LOCAL = "local"
BAR = 40
"""Characters of the whole time."""
NOTHING = "No activation is quantized beforehand here, so there is no site to explain."
UNMEASURED = "No artifact's accuracy was measured."


def explain(out: Path) -> dict[str, Any]:
    """Collect what a run folder says about its calibration.

    Args:
        out: The run folder.

    Returns:
        `says` (sentences), `calibration` (as in report.json, its sites in network order; null
        where no activation is quantized beforehand), `worst` (names, worst first), `median_db`,
        `accuracy` (per artifact measured), `tuning` (as in report.json; null without --max-drop)
        and `tuning_says`; `training_says`.

    Raises:
        ArtifactError: It has neither a report nor a model, one is damaged, or it is a file.
    """
    named = out.suffix in {one.capabilities.suffix for one in base.runtimes().values()}
    if out.is_file() or (named and not any((out / name).exists() for name in (REPORT, MODEL))):
        raise ArtifactError(
            f"{out} is no run folder",
            allowed="a run folder; with --latency an artifact",
            do="Name the folder, or add --latency",
        )
    report = read_report(out) if (out / REPORT).exists() else None
    calibration = report.calibration if report is not None else None
    older = report is not None and "calibration" not in report.model_fields_set
    if report is None or (older and (out / MODEL / PARAMS).exists()):
        calibration = _of_model(out)
    rows = report.artifacts if report is not None else ()
    accuracy = [
        {
            "artifact": f"{row.runtime} {row.scheme}",
            "placement": row.placement,
            "profile": row.profile,
            "n": row.accuracy.n,
            "sqnr_db": row.accuracy.sqnr_db,
            "drop_pp": row.accuracy.drop_pp,
            "drop": drop_in_points(row.accuracy),
        }
        for row in rows
        if _measured(row.accuracy)
    ]
    facts: dict[str, Any] = {
        "says": [NOTHING],
        "calibration": None,
        "worst": [],
        "median_db": None,
        "accuracy": accuracy,
        "tuning": None,
        "tuning_says": [],
        "training_says": [],
    }
    tuned = report.tuning if report is not None else _tuning_of_model(out)
    if tuned is not None:
        facts |= {
            "tuning": TypeAdapter(Tuning).dump_python(tuned, mode="json"),
            "tuning_says": list(tuning.sentences(tuned)),
        }
    if report is not None and report.training is not None:
        facts["training_says"] = list(training.sentences(report.training))
    if calibration is not None:
        facts |= {
            "says": list(sentences(calibration)),
            "calibration": calibration.model_dump(mode="json"),
            "worst": [site.site for site in culprits(calibration.sites)],
            "median_db": median_db(calibration.sites),
        }
    return facts


def explain_latency(artifact: Path, device: str = LOCAL) -> Breakdown:
    """Take an artifact's time apart on this machine.

    Args:
        artifact: In a run folder, whose integers then tell the floor; or elsewhere.
        device: This machine's CPU: `local`, or held to an instruction set, `cpu:LEVEL`; on macOS
            `coreml:UNITS`.

    Raises:
        EdgeError: It is no artifact of a runtime here, or the device cannot run it.
    """
    target = of_suffix(artifact)
    require_installed(target)
    environment = _environment(device, target)
    stated = read_metadata(artifact)
    size, batch = stated.preprocessing.input_size, stated.batch
    try:
        described = json.loads(target.read_metadata(artifact))
        export = TypeAdapter(Export).validate_python(described["export"])
        parents = TypeAdapter(dict[str, str]).validate_python(described["parents"])
    except (KeyError, ValidationError) as error:
        raise ArtifactError(
            f"{artifact} does not say how it was exported ({type(error).__name__})",
            allowed="an artifact that `convnext-edge export` of this version wrote",
            do="Export it again",
        ) from error
    with (
        log_without_a_run() as log,
        TemporaryDirectory() as folder,
        Worker(log, environment=environment) as worker,
    ):
        said = worker.call(
            "targets.breakdown:breakdown_stage",
            name=target.name,
            path=str(artifact),
            model=_integers_of(artifact, parents),
            image_shape=[batch, len(stated.preprocessing.mean), size, size],
            folder=folder,
        ).value
    where = {"runtime": target.name, "scheme": export.scheme, "device": device}
    return TypeAdapter(Breakdown).validate_python(where | said)


def _environment(name: str, target: base.Runtime) -> Mapping[str, str]:
    """Return the variables of a process in which a runtime's profiler speaks of a device."""
    device, why = base.device(name), "it is no CPU of this machine"
    # Others are not even asked: they may be far away.
    if isinstance(device, base.InProcesses):
        info = device.probe()
        cannot = info if isinstance(info, base.NotRun) else device.can_run(target)
        if cannot is not None:
            why = got_of(cannot.reason)
        elif isinstance(info, base.DeviceInfo) and info.kind == "host":
            return device.environment()
    raise UsageError(
        f"{name} cannot take {target.name}'s time apart: {why}",
        allowed="local, cpu:LEVEL, coreml:UNITS; for others `convnext-edge bench RUN_DIR --device`",
        do="Correct --device",
    )


def _integers_of(artifact: Path, parents: Mapping[str, str]) -> str | None:
    """Return the model of the run folder that an artifact lies in, where it was made from that."""
    run = next(iter(artifact.absolute().parents[2:3]), None)
    try:
        text = (run / MODEL / PARAMS).read_bytes() if run is not None else b""
        model = TypeAdapter(QuantizedModel).validate_json(text)
    except (OSError, ValidationError):
        return None
    return str(run / MODEL) if run is not None and model.parents == parents else None


def show_latency(found: Breakdown, console: Console) -> None:
    """Print the sentences, and a row per kind of operation, longest first."""
    for sentence in breakdowns.sentences(found):
        _say(sentence, console)
    table = new_table("kind", "ms", "share", "operations")
    table.add_column("")
    for kind, ms, part, ops in breakdowns.rows(found):
        table.add_row(kind, f"{ms:.3g}", share(part), str(ops), "█" * round(BAR * part))
    if found.ms:
        print_whole(table, console)


def show(facts: dict[str, Any], console: Console) -> None:
    """Print the sentences, the accuracy of the artifacts, and a row per site, worst first."""
    for sentence in (*facts["says"], *facts["training_says"]):
        _say(sentence, console)
    _show_accuracy(facts["accuracy"], console)
    _show_tuning(facts, console)
    if facts["calibration"] is None:
        return
    calibration = Calibration.model_validate(facts["calibration"])
    settings = ", ".join(
        f"{name.replace('_', ' ')} {word(value)}" for name, value in calibration.settings.items()
    )
    images = f"; images {calibration.images}" if calibration.images else ""
    _say(f"{calibration.scheme}, placement {calibration.placement}; {settings}{images}", console)
    if calibration.float_layers:
        _say(f"float layers: {', '.join(calibration.float_layers)}", console)
    table = new_table("site", "SQNR dB", "plain")
    table.add_column("range", no_wrap=True)
    for title in (
        "strength", "minimum", "maximum", "clipped", "spread", "after", "scale", "zero", "bits",
    ):  # fmt: skip
        table.add_column(title, justify="right", no_wrap=True)
    for site in worst_first(calibration.sites):
        table.add_row(
            _text(site.site),
            f"{site.sqnr_db:.1f}",
            f"{site.plain_sqnr_db:.1f}",
            site.range_method,
            f"{site.strength:.2f}",
            f"{site.minimum:.4g}",
            f"{site.maximum:.4g}",
            share(site.clipped),
            f"{site.spread_before:.3g}",
            f"{site.spread_after:.3g}",
            f"{site.scale:.4g}",
            str(site.zero_point),
            str(site.bits),
            style="bold red" if site.site in facts["worst"] else None,
        )
    print_whole(table, console)


def _show_tuning(facts: dict[str, Any], console: Console) -> None:
    """Print what stays float and why, and what each layer loses alone."""
    if facts["tuning"] is None:
        return
    for sentence in facts["tuning_says"]:
        _say(sentence, console)
    found = TypeAdapter(Tuning).validate_python(facts["tuning"])
    table = new_table("alone in integers", "SQNR dB", "KL", "MACs", "share", "in float")
    for row in (*tuning.rows(found, "layer"), *tuning.rows(found, "block")):
        one = row.found
        table.add_row(
            _text(one.name),
            "—" if one.sqnr_db is None else f"{one.sqnr_db:.1f}",
            f"{one.kl:.2e}",
            f"{one.macs:,}",
            share(row.share),
            ("yes" if one.kind == "layer" else "in part") if row.left else "",
            style="bold red" if row.left else None,
        )
    print_whole(table, console)


def _of_model(out: Path) -> Calibration | None:
    params = out / MODEL / PARAMS
    try:
        model = TypeAdapter(QuantizedModel).validate_json(params.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"{out} has no {REPORT} and no {MODEL}/{PARAMS} ({error.strerror})",
            allowed="a folder that `convnext-edge run` or `quantize` wrote",
            do="Run `convnext-edge quantize --out DIR` first",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"{params} holds no quantized model: {where or 'the file'}: {first['msg']}",
            allowed="what `convnext-edge quantize` of this version wrote",
            do="Run `convnext-edge quantize` again",
        ) from error
    missing = [name for name in model.chosen if name not in model.sites]
    if missing:
        raise ArtifactError(
            f"{params} holds no grid of {missing[0]}",
            allowed="what `convnext-edge quantize` of this version wrote",
            do="Run `convnext-edge quantize` again",
        )
    return assemble.calibration(model)


def _tuning_of_model(out: Path) -> Tuning | None:
    file = out / MODEL / TUNING
    if not file.exists():
        return None
    try:
        return TypeAdapter(Tuning).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"{file} tells no tuning ({type(error).__name__})",
            allowed="what `convnext-edge quantize --max-drop` of this version wrote",
            do="Run `convnext-edge quantize` again",
        ) from error


def _measured(accuracy: Accuracy) -> bool:
    return accuracy.outcome == "measured" and (
        accuracy.sqnr_db is not None or accuracy.drop_pp is not None
    )


def _show_accuracy(rows: list[dict[str, Any]], console: Console) -> None:
    if not rows:
        _say(UNMEASURED, console)
        return
    table = new_table("artifact")
    table.add_column("placement", no_wrap=True)
    for title in ("images", "SQNR dB", "drop, points (95 %)"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        sqnr = "—" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        images = "—" if row["n"] is None else f"{row['n']:,}"
        table.add_row(_text(row["artifact"]), _text(row["placement"]), images, sqnr, row["drop"])
    print_whole(table, console)


def _say(text: str, console: Console) -> None:
    console.print(_text(text), soft_wrap=True, highlight=False)


def _text(text: str) -> str:
    return escape(printable(text))
