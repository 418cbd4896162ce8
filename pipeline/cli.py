"""The command line; thin.

In: words. Out: a run folder, tables, and an exit code: 0 done (for `gate`: pass), 1 an error,
2 usage, 3 gate fail, 4 gate inconclusive, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
from importlib.metadata import version
from pathlib import Path  # noqa: TC003 - typer reads the annotations when it runs
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from pipeline import words
from pipeline.cli_devices import devices_app
from pipeline.cli_run import (
    INTERRUPTED,
    TERMINATED,
    RunDir,
    app,
    budget_of,
    err_console,
    new_display,
    out_console,
    print_gate,
    recipe_of,
)
from pipeline.errors import EdgeError, OutputError, UsageError
from pipeline.records import to_json

GATE_EXIT = {"pass": 0, "fail": 3, "inconclusive": 4, "not_run": 4}
PLACE_LENGTH = 200

app.add_typer(devices_app, name="devices")

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def main() -> None:
    """Run the command line; one line and an exit code for whatever a user can cause."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # As Ctrl-C: workers are ended, and nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        _check_words()
        _run_or_serve()
        if sys.stdout is not None:  # it may have been closed from the start
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as error:
        if error.code == TERMINATED:
            err_console.print("terminated: finished stages are kept, the same command resumes")
        raise
    except EdgeError as error:
        _fail(error)
    except OSError as error:  # what the system refuses at a place that no one foresaw
        # Standard output may be what is full: nothing more goes there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        output = {errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF}
        unnamed = "standard output" if error.errno in output else "what the system gives"
        place = str(error.filename or unnamed)
        _fail(
            OutputError(
                f"cannot use {place[:PLACE_LENGTH]} ({error.strerror or error})",
                allowed="files and folders that this user may use, on a disk with room",
                do="Correct the path or free some space",
            )
        )


def _fail(error: EdgeError) -> NoReturn:
    _print_error(error)
    sys.exit(error.exit_code)


def _print_error(error: EdgeError) -> None:
    err_console.print(f"[bold red]error:[/] {_escape(error)}", soft_wrap=True, highlight=False)


def _check_words() -> None:
    for word in sys.argv[1:]:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the argument {word!r} is not UTF-8", allowed="names in UTF-8", do="Rename it"
            ) from error


def _run_or_serve() -> None:
    from pipeline.distributed import rank, release, serve

    if rank() > 0:
        # Another process of the same torchrun leads; this one takes part in what it announces.
        try:
            serve()
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)  # rank 0 says so
        return
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        err_console.print("aborted")
        sys.exit(1)
    except TyperException as error:
        if len(sys.argv) == 1:  # typer has printed the help, or has it as its message
            err_console.print(error.format_message(), soft_wrap=True, markup=False)
            sys.exit(error.exit_code)
        raise _of_words(error.format_message()) from error
    finally:
        release()
    if code:
        sys.exit(code)


def _of_words(said: str) -> UsageError:
    """Return what to say of words that the command line does not know."""
    command = " ".join(word for word in ["convnext-edge", *sys.argv[1:2]] if word[:1] != "-")
    if said.startswith(f"No such command '{sys.argv[1]}'"):
        command = "convnext-edge"
    guess = re.fullmatch(r"(.+)\. Did you mean (.+)\?", said)
    got = f"{guess[1]} (did you mean {guess[2]}?)" if guess else said.rstrip(".")
    return UsageError(got, allowed=f"what `{command} --help` lists", do="Correct the command")


def _escape(error: EdgeError) -> str:
    from rich.markup import escape

    return escape(str(error))


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if asked:
        out_console.print(f"convnext-edge {version('convnext-edge')}", highlight=False)
        raise typer.Exit


