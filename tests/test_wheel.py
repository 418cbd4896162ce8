"""The wheel installs the four packages, and works in an environment with nothing else in it."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from pipeline.run import EMBEDDED
from pipeline.store import PACKAGES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (built,) = out.glob("*.whl")
    return built


def test_it_installs_exactly_the_four_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


def test_it_carries_the_model_the_templates_and_the_schema(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    embedded = {
        f"pipeline/embedded/{n}" for n in ("digits.safetensors", "digits.json", "recipe.toml")
    }
    assert embedded <= names
    assert {"reports/report.schema.json", "reports/templates/index.html.j2"} <= names
    assert zipfile.ZipFile(wheel).getinfo("pipeline/embedded/digits.safetensors").file_size < 2e6


def test_inspect_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    constraints = str(ROOT / "constraints.txt")
    install = [python, "-m", "pip", "install", "--quiet", "-c", constraints, str(wheel)]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [str(home / "bin" / "convnext-edge"), "inspect", str(EMBEDDED), "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"dialect": "own"' in done.stdout
    # No runtime is installed there: the message says which extra to install.
    refused = subprocess.run(
        [str(home / "bin" / "convnext-edge"), "export", "--runtimes", "tflite", "--out", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert refused.returncode == 1
    assert "[tflite]" in refused.stderr
    assert not (tmp_path / "x" / "artifacts").exists()
