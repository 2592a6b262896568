"""Normalisations are linearised, and what is left is transposed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lamina


def _draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:], _draw(*x.shape[1:])),
    "group_norm": lambda x: F.group_norm(x, 2, _draw(4)),
    "instance_norm": F.instance_norm,
    "batch_norm": lambda x: F.batch_norm(x, None, None, _draw(4), training=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_transpose_of_the_linearised_norm_is_its_pullback(name):
    norm, x, ct = NORMS[name], _draw(3, 4, 5), _draw(3, 4, 5).cos()
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(norm(leaf), leaf, ct)
    _, push = lamina.linearize(norm, x)
    torch.testing.assert_close(lamina.linear_transpose(push, x)(ct)[0], want)


@pytest.mark.parametrize("name", NORMS)
def test_the_linearised_gradient_is_symmetric(name):
    norm, x, v = NORMS[name], _draw(3, 4, 5), _draw(3, 4, 5).cos()

    def loss(x):
        return (norm(x) * v.sin()).tanh().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (want,) = torch.autograd.grad(gradient, leaf, v)
    _, push = lamina.linearize(lamina.grad(loss), x)
    torch.testing.assert_close(push(v), want)
    torch.testing.assert_close(lamina.linear_transpose(push, x)(v)[0], want)
