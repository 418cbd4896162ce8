"""What the words of a client that reaches devices mean for a person.

In: what `ssh` or `adb` said, and a table of `Meaning`s. Out: the error to raise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import DeviceError
from targets.devices._workspace import LostLinkError

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What some words of a client mean; `{said}` is its line with them, other names are given.

    Attributes:
        words: One of them is said.
        got: Of the error, as `allowed` and `do`.
        lost: Whether the link was there and may come back.
    """

    words: tuple[str, ...]
    got: str
    allowed: str
    do: str
    lost: bool = False

    def is_in(self, text: str) -> bool:
        """Return whether a text has any of the words."""
        return any(words in text for words in self.words)


def explained(text: str, known: Iterable[Meaning], otherwise: Meaning, **given: str) -> DeviceError:
    """Return the error that a client's own words mean.

    Args:
        text: All that it said.
        known: What it may mean; the first that fits is taken.
        otherwise: What it means where none fits.
        given: Names that the meanings use.
    """
    meant = next((one for one in known if one.is_in(text)), otherwise)
    lines = text.strip().splitlines() or ["nothing is said why"]
    said = next((line for line in lines if meant.is_in(line)), lines[-1]).rstrip(".")
    got, allowed, do = (
        part.format(said=said, **given) for part in (meant.got, meant.allowed, meant.do)
    )
    kind = LostLinkError if meant.lost else DeviceError
    return kind(got, allowed=allowed, do=do)