@app.callback()
def about(
    asked: Annotated[
        bool,
        typer.Option("--version", help="Tell the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Take a ConvNeXt image classifier to ONNX, OpenVINO, TFLite and CoreML, quantized."""


# --- judging and looking ----------------------------------------------------------------------


@app.command()
def report(run_dir: RunDir) -> None:
    """Write a run folder's pages again from its report.json."""
    from pipeline.conclude import PAGES, write_pages_of

    with new_display() as display:
        write_pages_of(run_dir, display)
    out_console.print(f"{run_dir / PAGES / 'index.html'}", soft_wrap=True, highlight=False)


@app.command()
def gate(
    run_dir: RunDir,
    budget: Annotated[
        Path | None, typer.Option(help="TOML budget; left out: the run's own.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Accepted report; left out: convnext-edge-baseline.json if there."),
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Store this run as the new baseline.")
    ] = False,
) -> None:
    """Judge a run folder by a budget: exit code 0 pass, 3 fail, 4 inconclusive or not run."""
    from pipeline.conclude import accept_baseline, judge_again

    settings = recipe_of(run_dir)
    asked = settings.budget(budget_of(budget))
    against = words.absolute(baseline) or settings.baseline
    if accept:
        place = accept_baseline(run_dir, against)
        out_console.print(f"accepted as baseline: {place}", soft_wrap=True, highlight=False)
        return
    if asked is None:
        raise UsageError(
            "no budget: the run had none and --budget is missing",
            allowed="a TOML file with limits such as max_drop_pp = 1.0",
            do="Give --budget FILE",
        )
    with new_display() as display:
        judged = judge_again(run_dir, asked, against, display)
    print_gate(judged)
    raise typer.Exit(GATE_EXIT[judged.outcome])


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="The earlier run folder.")],
    after: Annotated[Path, typer.Argument(help="The later one.")],
    clock: Annotated[str, typer.Option(help="wall or cpu.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Tell which artifacts became faster or slower between two run folders."""
    from dataclasses import asdict

    from reports.comparison import compare_runs, show

    if clock not in {"wall", "cpu"}:
        raise UsageError(f"--clock is {clock!r}", allowed="wall, cpu", do="Correct --clock")
    found = compare_runs(before, after, "cpu" if clock == "cpu" else "wall")
    if as_json:
        sys.stdout.write(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    else:
        show(found, out_console)


# --- looking ------------------------------------------------------------------------------------


@app.command()
def explain(
    place: Annotated[
        Path,
        typer.Argument(help="A run folder; with --latency an artifact in it."),
    ],
    latency: Annotated[
        bool, typer.Option("--latency", help="Where an artifact's time goes.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="With --latency: `local`, a set of this CPU's, `cpu:avx2`, or `coreml:UNITS`."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what the calibration chose at every site, or where an artifact's time goes."""
    from pipeline.explain import explain as collect
    from pipeline.explain import explain_latency, show, show_latency

    if latency:
        found = explain_latency(place, "local" if device is None else device)
        if as_json:
            sys.stdout.write(to_json(found).decode() + "\n")
        else:
            show_latency(found, out_console)
        return
    if device is not None:
        raise UsageError(
            "--device says where an artifact's time goes",
            allowed="with --latency ARTIFACT",
            do="Add --latency, or leave --device out",
        )
    facts = collect(place)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        show(facts, out_console)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A file, an index, a folder, or hf:...")],
    input_size: Annotated[
        int | None, typer.Option(help="Side of the image, pixels; left out: the sidecar's.")
    ] = None,
    weights: Annotated[str, typer.Option(help="auto (EMA first), ema or model.")] = "auto",
    as_json: Json = False,
) -> None:
    """Tell what a checkpoint holds."""
    from pipeline.inspect import describe, show

    facts = describe(checkpoint, input_size, weights=words.weights_word(weights))
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        show(facts, out_console)


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="A file, an index, a folder, or hf:...")],
    to: Annotated[str, typer.Option(help="meta, timm, torchvision, hf or own.")],
    out: Annotated[
        Path, typer.Option(help="A .safetensors, .pth, .pt or .bin file; for hf a folder too.")
    ],
    weights: Annotated[str, typer.Option(help="auto (EMA first), ema or model.")] = "auto",
) -> None:
    """Write a checkpoint in another project's names, values bit for bit."""
    from pipeline.convert import convert as write

    for lost in write(checkpoint, to, out, weights=words.weights_word(weights)):
        err_console.print(f"note: {lost}", soft_wrap=True, highlight=False, markup=False)
    out_console.print(f"{out}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def predict(
    artifact: Annotated[Path, typer.Argument(help="An exported artifact.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 3,
    as_json: Json = False,
) -> None:
    """Classify images through the artifact's own runtime."""
    from pipeline.predict import classify, show

    predictions, refused = classify(artifact, images, top)
    if as_json:
        sys.stdout.write(json.dumps(predictions, indent=2) + "\n")
    elif predictions:
        show(predictions, out_console)
    for error in refused[:-1]:
        _print_error(error)
    if refused:
        raise refused[-1]


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what can run on this machine and what to install."""
    from pipeline.doctor import examine, show

    facts = examine()
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        show(facts, out_console)


if __name__ == "__main__":
    main()
