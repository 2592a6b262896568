"""Results whose shape could depend on values: what is computed, and what raises."""

from __future__ import annotations

import pytest
import torch

from lamina import vmap
from lamina_core.errors import DataDependentError
from tests.batching.stacking import assert_stacked

X = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 4.0, 5.0]]])


@pytest.mark.parametrize("size", [0, 1, 3, 9])
@pytest.mark.parametrize("x", [X, X[:, 0], X[:, 0, 1], X[..., :0]], ids=["2d", "1d", "0d", "none"])
def test_nonzero_of_a_given_size(x, size):
    assert_stacked(lambda x: torch.nonzero_static(x, size=size, fill_value=-7), x)


def test_a_write_by_a_mask():
    def f(x, value):
        x = x.clone()
        x[x > 1] = value
        x[0, x[0] < 1] = -value
        x[:, torch.tensor([True, False, True])] += 1
        return x

    assert_stacked(f, X, torch.tensor([7.0, 8.0]))


def test_a_read_by_a_mask_of_all_examples():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert_stacked(lambda x: x[mask], X)
    assert_stacked(lambda x: x[mask].sum(), X)
    assert_stacked(lambda x: torch.masked_select(x, mask), X)


def test_a_read_by_a_mask_of_each_example():
    with pytest.raises(DataDependentError, match=r"torch\.where, a masked reduction"):
        vmap(lambda x: x[x > 1].sum())(X)
    assert_stacked(lambda x: torch.where(x > 1, x, 0).sum(), X)


def test_what_the_error_of_unique_advises():
    x = torch.tensor([[3, 0, 3, 1], [2, 2, 2, 2]])

    def count(x):
        s = x.sort().values
        return 1 + (s[1:] != s[:-1]).sum(), torch.zeros(4).scatter_add(0, x, torch.ones(4)) > 0

    number, present = vmap(count)(x)
    for i, row in enumerate(x):
        assert number[i] == len(row.unique())
        assert torch.equal(present[i].nonzero().flatten(), row.unique())


def test_one_hot_without_the_number_of_classes():
    agree, differ = torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0, 2], [0, 1]])
    assert_stacked(torch.nn.functional.one_hot, agree)
    with pytest.raises(DataDependentError, match="pass num_classes"):
        vmap(torch.nn.functional.one_hot)(differ)


def test_resize_keeps_the_shape():
    assert_stacked(lambda x: x.clone().resize_(2, 3), X)
    with pytest.raises(RuntimeError, match="change the shape of an example"):
        vmap(lambda x: x.clone().resize_(3, 2))(X)
