"""Formulas borrowed from PyTorch that stand for a zero by a tensor without memory."""

from __future__ import annotations

import pytest
import torch

import lamina


def _draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    "expands", [([1, 3], [0], [1, 2], [2, 3]), ([2, 3], [0], [1, 2], [1, 3])], ids=["out", "in"]
)
def test_a_product_of_three_along_one_of_them(place, expands):
    operands = [_draw(4, 3), _draw(3, 3, 3), _draw(4, 3) + 1]

    def function(x):
        return torch._trilinear(*operands[:place], x, *operands[place + 1 :], *expands)

    x = operands[place]
    out, out_t = lamina.jvp(function, (x,), (x,))
    torch.testing.assert_close(out, function(x))
    torch.testing.assert_close(out_t, out)  # it is linear in each


def test_second_derivative_of_bilinear():
    x, weight, v = _draw(4, 3), _draw(2, 3, 3), _draw(4, 3) + 1

    def loss(x):
        return torch.nn.functional.bilinear(x, x.sin(), weight).sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (want,) = torch.autograd.grad(gradient, leaf, v)
    torch.testing.assert_close(lamina.hvp(loss, (x,), (v,))[1][0], want)
    torch.testing.assert_close(lamina.vhp(loss, (x,), (v,))[1][0], want)
