"""The commands that run the pipeline: run, quantize, export, finetune, verify, bench; thin.

In: words. Out: a run folder, tables, and an exit code (`pipeline.cli` has them all).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline import words

if TYPE_CHECKING:
    from pipeline.recipe import Budget, Recipe
    from pipeline.records import Place
    from pipeline.results import Asked
    from pipeline.run import Finished
    from reports.document import Gate

app = typer.Typer(
    name="convnext-edge",
    no_args_is_help=True,
    # Rich's panels cut names and values at 80 columns.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out_console = Console(emoji=False)
err_console = Console(stderr=True, emoji=False)

INTERRUPTED, TERMINATED = 130, 143
DEFAULT_OUT = Path("runs/default")

RunDir = Annotated[Path, typer.Argument(help="A folder that `convnext-edge run` wrote.")]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device", help="A name that `devices` lists; again for more: they work at the same time."
    ),
]
Inventory = Annotated[
    Path | None,
    typer.Option(help="TOML file that names devices; --device all means every one of them."),
]


# --- the pipeline: run, quantize and export are one command that goes more or less far ------------


def _pipeline_command(name: str, summary: str, *, export: bool, measure: bool) -> None:
    @app.command(name, help=summary)
    def command(
        recipe: Annotated[Path | None, typer.Option(help="TOML recipe; flags override it.")] = None,
        checkpoint: Annotated[
            str | None,
            typer.Option(
                help="A .pth or .safetensors file, an index of shards, a Hugging Face folder, or "
                "hf:owner/name; left out: the embedded model."
            ),
        ] = None,
        weights: Annotated[
            str | None,
            typer.Option(
                help="Of a training checkpoint: auto (EMA first), ema, model.", show_default="auto"
            ),
        ] = None,
        data: Annotated[
            str | None,
            typer.Option(
                help="Folder, zip, tar, parquet or csv of images; `digits`; `none`: synthetic ones."
            ),
        ] = None,
        eval_: Annotated[
            str | None,
            typer.Option("--eval", help="Evaluation images elsewhere; `none`: no evaluation."),
        ] = None,
        label_file: Annotated[
            Path | None, typer.Option("--labels", help="Labels of a flat folder of --eval images.")
        ] = None,
        class_order: Annotated[
            str | None,
            typer.Option(help="The data's classes in the model's order: a file, or `sorted`."),
        ] = None,
        input_size: Annotated[int | None, typer.Option(help="Side of the image, pixels.")] = None,
        scheme: Annotated[
            str | None,
            typer.Option(
                help="float, float16, w8a8, w4a8, w8a16, w8a8-dynamic, w8, or w4a4 with reference.",
                show_default="w8a8",
            ),
        ] = None,
        runtimes: Annotated[
            str | None,
            typer.Option(
                help="Comma-separated: onnx,openvino,tflite,coreml,reference.",
                show_default="onnx,openvino,tflite,coreml",
            ),
        ] = None,
        placement: Annotated[
            str | None,
            typer.Option(
                help="Layers in integers: pointwise and pointwise-downsample (neither in tflite), "
                "pointwise-io, pointwise-depthwise, dense, all.",
                show_default="each runtime's",
            ),
        ] = None,
        tune: Annotated[
            str | None,
            typer.Option(
                help="Graph form and placement by measurement: off, quick or full.",
                show_default="quick; off for the embedded model",
            ),
        ] = None,
        method: Annotated[
            str | None,
            typer.Option(
                help="How grids are chosen: search, min-max, percentile, mse, entropy.",
                show_default="search",
            ),
        ] = None,
        rounding: Annotated[
            str | None,
            typer.Option(help="Of weights: auto, nearest, gptq or adaround.", show_default="auto"),
        ] = None,
        max_drop: Annotated[
            float | None,
            typer.Option(help="Leave layers in float until top-1 drops by at most so many points."),
        ] = None,
        float_layers: Annotated[
            str | None, typer.Option(help="Comma-separated layers that stay float.")
        ] = None,
        out: Annotated[Path, typer.Option(help="The run folder.")] = DEFAULT_OUT,
        calibration_images: Annotated[
            int | None,
            typer.Option(
                help="At most this many.", show_default="512; 256 with the embedded model"
            ),
        ] = None,
        eval_images: Annotated[
            int | None, typer.Option(help="At most this many.", show_default="all")
        ] = None,
        seed: Annotated[
            int | None, typer.Option(help="Of the draw of images.", show_default="0")
        ] = None,
        isa: Annotated[
            str | None,
            typer.Option(
                help="Where artifacts will run: auto, avx2, vnni or arm.", show_default="auto"
            ),
        ] = None,
        batch: Annotated[
            str | None,
            typer.Option(help="Batch of the artifacts: a number or `dynamic`.", show_default="1"),
        ] = None,
        bench: Annotated[
            bool | None,
            typer.Option("--bench/--no-bench", help="Measure latency.", show_default="bench"),
        ] = None,
        device: Annotated[
            str | None, typer.Option(help="Where latency is measured.", show_default="local")
        ] = None,
        threads: Annotated[
            int | None, typer.Option(min=1, help="Threads while measuring.", show_default="1")
        ] = None,
        allow_overlap: Annotated[
            bool | None,
            typer.Option("--allow-overlap", help="Images may calibrate and evaluate alike."),
        ] = None,
        crop_ratio: Annotated[
            float | None, typer.Option(help="Centre crop over resized shorter side.")
        ] = None,
        resize_size: Annotated[
            int | None, typer.Option(help="Resized shorter side, pixels; over --crop-ratio.")
        ] = None,
        crop_mode: Annotated[str | None, typer.Option(help="center or squash.")] = None,
        interpolation: Annotated[
            str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos.")
        ] = None,
        antialias: Annotated[
            bool | None, typer.Option("--antialias/--no-antialias", help="When images shrink.")
        ] = None,
        mean: Annotated[str | None, typer.Option(help="R,G,B of pixels in [0, 1].")] = None,
        std: Annotated[str | None, typer.Option(help="R,G,B of pixels in [0, 1].")] = None,
        budget: Annotated[Path | None, typer.Option(help="TOML budget of the gate.")] = None,
        baseline: Annotated[Path | None, typer.Option(help="Accepted report.json.")] = None,
    ) -> None:
        from pipeline.run import Steps

        settings = _recipe(
            recipe,
            {
                "checkpoint": words.checkpoint_place(checkpoint),
                "weights": weights,
                "data": words.data_place(data),
                "eval": words.data_place(eval_),
                "label_file": words.absolute(label_file),
                "class_order": words.class_order_place(class_order),
                "input_size": input_size,
                "scheme": scheme,
                "runtimes": tuple(words.listed(runtimes)) if runtimes is not None else None,
                "placement": placement,
                "tune": tune,
                "method": method,
                "rounding": rounding,
                "max_drop": max_drop,
                "float_layers": None if float_layers is None else tuple(words.listed(float_layers)),
                "calibration_images": calibration_images,
                "eval_images": eval_images,
                "seed": seed,
                "isa": isa,
                "batch": int(batch) if batch is not None and batch.isdecimal() else batch,
                "bench": bench,
                "device": device,
                "threads": threads,
                "allow_overlap": allow_overlap,
                "preprocessing": {
                    "crop_ratio": crop_ratio,
                    "resize_size": resize_size,
                    "crop_mode": crop_mode,
                    "interpolation": interpolation,
                    "antialias": antialias,
                    "mean": words.numbers("--mean", mean),
                    "std": words.numbers("--std", std),
                },
                "gate": budget_of(budget),
                "baseline": words.absolute(baseline),
            },
            added_to=out if export and not measure else None,
        )
        if settings.checkpoint is None:
            err_console.print("  no --checkpoint: the embedded model, of handwritten digits")
        steps = Steps(export=export, verify=measure, bench=measure, choose=measure)
        _conclude(_execute(settings, out, steps), out)


_pipeline_command(
    "run", "Do all of it: quantize, export, verify, bench, report, gate.", export=True, measure=True
)
_pipeline_command(
    "quantize", "Calibrate and quantize; leaves OUT/model.", export=False, measure=False
)
_pipeline_command(
    "export",
    "Quantize and export; leaves OUT/artifacts. Runtimes there with the same settings stay.",
    export=True,
    measure=False,
)


@app.command()
def finetune(
    run_dir: RunDir,
    out: Annotated[Path, typer.Option(help="The new run folder.")],
    data: Annotated[
        str | None, typer.Option(help="Training images; left out: those that RUN_DIR names.")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help="w8a8, w4a8, w8; w8a16 with tflite, w4a4 with reference.")
    ] = None,
    placement: Annotated[
        str | None, typer.Option(help="Layers in integers; see `run --help`.")
    ] = None,
    runtimes: Annotated[str | None, typer.Option(help="Comma-separated.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Whose quantizers: own or nncf.", show_default="own")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the images.", show_default="2")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images of an update.", show_default="64")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Train on at most so many.", show_default="all")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Of weights: steps of their grid per update.", show_default="0.007"),
    ] = None,
    scale_rate: Annotated[
        float | None,
        typer.Option(help="Of scales, offsets and biases, relative.", show_default="0.0001"),
    ] = None,
    warm_up: Annotated[
        float | None, typer.Option(help="Share of updates.", show_default="0.05")
    ] = None,
    decay: Annotated[float | None, typer.Option(help="Of weights alone.", show_default="0")] = None,
    clip: Annotated[
        float | None, typer.Option(help="Longest gradient, over the mean.", show_default="3")
    ] = None,
    average: Annotated[
        float | None,
        typer.Option(help="Of the exponential mean of weights; 0: none.", show_default="0.9"),
    ] = None,
    drop_path: Annotated[
        float | None,
        typer.Option(help="Share of images that skip the last block.", show_default="0"),
    ] = None,
    logit_weight: Annotated[
        float | None, typer.Option(help="Of the logits' distance.", show_default="1")
    ] = None,
    kl_weight: Annotated[
        float | None, typer.Option(help="Of the divergence.", show_default="1")
    ] = None,
    block_weight: Annotated[
        float | None, typer.Option(help="Of the blocks' outputs.", show_default="1")
    ] = None,
    label_weight: Annotated[
        float | None, typer.Option(help="Of the labels.", show_default="0")
    ] = None,
    oscillation: Annotated[
        str | None, typer.Option(help="auto, count, dampen or freeze.", show_default="auto")
    ] = None,
    crop: Annotated[
        float | None, typer.Option(help="Least area of a random crop.", show_default="0.7")
    ] = None,
    flip: Annotated[
        float | None, typer.Option(help="Share of images mirrored.", show_default="0.5")
    ] = None,
    colour: Annotated[
        float | None, typer.Option(help="Strength of colour jitter.", show_default="0")
    ] = None,
    randaugment: Annotated[
        int | None, typer.Option(help="Operations per image.", show_default="0")
    ] = None,
    magnitude: Annotated[
        int | None, typer.Option(help="Of RandAugment, 1 to 29.", show_default="9")
    ] = None,
    save_minutes: Annotated[
        float | None, typer.Option(help="Between checkpoints.", show_default="5")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of images' order and augmentation.", show_default="0")
    ] = None,
    bench: Annotated[
        bool | None, typer.Option("--bench/--no-bench", help="Measure latency.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on from an unfinished training.")
    ] = True,
) -> None:
    """Train a run folder's quantized model on; leaves a run folder of its own."""
    from pipeline.run import Steps, trained_on

    changes = {
        "scheme": scheme,
        "placement": placement,
        "runtimes": tuple(words.listed(runtimes)) if runtimes is not None else None,
        "train": words.data_place(data),
        "bench": bench,
        "finetune": {
            "engine": engine,
            "epochs": epochs,
            "batch": batch,
            "images": images,
            "rate": rate,
            "scale_rate": scale_rate,
            "warm_up": warm_up,
            "decay": decay,
            "clip": clip,
            "average": average,
            "drop_path": drop_path,
            "logit_weight": logit_weight,
            "kl_weight": kl_weight,
            "block_weight": block_weight,
            "label_weight": label_weight,
            "oscillation": oscillation,
            "save_minutes": save_minutes,
            "seed": seed,
            "augmentation": {
                "crop": crop,
                "flip": flip,
                "colour": colour,
                "randaugment": randaugment,
                "magnitude": magnitude,
            },
        },
    }
    if recipe_of(run_dir).finetune is not None:
        note = f"{run_dir} was trained itself: training begins again where its calibration ended,"
        note += " with the settings it had"
        err_console.print(f"  {note}", soft_wrap=True, highlight=False, markup=False)
    settings = trained_on(run_dir, changes)
    _conclude(_execute(settings, out, Steps(restart=not resume, beside=run_dir)), out)


