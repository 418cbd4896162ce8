"""Which sites of a calibration a person should look at first, and what to say of them.

In: a report's `Calibration`. Out: its sites worst first, the few that stand out, and sentences.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reports.document import Calibration, Site

MARGIN_DB = 6.0
"""How far below the median site's SQNR a site stands out."""
MOST = 5
"""Sites that are marked and named; of more than that none would stand out."""
NO_IMAGES = "none"
"""Where synthetic images come from."""
ALIKE_DB = 0.05
"""Differences below this are none when they are written down."""


def median_db(sites: Sequence[Site]) -> float:
    """Return the SQNR of the site in the middle."""
    return statistics.median(site.sqnr_db for site in sites)


def worst_first(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return the sites by their SQNR; equal ones stay in network order."""
    return tuple(sorted(sites, key=lambda site: site.sqnr_db))


def low(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return every site that stands out, worst first."""
    limit = median_db(sites) - MARGIN_DB
    return tuple(site for site in worst_first(sites) if site.sqnr_db < limit)


def culprits(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return the sites to be named, worst first: `MOST` of the low ones, at least the worst."""
    return low(sites)[:MOST] or worst_first(sites)[:1]


def gain_db(site: Site) -> float:
    """Return what the grid chosen at a site has over the plain one."""
    return site.sqnr_db - site.plain_sqnr_db


def most_helped(sites: Sequence[Site]) -> Site | None:
    """Return the site at which the plain grid would cost most, where that stands out at all."""
    best = max(sites, key=gain_db)
    return best if gain_db(best) > MARGIN_DB else None


def sentences(calibration: Calibration) -> tuple[str, ...]:
    """Say which site is worst, what was chosen there, and what the plain grid would cost."""
    sites = calibration.sites
    worst, others = worst_first(sites)[0], low(sites)[1:]
    said = [
        f"The worst of {len(sites)} sites is {worst.site} with {worst.sqnr_db:.1f} dB;"
        f" the median site has {median_db(sites):.1f} dB."
        if len(sites) > 1
        else f"The only site is {worst.site} with {worst.sqnr_db:.1f} dB.",
        f"Chosen there: {_chosen(worst)}; {_plain(worst)}.",
    ]
    if others:
        named = ", ".join(f"{site.site} ({site.sqnr_db:.1f} dB)" for site in others[: MOST - 1])
        more = len(others) - (MOST - 1)
        said.append(
            f"Also more than {MARGIN_DB:g} dB below the median: {named}"
            + (f" and {more} more." if more > 0 else ".")
        )
    elif len(sites) > 1 and worst in low(sites):
        said.append(f"No other site lies more than {MARGIN_DB:g} dB below the median.")
    elif len(sites) > 1:
        said.append(f"No site lies more than {MARGIN_DB:g} dB below the median.")
    if calibration.images == NO_IMAGES:
        said.append(
            "Calibrated on synthetic images: a few decibels less than with images of the task"
            " (docs/calibration.md has what it cost on two networks)."
        )
    helped = most_helped(sites)
    if helped is not None and helped != worst:
        said.append(
            f"The plain grid would cost most at {helped.site}: {helped.plain_sqnr_db:.1f} dB where"
            f" the one chosen has {helped.sqnr_db:.1f} dB."
        )
    return tuple(said)


def _chosen(site: Site) -> str:
    ends = f"from {site.minimum:.4g} to {site.maximum:.4g}"
    made = f"strength {site.strength:.2f}" if site.strength else "channels left as they are"
    return f"{site.range_method} range {ends}, {made}"


def _plain(site: Site) -> str:
    gain, has = gain_db(site), f"the plain min-max grid would have {site.plain_sqnr_db:.1f} dB"
    if abs(gain) < ALIKE_DB:
        return f"{has}, the same"
    return f"{has}, {abs(gain):.1f} dB {'less' if gain > 0 else 'more'}"
