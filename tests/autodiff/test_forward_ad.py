"""`torch.autograd.forward_ad` inside a transform."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fa

import lamina
from lamina import grad, jacfwd, jvp, vmap
from lamina_core.errors import StructureError

X = torch.tensor([1.0, 2.0, 3.0])


def derivative(x, f=lambda x: x**3):
    with fa.dual_level():
        return fa.unpack_dual(f(fa.make_dual(x, torch.ones_like(x)))).tangent


def test_it_is_differentiated():
    torch.testing.assert_close(grad(lambda x: derivative(x).sum())(X), 6 * X)
    torch.testing.assert_close(jvp(derivative, (X,), (X,))[1], 6 * X * X)
    torch.testing.assert_close(torch.diag(jacfwd(derivative)(X)), 6 * X)
    torch.testing.assert_close(vmap(grad(lambda x: derivative(x)))(X), 6 * X)


def test_of_captured_tensors():
    torch.testing.assert_close(vmap(lambda s: derivative(X) * s)(X)[1], 6 * X**2)
    w = X.clone().requires_grad_()
    vmap(lambda s: derivative(w) * s)(X).sum().backward()
    torch.testing.assert_close(w.grad, 6 * X * X.sum())


def test_nested():
    def second(x):
        return derivative(x, derivative)

    torch.testing.assert_close(vmap(second)(X), 6 * X)
    torch.testing.assert_close(grad(lambda x: second(x).sum())(X), torch.full_like(X, 6.0))


def test_what_has_no_tangent():
    def f(x):
        with fa.dual_level():
            primal, tangent = fa.unpack_dual(x * 2)
            assert tangent is None
            pair = fa.unpack_dual(fa.make_dual(x, x))
            return (primal + pair.primal + pair.tangent).sum()

    torch.testing.assert_close(grad(f)(X), torch.full_like(X, 4.0))
    assert fa.unpack_dual(X).tangent is None


def test_errors():
    with pytest.raises(StructureError, match="dual_level"):
        vmap(lambda x: fa.make_dual(x, x))(X)
    with pytest.raises(ValueError, match="floating point"):
        vmap(lambda x: derivative(x))(X.int())

    def fails(x):
        with fa.dual_level():
            raise KeyError("inside")

    with pytest.raises(KeyError):
        grad(fails)(X)
    torch.testing.assert_close(grad(lambda x: derivative(x).sum())(X), 6 * X)


def test_outside_it_is_pytorchs_own():
    with fa.dual_level():
        x = fa.make_dual(X, torch.ones(3))
        assert fa.unpack_dual(vmap(torch.sin)(x)).tangent.tolist() == X.cos().tolist()
    assert fa._current_level == -1


def test_torch_func_inside_lamina():
    f = lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(vmap(f)(X), X.cos())
    g = lambda x: torch.func.grad(lambda x: (x**3).sum())(x)
    torch.testing.assert_close(vmap(g)(X), 3 * X**2)
    torch.testing.assert_close(lamina.vmap(torch.func.vmap(torch.sin))(X[None]), X.sin()[None])


@pytest.mark.parametrize(
    "f", [lambda x: x, lambda x: x + 1, lambda x: x[1:], lambda x: (x, x.view(3, 1))]
)
def test_a_tangent_of_the_callers_is_never_handed_back(f):
    given = torch.ones(3)
    for out_t in (
        lamina.jvp(f, (X,), (given,))[1],
        lamina.linearize(f, X)[1](given),
    ):
        for tangent in out_t if isinstance(out_t, tuple) else [out_t]:
            tangent.mul_(5)
    assert given.tolist() == [1.0, 1.0, 1.0]