@app.command()
def verify(
    run_dir: RunDir,
    device: Devices = None,
    inventory: Inventory = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Of a device: compare outputs on so many (100).")
    ] = None,
) -> None:
    """Run a run folder's artifacts over its evaluation images, or compare a device's outputs."""
    from pipeline.errors import UsageError
    from pipeline.recipe import NONE
    from pipeline.results import Asked
    from pipeline.run import Steps

    stored = recipe_of(run_dir)
    places = _places(device, None, inventory)
    away = tuple(place for place in places if place.device != stored.device)
    if images is not None and not away:
        raise UsageError(
            f"--images {images} without another --device than the run's own, {stored.device}",
            allowed="--images for the outputs of a device; the artifacts here run over all images",
            do="Name the devices, or leave --images out",
        )
    if away and stored.eval == NONE:
        raise UsageError(
            f"{run_dir} has no evaluation images (--eval none): there is nothing to compare on",
            allowed="a run folder with evaluation images",
            do="Run it again with --eval",
        )
    here = len(away) < len(places) or not places
    steps = Steps(bench=False, choose=False, here=here, places=away)
    if images is not None:
        steps = replace(steps, images=images)
    asked = Asked(here=here, places=away, what="parity")
    _conclude(_execute(stored, run_dir, steps), run_dir, asked)


