"""Sessions: everything a person or CI does with this repository.

All sessions share ONE environment (it weighs 4 GB): the one that nox itself was installed in. What
constraints.txt and pyproject.toml say is installed into it when either has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
RUNS = ROOT / "runs"
SHARED_DATA = ROOT.parent / "shared" / "data"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LINKS = {"sshd": "openssh-server", "adb": "adb", "mksh": "mksh", "toybox": "toybox"}
"""Commands to Debian's packages."""
MOST_WORKERS = 4
"""Processes that test: each may take 3 GB."""
EMULATED = tuple(
    ROOT / "tests" / "acceptance" / f"test_{name}.py" for name in ("emulated_arm64", "adb")
)
FORMATS = ("onnx", "openvino", "tflite", "coreml")


def _install(session: nox.Session) -> None:
    """Install the project with everything it can use, unless that was done already."""
    if sys.prefix == sys.base_prefix:
        session.error(
            "nox must be installed in a virtual environment: "
            "python3 -m venv .venv && .venv/bin/pip install nox && .venv/bin/nox"
        )
    wanted = hashlib.sha256(
        b"".join((ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml"))
    ).hexdigest()
    stamp = Path(sys.prefix) / "convnext-edge.installed"
    if stamp.is_file() and stamp.read_text() == f"{wanted} {ROOT}":
        return
    _python(
        session,
        "-m",
        "pip",
        "install",
        "--constraint",
        "constraints.txt",
        "--editable",
        ".[all,dev]",
    )
    stamp.write_text(f"{wanted} {ROOT}")


def _python(session: nox.Session, *arguments: str) -> None:
    session.run(sys.executable, *arguments, external=True)


def _pytest(session: nox.Session, *arguments: str) -> None:
    """Run tests, on every core one process with one thread; `-- -n 0 -s` runs and prints all here.

    A class of tests, or a file of functions, stays together: it may share what is expensive.
    """
    workers = str(min(MOST_WORKERS, os.cpu_count() or 1))
    words = ("-m", "pytest", "-n", workers, "--dist", "loadscope", *arguments, *session.posargs)
    session.run(sys.executable, *words, external=True, env={"OMP_NUM_THREADS": "1"})


def _cli(session: nox.Session, *arguments: str) -> None:
    _install(session)
    _python(session, "-P", "-m", "pipeline.cli", *arguments)


def _browser(session: nox.Session) -> None:
    """Have a browser for the test that looks at the report page."""
    if not any(shutil.which(name) for name in BROWSERS):
        _debian(session, ["chromium"], "the page is not looked at in a browser")


def _links(session: nox.Session) -> None:
    """Have what devices over a link are tested with; mksh and toybox are what Android has."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    packages = [name for command, name in LINKS.items() if not shutil.which(command, path=path)]
    if packages:
        _debian(session, packages, "devices over SSH or adb are not tested in full")


def _emulator(session: nox.Session) -> None:
    """Have what emulated ARM64 boards need."""
    if not all(shutil.which(name) for name in ("qemu-aarch64", "mmdebstrap", "gcc")):
        packages = ["qemu-user", "mmdebstrap", "gcc", "libc6-dev"]
        _debian(session, packages, "the tests of emulated ARM64 fail")


def _debian(session: nox.Session, packages: list[str], otherwise: str) -> None:
    """Install packages of Debian's, where that is possible."""
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        session.run("apt-get", "update", external=True)
        session.run("apt-get", "install", "--yes", *packages, external=True)
    else:
        session.warn(f"no {' '.join(packages)} here: install it, or {otherwise}")


def _run_folder(session: nox.Session) -> tuple[str, ...]:
    """Return the arguments after `--`; where they name no folder, the demo's, made if missing."""
    words = tuple(session.posargs)
    if words and not words[0].startswith("-"):
        return words
    folder = RUNS / "demo"
    if not (folder / "report.json").is_file():
        _cli(session, "run", "--out", str(folder))
    return (str(folder), *words)


@nox.session
def demo(session: nox.Session) -> None:
    """Do the main job on the embedded default: artifacts for four runtimes, a report, the gate."""
    _cli(session, "run", "--out", str(RUNS / "demo"), *session.posargs)


@nox.session
def finetune(session: nox.Session) -> None:
    """Train the demo's integers on to 4-bit weights, or do what follows `--`."""
    if session.posargs:
        _cli(session, "finetune", *session.posargs)
        return
    words = ("--scheme", "w4a8", "--epochs", "10", "--crop", "0.9", "--flip", "0")
    _cli(session, "finetune", *_run_folder(session), *words, "--out", str(RUNS / "finetune"))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests that need nothing but this repository."""
    _install(session)
    _browser(session)
    _links(session)
    _pytest(session, "-m", "not acceptance")


@nox.session
def acceptance(session: nox.Session) -> None:
    """Run the tests that need ../shared/data, which an outsider does not have."""
    _install(session)
    if not SHARED_DATA.is_dir():
        session.error(f"{SHARED_DATA} is not here: these tests cannot run")
    _emulator(session)
    _links(session)
    _pytest(session, "-m", "acceptance")


@nox.session
def emulated(session: nox.Session) -> None:
    """Run the tests of emulated ARM64 boards, which need Debian's archive and PyPI."""
    _install(session)
    _emulator(session)
    _links(session)
    _pytest(session, "-m", "acceptance", *map(str, EMULATED))


@nox.session
def lint(session: nox.Session) -> None:
    """Check form (ruff) and types (mypy strict)."""
    _install(session)
    _python(session, "-m", "ruff", "check", ".")
    _python(session, "-m", "ruff", "format", "--check", ".")
    _python(session, "-m", "mypy")


@nox.session(name="train-reference")
def train_reference(session: nox.Session) -> None:
    """Train the embedded reference model again and write its checkpoint, sidecar and log."""
    _install(session)
    _python(session, "-P", "-m", "pipeline.embedded.train", *session.posargs)


def _export(name: str) -> None:
    def export(session: nox.Session) -> None:
        out = () if "--out" in session.posargs else ("--out", str(RUNS / f"export-{name}"))
        _cli(session, "export", "--runtimes", name, *out, *session.posargs)

    export.__doc__ = f"Export to {name}: the embedded reference model, or what follows `--`."
    nox.session(name=f"export-{name}")(export)


for _name in FORMATS:
    _export(_name)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the latency of a run folder's artifacts (the demo's, or what follows `--`)."""
    _cli(session, "bench", *_run_folder(session))


@nox.session
def report(session: nox.Session) -> None:
    """Write a run folder's pages again (the demo's, or what follows `--`)."""
    _cli(session, "report", *_run_folder(session))


@nox.session
def gate(session: nox.Session) -> None:
    """Judge a run folder (the demo's, or what follows `--`)."""
    _cli(session, "gate", *_run_folder(session))
