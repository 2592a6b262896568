"""Writes of complex values that the user's own autograd follows, although PyTorch refuses scatters.

PyTorch differentiates a complex `b[0] = v`, and refuses the `select_scatter` that it is out of
place.
"""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jvp, vmap

A = torch.tensor([[1.0 + 2j, -0.5j], [0.25, 1.5 - 1j], [2j, -1.0]])


def _zeros(*shape):
    return torch.zeros(*shape, dtype=A.dtype)


def _written(index, *shape):
    def f(v):
        b = _zeros(*shape)
        b[index] = v if b[index].dim() else v[0]
        return b

    return f


def _through(view, *shape):
    def f(v):
        b = _zeros(*shape)
        view(b).copy_(v)
        return b

    return f


def _overwritten(write):
    def f(v):
        b = v * 1
        write(b)
        return b

    return f


WRITES = {
    "as_strided": _through(lambda b: b.as_strided((2,), (1,), 1), 4),
    "column": _written((slice(None), 0), 2, 2),
    "diagonal": _through(torch.diagonal, 2, 2),
    "element": _written(0, 2),
    "element overwritten": _overwritten(lambda b: b[0].fill_(1)),
    "real part": _overwritten(lambda b: b.real.mul_(2)),
    "slice": _written(slice(1, None), 3),
    "slice of a reshape": _through(lambda b: b.view(4)[1:3], 2, 2),
    "whole": _through(lambda b: b, 2),
    "zeroed": _overwritten(lambda b: b[:1].zero_()),
    "zeroed by a mask": _overwritten(lambda b: b.masked_fill_(torch.tensor([True, False]), 0)),
}


@pytest.mark.parametrize("name", WRITES)
def test_the_weight_is_reached(name):
    w = torch.tensor(1.5, requires_grad=True)

    def loss(a, s=1.0):
        return WRITES[name](a * w * s).abs().pow(3).sum()

    def slope(a):
        return grad(lambda s: loss(a, s))(torch.tensor(1.0))

    def pushed(a):
        return jvp(lambda s: loss(a, s), (torch.tensor(1.0),), (torch.tensor(1.0),))[1]

    (want,) = torch.autograd.grad(sum(loss(a) for a in A), w)
    torch.testing.assert_close(torch.autograd.grad(vmap(loss)(A).sum(), w)[0], want)
    s = torch.tensor(1.0, requires_grad=True)
    (along,) = torch.autograd.grad(sum(loss(a, s) for a in A), s, create_graph=True)
    (want,) = torch.autograd.grad(along, w)
    for f in (slope, pushed):
        torch.testing.assert_close(torch.autograd.grad(vmap(f)(A).sum(), w)[0], want)
        torch.testing.assert_close(torch.autograd.grad(sum(f(a) for a in A), w)[0], want)


def test_a_spectrum():
    w = torch.ones(4, requires_grad=True)
    x = torch.tensor([[0.5, -1.0, 2.0, 0.25]])

    def loss(x):
        return torch.fft.rfft(x * w).abs().pow(3).sum()

    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf[0]), leaf, create_graph=True)
    (want,) = torch.autograd.grad(g.sum(), w)
    torch.testing.assert_close(torch.autograd.grad(vmap(grad(loss))(x).sum(), w)[0], want)