@app.command()
def bench(
    run_dir: RunDir,
    device: Devices = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads while measuring.")] = None,
    inventory: Inventory = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what was measured before.")
    ] = False,
) -> None:
    """Measure the latency of a run folder's artifacts; a device's rows join the report."""
    from pipeline.recipe import load_recipe
    from pipeline.records import Place
    from pipeline.results import Asked
    from pipeline.run import Steps

    stored = recipe_of(run_dir)
    own = Place(device=stored.device, threads=stored.threads)
    places = _places(device, threads, inventory)
    changes: dict[str, Any] = {"bench": True}
    if not places and threads is not None:
        changes["threads"] = threads
    settings = load_recipe(None, {**stored.model_dump(exclude_none=True), **changes})
    away = tuple(place for place in places if place != own)
    here = not places or own in places
    steps = Steps(verify=False, choose=False, here=here, places=away, again=again)
    asked = Asked(here=steps.here, places=away)
    _conclude(_execute(settings, run_dir, steps), run_dir, asked)


@app.command()
def tune(
    run_dir: RunDir,
    effort: Annotated[
        str, typer.Option(help="quick, or full: all placements, with integers chosen anew.")
    ] = "quick",
    device: Annotated[str | None, typer.Option(help="Where candidates are measured.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads while measuring.")] = None,
) -> None:
    """Choose each runtime's graph form and placement by measurement; export and measure those."""
    from pipeline.errors import UsageError
    from pipeline.recipe import load_recipe
    from pipeline.run import Steps

    if effort not in {"quick", "full"}:
        raise UsageError(f"--effort is {effort!r}", allowed="quick, full", do="Correct --effort")
    flags = {"tune": effort, "device": device, "threads": threads, "bench": True}
    stored = recipe_of(run_dir)
    settings = load_recipe(None, stored.model_dump(exclude_none=True), flags)
    _require_usable(settings.device)
    _conclude(_execute(settings, run_dir, Steps()), run_dir)


