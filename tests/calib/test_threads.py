"""Threads: the same results in the same order, gradients off, torch alone in each."""

from __future__ import annotations

import threading

import pytest
import torch

from calib.threads import side_by_side, together


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_whatever_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with side_by_side():
            assert torch.get_num_threads() == 1
            assert together(lambda n: n * n, list(range(20))) == [n * n for n in range(20)]
            with side_by_side():  # one inside another shares its threads
                assert together(str, [1, 2]) == ["1", "2"]
            assert together(str, [3, 4]) == ["3", "4"]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_pieces_run_at_the_same_time_and_without_gradients() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        both = threading.Barrier(2, timeout=20)
        weight = torch.ones(2, requires_grad=True)

        def piece(factor: int) -> torch.Tensor:
            both.wait()  # would never return if one waited for the other
            return weight * factor

        with side_by_side():
            found = together(piece, [1, 2])
    finally:
        torch.set_num_threads(before)
    assert not any(one.requires_grad for one in found)


def test_an_error_in_a_piece_is_raised_and_leaves_nothing_open() -> None:
    def fails(n: int) -> int:
        raise ValueError(str(n))

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="1"), side_by_side():
        together(fails, [1, 2])
    assert torch.get_num_threads() == before
    assert together(str, [5, 6]) == ["5", "6"]
