"""Every command of benchmarks/ that a page shows is one that its program takes."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))
COMMAND = r"(?:\w+=\S+ )*python (?:-P )?benchmarks/(\w+)\.py"
SHOWN = re.compile(rf"^ {{4}}{COMMAND}(.*)$|`{COMMAND}([^`]*)`", re.MULTILINE)
"""A line that is indented, or what stands between backticks."""


def commands() -> Iterator[tuple[str, str, str]]:
    for page in (*PAGES, *PROGRAMS):
        for found in SHOWN.finditer(page.read_text().replace("\\\n", "")):
            program, words = (one for one in found.groups() if one is not None)
            yield page.name, program, words


COMMANDS = list(commands())


class ParsedError(Exception):
    """Raised in the place of a measurement."""


def test_the_commands_are_found() -> None:
    runnable = {one.stem for one in PROGRAMS if "def main(" in one.read_text()}
    assert {program for _, program, _ in COMMANDS} == runnable
    assert {page for page, _, _ in COMMANDS} >= {"latency.md", "accuracy.md", "gpu.md"}


@pytest.mark.parametrize(
    ("program", "words"),
    [(program, words) for _, program, words in COMMANDS],
    ids=[f"{page}-{program}" for page, program, _ in COMMANDS],
)
def test_a_documented_command_is_understood(
    program: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    monkeypatch.setattr(sys, "argv", [program, *shlex.split(words, comments=True)])
    with pytest.raises(ParsedError):
        import_module(f"benchmarks.{program}").main()
