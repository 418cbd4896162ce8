"""In: what went wrong, what would have been right, what to do. Out: one line for a person.

Every error a user can cause is an `EdgeError`; the command line prints its one line and leaves with
its `exit_code`. Anything else that escapes is a bug of this project.
"""

from __future__ import annotations

from functools import partial
from typing import Any


def printable(text: str) -> str:
    """Return text from a file as a terminal may show it: what would steer it, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class EdgeError(Exception):
    """The root of this project's errors.

    Args:
        got: What was found, with the name and value concerned.
        allowed: What would have been accepted.
        do: The next thing a person can do about it.
    """

    exit_code = 1

    def __init__(self, got: str, *, allowed: str, do: str) -> None:
        super().__init__(got, allowed, do)
        self.got = got
        self.allowed = allowed
        self.do = do

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross a process boundary whole, though what it says is given by keyword."""
        return partial(type(self), self.got, allowed=self.allowed, do=self.do), ()

    def __str__(self) -> str:
        """Return the whole message as one line."""
        line = f"{self.got}. Allowed: {self.allowed}. {self.do}."
        return printable(" ".join(line.split()))


def got_of(line: str) -> str:
    """Return what was found of an error's line, for a line that says itself what is allowed."""
    return line.partition(". Allowed: ")[0]


class UsageError(EdgeError):
    """A wrong word on the command line or in a recipe (exit code 2)."""

    exit_code = 2


class CheckpointError(EdgeError):
    """A file that is not a ConvNeXt checkpoint this project can read."""


class DataError(EdgeError):
    """A data folder, archive or image that cannot be used."""


class OutputError(EdgeError):
    """A place that cannot be written."""


class MissingRuntimeError(EdgeError):
    """A runtime whose packages are not installed here."""


class ArtifactError(EdgeError):
    """An artifact that is damaged or was not made by this project."""


class DeviceError(EdgeError):
    """A device that cannot be reached, or does not do what it is asked."""


class TrainingError(EdgeError):
    """Training that cannot begin, or cannot go on; what it had learnt is kept."""


class WorkerError(EdgeError):
    """A worker process that died or answered out of turn."""