# --- shared -------------------------------------------------------------------------------------


def _recipe(path: Path | None, flags: dict[str, Any], added_to: Path | None) -> Recipe:
    """Return what flags and a recipe ask for; `added_to` is a folder whose runtimes stay."""
    from pipeline import run
    from pipeline.recipe import load_recipe

    # Without a checkpoint the embedded recipe is what the flags are laid over.
    embedded = path is None and flags["checkpoint"] is None
    plain = words.with_places(load_recipe(run.EMBEDDED_RECIPE if embedded else path, flags))
    if plain.gate is not None and path is not None:
        _with_known_runtimes(plain.gate, path)
    settings = plain
    if added_to is not None:
        given = {name for name, value in flags.items() if value is not None}
        settings = run.added_to(added_to, plain, given)
    if embedded and flags["gate"] is None and _limits(settings) == _limits(plain):
        settings = _asking_less(settings.model_copy(update={"gate": plain.gate}))
    return settings


def _limits(settings: Recipe) -> Budget | None:
    """Return what the gate asks, whatever it requires."""
    return settings.gate and settings.gate.model_copy(update={"require": ()})


def _asking_less(settings: Recipe) -> Recipe:
    """Let the embedded budget require only what is asked for: fewer runtimes are no failure."""
    from pipeline.recipe import NONE

    if settings.eval == NONE:
        return settings.model_copy(update={"gate": None})
    assert settings.gate is not None, "the embedded recipe has a budget"
    left = tuple(name for name in settings.gate.require if name in settings.runtimes)
    return settings.model_copy(update={"gate": settings.gate.model_copy(update={"require": left})})


