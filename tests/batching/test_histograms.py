"""Counting under `vmap`, in cases that PyTorch's samples leave out."""

from __future__ import annotations

import pytest
import torch

from lamina import vmap
from lamina_core.errors import DataDependentError
from tests.batching.stacking import assert_stacked

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def numbers(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ends", [(0, 0), (-1, 1), (0.5, 0.5)])
def test_histc(dtype, ends):
    assert_stacked(lambda x: torch.histc(x, 10, *ends), numbers(3, 500, dtype=dtype))


def test_histc_of_one_value_and_of_none():
    assert_stacked(lambda x: torch.histc(x, 4), torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
    assert_stacked(lambda x: torch.histc(x, 4), torch.zeros(2, 0))


def test_histc_leaves_out_what_is_no_number():
    x = torch.tensor([[0.1, float("nan"), 1.0], [float("inf"), 0.5, 0.0]])
    assert_stacked(lambda x: torch.histc(x, 4, 0, 1), x)
    with pytest.raises(RuntimeError, match="not finite"):
        vmap(lambda x: torch.histc(x, 4))(x)


def test_half_precision_counts_beyond_2048():
    x = torch.zeros(2, 5000, dtype=torch.float16)
    assert vmap(lambda x: torch.histc(x, 2, -1, 1))(x).tolist() == [[0, 5000], [0, 5000]]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("density", [False, True])
def test_histogram(dtype, density):
    x, weight = numbers(3, 500, dtype=dtype), numbers(3, 500, seed=1, dtype=dtype).abs()
    assert_stacked(lambda x, w: tuple(torch.histogram(x, 7, weight=w, density=density)), x, weight)
    assert_stacked(lambda x: tuple(torch.histogram(x, 7, range=(-1, 1), density=density)), x)
    edges = numbers(3, 8, seed=2, dtype=dtype).sort(-1).values
    assert_stacked(lambda x, e: tuple(torch.histogram(x, e, density=density)), x, edges)
    assert_stacked(lambda e: tuple(torch.histogram(x[0], e, density=density)), edges)


def test_the_edges_of_a_given_range_are_shared():
    _, edges = vmap(lambda x: tuple(torch.histogram(x, 4, range=(0, 1))), out_dims=(0, None))(
        torch.rand(3, 5)
    )
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_histogramdd():
    x, weight = numbers(3, 50, 2), numbers(3, 50, seed=1).abs()
    assert_stacked(lambda x, w: torch.histogramdd(x, [3, 4], weight=w, density=True), x, weight)
    assert_stacked(lambda x: torch.histogramdd(x, [3, 4], range=[-1.0, 1.0, -2.0, 2.0]), x)
    edges = numbers(3, 5, seed=2).sort(-1).values
    assert_stacked(lambda x, e: torch.histogramdd(x, (e, e * 2)), x, edges)


class TestBincount:
    def test_below_minlength(self):
        x = torch.tensor([[0, 3, 1], [0, 0, 0]])
        assert_stacked(lambda x: torch.bincount(x, minlength=5), x)
        assert_stacked(lambda x, w: torch.bincount(x, w, minlength=5), x, numbers(2, 3))
        weight = numbers(2, 3, dtype=torch.float32)
        assert_stacked(lambda w: torch.bincount(x[0], w, minlength=5), weight)

    def test_below_minlength_at_two_levels(self):
        x = torch.tensor([[[0, 3], [1, 1]], [[2, 2], [0, 0]], [[0, 1], [3, 3]]])
        out = vmap(vmap(lambda x: torch.bincount(x, minlength=4)))(x)
        assert torch.equal(out, (x.unsqueeze(-1) == torch.arange(4)).sum(2))

    def test_examples_that_agree(self):
        assert_stacked(torch.bincount, torch.tensor([[0, 2], [2, 1]]))
        assert_stacked(lambda x: torch.bincount(x, minlength=1), torch.tensor([[0, 2], [2, 1]]))

    def test_examples_that_do_not(self):
        with pytest.raises(DataDependentError, match="minlength above every number"):
            vmap(lambda x: torch.bincount(x, minlength=3))(torch.tensor([[0, 1], [3, 1]]))

    def test_a_negative_number_reaches_into_no_other_example(self):
        with pytest.raises(RuntimeError, match="out of bounds"):
            vmap(lambda x: torch.bincount(x, minlength=3))(torch.tensor([[0, 1], [-1, 1]]))

    def test_without_numbers_or_examples(self):
        assert_stacked(lambda x: torch.bincount(x, minlength=2), torch.zeros(2, 0, dtype=torch.int))
        none = torch.zeros(0, 3, dtype=torch.int64)
        assert vmap(lambda x: torch.bincount(x, minlength=2))(none).shape == (0, 2)
