"""A site's grid is the one that disturbs its reader least, on images it was not made from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calib.choose import Seen, choose, choose_stream
from calib.equalize import rescaling, stream_candidates, widths
from calib.grid import Rescaling, SiteGrid
from calib.observers import ChannelRange
from calib.probe import Behind, FunctionReader, LayerReader
from pipeline.arithmetic import activation_quantization, weight_grid
from pipeline.records import Calibration, Range

CHANNELS = 16


def tensor(outliers: float, images: int = 64) -> torch.Tensor:
    """A site's tensor of images whose channels lie off zero; two of them are much wider."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, CHANNELS, 8, 8, generator=generator)
    x += torch.linspace(-1, 1, CHANNELS)[:, None, None]
    x[:, :2] *= outliers
    return x


def seen(x: torch.Tensor) -> Seen:
    torch.manual_seed(0)
    layer = nn.Linear(CHANNELS, 8)
    # What reads an outlier channel weighs it down, as trained networks do.
    with torch.no_grad():
        layer.weight /= x.movedim(1, 0).flatten(1).std(dim=1)
    grid = weight_grid((8, CHANNELS), "full", depthwise=False)
    reader = LayerReader(
        layer=layer, grid=grid, behind=Behind(function=nn.Identity(), weight=torch.ones(8))
    )
    rows = x.movedim(1, 0).flatten(1)
    channels = ChannelRange(minimum=rows.amin(dim=1), maximum=rows.amax(dim=1))
    return Seen(x=x, channels=channels, reader=reader)


def test_outlier_channels_are_rescaled_and_no_longer_matter() -> None:
    with torch.no_grad():
        _, plain = choose(seen(tensor(1.0)), Calibration(), 8, free="shift")
        grid, outliers = choose(seen(tensor(100.0)), Calibration(), 8, free="shift")
    assert outliers.plain_sqnr_db < plain.plain_sqnr_db - 15
    assert outliers.sqnr_db > plain.sqnr_db - 1.5
    assert outliers.strength >= 0.75
    assert outliers.spread_after < 0.1 * outliers.spread_before
    assert float(grid.rescaling.scale[:2].mean() / grid.rescaling.scale[2:].mean()) > 30


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse", "entropy"])
def test_without_a_search_nothing_is_rescaled(method: str) -> None:
    with torch.no_grad():
        grid, found = choose(
            seen(tensor(100.0)),
            Calibration(method=method),  # type: ignore[arg-type]
            8,
            free="shift",
        )
    assert grid.rescaling.changes_nothing
    assert found.range_method == method
    assert found.strength == 0


def test_what_lies_outside_the_grid_is_what_is_clipped() -> None:
    x = 5 + 5 * torch.rand(64, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, found = choose(seen(x), Calibration(method="min-max"), 8, free="none")
    # The grid begins at 0, whatever the range.
    assert found.clipped == 0


def test_a_site_that_must_not_be_rescaled_is_not() -> None:
    with torch.no_grad():
        grid, found = choose(seen(tensor(100.0)), Calibration(), 8, free="none")
    assert grid.rescaling.changes_nothing
    assert found.sqnr_db >= found.plain_sqnr_db


def test_a_search_is_never_worse_than_the_plain_grid_it_starts_from() -> None:
    for outliers in (1.0, 3.0, 30.0):
        with torch.no_grad():
            _, found = choose(seen(tensor(outliers)), Calibration(), 8, free="scale")
        assert found.sqnr_db >= found.plain_sqnr_db - 0.5


def test_a_stream_takes_one_rescaling_for_all_its_sites() -> None:
    x = tensor(50.0)
    rows = x.movedim(1, 0).flatten(1)
    channels = ChannelRange(minimum=rows.amin(dim=1), maximum=rows.amax(dim=1))
    behind = Behind(function=nn.Identity(), weight=1 / rows.std(dim=1))
    sites = [Seen(x=x * f, channels=channels, reader=FunctionReader(behind=behind)) for f in (1, 1)]
    with torch.no_grad():
        best = choose_stream(sites, 8)
    assert best.strength > 0.5
    assert not best.shift.any()
    assert stream_candidates([channels])[0].changes_nothing


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("strength", [0.25, 0.75, 1.0])
def test_a_rescaling_undoes_itself_in_float64(strength: float, *, shifts: bool) -> None:
    x = tensor(100.0).double()
    rows = x.movedim(1, 0).flatten(1)
    channels = ChannelRange(minimum=rows.amin(dim=1), maximum=rows.amax(dim=1))
    for kind in widths(x, channels, shifts=shifts):
        by = rescaling(kind, strength)
        assert bool(by.shift.any()) == shifts
        assert float((by.undo(by.apply(x)) - x).abs().max()) < 1e-12 * float(x.abs().max())
        assert float(by.scale.log().mean()) == pytest.approx(0, abs=1e-9)


def test_a_dead_channel_gets_a_finite_scale() -> None:
    x = tensor(10.0)
    x[:, 5] = 0.0
    rows = x.movedim(1, 0).flatten(1)
    channels = ChannelRange(minimum=rows.amin(dim=1), maximum=rows.amax(dim=1))
    for kind in widths(x, channels, shifts=True):
        scale = rescaling(kind, 1.0).scale
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


def test_the_grid_is_the_contracts_arithmetic_in_rescaled_units() -> None:
    x = torch.tensor([[[[3.0]], [[40.0]]]])
    by = Rescaling(shift=torch.tensor([1.0, 0.0]), scale=torch.tensor([1.0, 10.0]), strength=1.0)
    parameters = activation_quantization(Range(minimum=0.0, maximum=255.0))
    assert SiteGrid(parameters=parameters, rescaling=by)(x).flatten().tolist() == [3.0, 40.0]
    moved = SiteGrid(parameters=parameters, rescaling=by)(x + 0.4).flatten()
    # Steps of 1 in rescaled units: of 1 in the first channel, of 10 in the second.
    assert moved.tolist() == [3.0, 40.0]
