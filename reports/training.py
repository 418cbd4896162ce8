"""What to say of a training: what it gained, how it went, and its curves.

In: a report's `Training`. Out: sentences, settings, and a chart.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from reports.drawing import HEAT, INK, LINE, MUTED, SMALL, drawing, new_figure, to_svg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from pipeline.records import Accuracy, CurvePoint, Training

WIDE, HEIGHT = 620.0, 250.0
SMOOTH = 0.1
"""Share of a new point in the line drawn through the points of single batches."""


def sentences(training: Training) -> tuple[str, ...]:
    """Say what training gained on the evaluation images, what it saw and how long it took."""
    said = []
    before, after = training.before, training.after
    if before is not None and after is not None:
        said.append(_gain(before, after))
    else:
        said.append("Nothing was evaluated, so what training gained is not known.")
    epochs = training.settings.epochs
    passes = f"{epochs} time{'s' if epochs > 1 else ''}"
    text = (
        f"{training.n:,} images of {training.source}, seen {passes} in {training.updates:,}"
        f" updates, on {training.device}"
    )
    if training.processes > 1:
        text += f" in each of {training.processes} processes"
    text += f": {_duration(training.seconds)}"
    if training.resumed_at:
        text += f" from update {training.resumed_at:,} on, where an earlier process had come to"
    if training.images_per_second is not None:
        text += f", {training.images_per_second:,.0f} images a second"
    said.append(text + ".")
    last = training.curve[-1] if training.curve else None
    if last is not None and last.oscillating is not None:
        frozen = f", and {last.frozen:.1%} were frozen for it" if last.frozen else ""
        said.append(
            f"At the end {last.oscillating:.1%} of the weights swung between two integers{frozen}."
        )
    return tuple(said)


def _gain(before: Accuracy, after: Accuracy) -> str:
    first, last = (
        "no loss" if one.sqnr_db is None else f"{one.sqnr_db:.1f} dB" for one in (before, after)
    )
    text = f"Training took the reference's logits from {first} to {last}"
    if before.drop_ci95_pp is not None and after.drop_ci95_pp is not None:
        text += (
            f", and the upper end of its drop from {before.drop_ci95_pp[1]:.2f} to"
            f" {after.drop_ci95_pp[1]:.2f} points"
        )
    return f"{text}, on {after.n:,} evaluation images."


def settings(training: Training) -> tuple[tuple[str, str], ...]:
    """Return every setting by name, as a person writes it in a recipe."""
    flat: dict[str, Any] = {}
    for name, value in asdict(training.settings).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            flat[name] = value
    return tuple((name, "all" if value is None else f"{value}") for name, value in flat.items())


def draw_curves(training: Training) -> str:
    """Draw the logits' SQNR over the updates, and the learning rate below.

    Returns:
        An SVG: a faint line for single batches, a strong one for their running mean.
    """
    points = training.curve
    with drawing():
        figure = new_figure(HEIGHT, WIDE)
        upper = figure.add_axes((0.07, 0.42, 0.91, 0.5))
        lower = figure.add_axes((0.07, 0.12, 0.91, 0.2))
        steps = [point.step for point in points]
        values = [point.sqnr_db for point in points]
        upper.plot(steps, values, color=HEAT, lw=0.8, alpha=0.35)
        upper.plot(steps, smoothed(values), color=INK, lw=1.6)
        lower.plot(steps, [point.rate for point in points], color=HEAT, lw=1.2)
        for axes in (upper, lower):
            _plain(axes)
        upper.tick_params(labelbottom=False)
        lower.set_ylim(bottom=0)
        figure.text(0.0, 0.995, "SQNR of the logits, dB", color=MUTED, size=SMALL, va="top")
        figure.text(0.0, 0.35, "learning rate", color=MUTED, size=SMALL, va="bottom")
        figure.text(0.98, 0.0, "updates", color=MUTED, size=SMALL, ha="right", va="bottom")
        return to_svg(figure, "training")


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the running mean: as long as few values are in it, their plain mean."""
    found: list[float] = []
    for index, value in enumerate(values):
        share = max(SMOOTH, 1 / (index + 1))
        found.append(value if not found else found[-1] + share * (value - found[-1]))
    return found


def rows(training: Training, most: int = 12) -> tuple[CurvePoint, ...]:
    """Return points of the curve for a table, evenly drawn, the first and the last among them."""
    points = training.curve
    if len(points) <= most:
        return points
    return tuple(points[round(i * (len(points) - 1) / (most - 1))] for i in range(most))


def _plain(axes: Axes) -> None:
    axes.patch.set_visible(False)
    axes.grid(visible=True, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=MUTED)
    for side in axes.spines.values():
        side.set_visible(False)


def _duration(seconds: float) -> str:
    if seconds < 90:  # noqa: PLR2004 - seconds are read well up to here
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes"