def _require_usable(name: str) -> None:
    """Refuse to choose on a device that is away: what was chosen before would be lost."""
    from pipeline.errors import DeviceError, got_of
    from targets import base

    info = base.device(name).probe()
    if isinstance(info, base.NotRun):
        raise DeviceError(
            f"nothing can be measured on {name}: {got_of(info.reason)}",
            allowed="a device that `convnext-edge devices` finds usable",
            do="Make it reachable, or name another --device",
        )


def _places(
    words_: list[str] | None, threads: int | None, inventory: Path | None
) -> tuple[Place, ...]:
    from pipeline.errors import UsageError
    from pipeline.inventory import NOTHING, places_of, read_inventory

    if inventory and not words_:
        raise UsageError(
            f"--inventory {inventory} without --device",
            allowed="--device NAME of the inventory, or --device all",
            do="Name the devices",
        )
    return places_of(words_ or (), threads, read_inventory(inventory) if inventory else NOTHING)


def recipe_of(run_dir: Path) -> Recipe:
    """Return the recipe that a run folder was made from."""
    from pipeline.run import stored_recipe

    return stored_recipe(run_dir)


def budget_of(path: Path | None) -> Budget | None:
    """Read a budget, where one is given."""
    from pipeline.recipe import load_budget

    return _with_known_runtimes(load_budget(path), path) if path is not None else None


def _with_known_runtimes(budget: Budget, place: Path) -> Budget:
    """Return a budget that requires no runtime that there is not."""
    from pipeline.errors import UsageError
    from targets import base

    for name in budget.require:
        if name not in base.runtimes():
            raise UsageError(
                f"{place} requires a runtime {name!r}",
                allowed=", ".join(base.runtimes()),
                do="Correct require",
            )
    return budget


def _execute(settings: Recipe, out: Path, steps: Any) -> Finished:
    from pipeline.run import execute

    try:
        with new_display() as display:
            return execute(settings, out, steps, display)
    except KeyboardInterrupt:
        err_console.print("interrupted: finished stages are kept, the same command resumes")
        raise typer.Exit(INTERRUPTED) from None


def new_display() -> Any:
    """Return what shows a run, on standard error."""
    from pipeline.display import Display

    return Display(err_console)


def _conclude(finished: Finished, out: Path, asked: Asked | None = None) -> None:
    """Print what a run gave; exit with 1 where something failed or a device was not there."""
    out_console.print(
        f"{len(finished.made)} stages made, {len(finished.reused)} reused", highlight=False
    )
    report = finished.report
    if report is None:
        out_console.print(f"model: {out / 'model'}", soft_wrap=True, highlight=False)
        says = (
            "next: `convnext-edge run` or `export` with the same options and --out goes on from it"
        )
        out_console.print(f"  {says}", soft_wrap=True, highlight=False, markup=False)
        return
    from pipeline.results import Asked, print_results, unreached

    asked = asked or Asked()
    print_results(report, out, out_console, asked)
    print_gate(report.gate)
    failures = (*finished.failures, *unreached(report, asked))
    if failures:
        for reason in failures:
            err_console.print(f"failed: {reason}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1)


def print_gate(judged: Gate) -> None:
    """Print what did not pass, and the gate's word."""
    from reports.summary import NOTHING_JUDGED

    if not judged.checks:
        out_console.print(f"  {NOTHING_JUDGED}", soft_wrap=True, highlight=False)
    for check in judged.checks:
        if check.outcome != "pass":
            out_console.print(
                f"  {check.outcome}: {check.name}: {check.why}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
    missing = sum(check.outcome == "not_run" for check in judged.checks)
    beside = f", {missing} of {len(judged.checks)} checks not run" if missing else ""
    out_console.print(f"gate: {judged.outcome}{beside}", highlight=False)
