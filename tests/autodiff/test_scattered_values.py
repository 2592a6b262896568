"""Derivatives of writes by index for every rank that the operands may have, next to PyTorch's.

An operand without dims counts as a vector of one element, and a value that is written to a place
twice has that one derivative.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from lamina import grad, jvp, vmap

XS = (torch.tensor(1.5), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
# Each names no place twice: there PyTorch's two modes disagree for some ops.
INDICES = (torch.tensor(0), torch.tensor([0]), torch.tensor([1, 0]))
SOURCES = (
    torch.tensor(2.5),
    torch.tensor([2.5]),
    torch.tensor([2.5, 5.0]),
    torch.tensor([[2.5, 5.0], [1.5, 0.5]]),
)
OPS = {
    "index_add": lambda x, i, s: x.index_add(0, i, s, alpha=2),
    "index_copy": lambda x, i, s: x.index_copy(0, i, s),
    "index_fill": lambda x, i, s: x.index_fill(0, i, s),
    "index_put": lambda x, i, s: x.index_put((i,), s),
    "index_put, added": lambda x, i, s: x.index_put((i,), s, accumulate=True),
    "index_reduce": lambda x, i, s: x.index_reduce(0, i, s, "prod"),
    "masked_fill": lambda x, i, s: x.masked_fill(i > 0, s),
    "masked_scatter": lambda x, i, s: x.masked_scatter(i > 0, s),
    "put": lambda x, i, s: x.put(i, s),
    "scatter": lambda x, i, s: x.scatter(0, i, s),
    "scatter_add": lambda x, i, s: x.scatter_add(0, i, s),
    "scatter_reduce, amax": lambda x, i, s: x.scatter_reduce(0, i, s, "amax"),
    "scatter_reduce, mean": lambda x, i, s: x.scatter_reduce(0, i, s, "mean", include_self=False),
    "scatter_reduce, sum": lambda x, i, s: x.scatter_reduce(0, i, s, "sum"),
    "select_scatter": lambda x, i, s: x.select_scatter(s, 0, 0),
    "slice_scatter": lambda x, i, s: x.slice_scatter(s, 0, 0, 1),
    "take": lambda x, i, s: x.take(i) * s.sum(),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", OPS)
def test_every_rank(name):
    op, tried = OPS[name], 0

    def loss(x, s, i):
        out = op(x, i, s)
        return (out * torch.arange(1.0, 1.0 + out.numel()).reshape(out.shape)).sin().sum()

    for x, i, s in itertools.product(XS, INDICES, SOURCES):
        try:
            want = _autograd(lambda x, s, i=i: loss(x, s, i), x, s)
        except (IndexError, RuntimeError):
            continue
        tried += 1
        torch.testing.assert_close(grad(loss, argnums=(0, 1))(x, s, i), want)
        xs, ss, both = torch.stack([x, x]), torch.stack([s, s]), torch.stack([i, i])
        rows = tuple(torch.stack([w, w]) for w in want)
        for index, dims in ((both, (0, 0, 0)), (i, (0, 0, None))):
            mapped = vmap(loss, in_dims=dims)
            got = vmap(grad(loss, argnums=(0, 1)), in_dims=dims)(xs, ss, index)
            torch.testing.assert_close(got, rows)
            got = _autograd(lambda x, s, m=mapped, i=index: m(x, s, i).sum(), xs, ss)
            torch.testing.assert_close(got, rows)
        tangents = (torch.ones_like(x), torch.full_like(s, 2))
        got = jvp(lambda x, s, i=i: loss(x, s, i), (x, s), tangents)[1]
        torch.testing.assert_close(got, want[0].sum() + 2 * want[1].sum())
    assert tried > 2


def _autograd(f, *args):
    leaves = [arg.clone().requires_grad_() for arg in args]
    grads = torch.autograd.grad(f(*leaves), leaves, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)
    )


@pytest.mark.parametrize("mapped_index", [False, True])
def test_a_place_that_is_filled_twice(mapped_index):
    x = torch.arange(12.0).reshape(3, 4).requires_grad_()
    index = torch.tensor([1, -3])  # the same place, counted from either end
    want = torch.tensor([2.0, 1.0, 2.0, 2.0]).expand(3, 4)

    def fill(a, i):
        return a.index_fill(0, i, a.sum())

    indices, dim = (index.expand(3, 2), 0) if mapped_index else (index, None)
    out = vmap(fill, in_dims=(0, dim))(x, indices)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], want)
    inner = grad(lambda a, i: fill(a, i).sum())
    torch.testing.assert_close(vmap(inner, in_dims=(0, dim))(x.detach(), indices), want)
