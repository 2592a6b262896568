"""`x.detach_()`: a constant from then on, at every level and for PyTorch's own autograd."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jvp, linearize, vmap
from lamina_core.errors import MutationError

X = torch.arange(12.0).reshape(3, 4) + 1


def _plain(a):
    b = a * 2
    b.detach_()
    return (b * a).sum()


def _without_grad(a):
    b = a * 2
    with torch.no_grad():
        b.detach_()
    return (b * a).sum()


def _with_a_view(a):
    b = a * 2
    first = b[0]
    b.detach_()
    return (b * a).sum() + first


def _then_written(a):
    b = a * 2
    b.detach_().mul_(a)
    return b.sum()


@pytest.mark.parametrize("f", [_plain, _without_grad, _with_a_view, _then_written])
def test_every_transform_agrees_with_autograd(f):
    leaf = X.clone().requires_grad_()
    (want,) = torch.autograd.grad(sum(f(row * 1) for row in leaf), leaf)
    torch.testing.assert_close(vmap(grad(f))(X), want)
    torch.testing.assert_close(torch.autograd.grad(vmap(f)(leaf).sum(), leaf)[0], want)
    for x, slope in zip(X, want, strict=True):
        torch.testing.assert_close(grad(f)(x), slope)
        torch.testing.assert_close(jvp(f, (x,), (x,))[1], slope @ x)
        torch.testing.assert_close(linearize(f, x)[1](x), slope @ x)


def test_nobody_follows_it():
    leaf, w = X.clone().requires_grad_(), torch.ones(4, requires_grad=True)
    assert not vmap(lambda a: (a * 2).detach_())(leaf).requires_grad
    assert not vmap(lambda a: (a * w).detach_())(X).requires_grad
    assert not grad(lambda a: ((w * 2).detach_() * a).sum())(X[0]).requires_grad
    twice = grad(lambda x: grad(lambda a: ((x * 2).detach_() * a).sum())(x).sum())(X[0])
    assert torch.equal(twice, torch.zeros(4))


def test_the_argument_itself():
    def f(a):
        a.detach_()
        return (a * a).sum()

    leaf = X.clone().requires_grad_()
    assert not vmap(f)(leaf).requires_grad
    assert leaf.requires_grad
    assert torch.equal(grad(f)(X[0]), torch.zeros(4))


def test_a_view_is_refused():
    with pytest.raises(MutationError, match="is called on a view"):
        grad(lambda a: (a[0].detach_() * a).sum())(X[0])
