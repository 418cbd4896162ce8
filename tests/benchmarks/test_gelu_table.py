"""What benchmarks/gelu_table.py holds beside each other is the same function."""

from __future__ import annotations

import numpy as np

from benchmarks.gelu_table import GELU, TABLE, inputs, models


def test_the_lookup_gives_the_integers_of_gelu() -> None:
    shape = (64, 32)
    runs, given = models(shape), inputs(shape)
    expected = runs[GELU](given[GELU])
    assert len(np.unique(expected)) > 50
    assert np.array_equal(runs[TABLE](given[TABLE]), expected)
