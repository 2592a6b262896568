"""Transforms of torch.func around Lamina's and inside them; functionalize and tracing around."""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import lamina
from lamina import grad, jacrev, jvp, vmap
from lamina_core.errors import StructureError

X = torch.tensor([[0.3, 1.1, -0.7], [0.2, 0.5, 0.9]], dtype=torch.float64)
ROW = X[0]
ONES = torch.ones(3, dtype=torch.float64)
WEIGHT = torch.tensor([[2.0], [3.0]], dtype=torch.float64)


def cube(x):
    return (x**3).sum()


def written(x):
    y = x * 1
    y[0] = 5.0
    return y.mul_(2).sum()


WRITTEN = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64).expand(2, 3)

AROUND = {
    "grad(grad)": (lambda: func.grad(lambda x: grad(cube)(x).sum())(ROW), 6 * ROW),
    "grad(vmap)": (lambda: func.grad(lambda x: vmap(torch.sin)(x).sum())(X), X.cos()),
    "vmap(vmap)": (lambda: func.vmap(lambda x: vmap(torch.sin)(x))(X), X.sin()),
    "vmap(grad)": (lambda: func.vmap(grad(cube))(X), 3 * X**2),
    "jvp(vmap)": (lambda: func.jvp(vmap(torch.sin), (X,), (X,))[1], X * X.cos()),
    "jvp(grad)": (lambda: func.jvp(grad(cube), (ROW,), (ROW,))[1], 6 * ROW**2),
    "jacrev(jvp)": (
        lambda: func.jacrev(lambda x: jvp(torch.sin, (x,), (ONES,))[1])(ROW),
        torch.diag(-ROW.sin()),
    ),
    "jacfwd(jacrev)": (lambda: func.jacfwd(jacrev(cube))(ROW), torch.diag(6 * ROW)),
    "hessian of vmap": (
        lambda: func.hessian(lambda x: vmap(lambda x: x**3)(x).sum())(ROW),
        torch.diag(6 * ROW),
    ),
    "vmap(vmap) of a composite op": (
        lambda: func.vmap(vmap(lambda x: F.linear(x, WEIGHT)))(X[:, :, None]),
        X[:, :, None] * WEIGHT[:, 0],
    ),
    "functionalize(vmap)": (lambda: func.functionalize(vmap(torch.sin))(ROW), ROW.sin()),
    "functionalize of views": (
        lambda: func.functionalize(vmap(lambda x: x.view(-1)[1:]))(X),
        X[:, 1:],
    ),
    "functionalize of writes": (lambda: func.functionalize(vmap(grad(written)))(X), WRITTEN),
    "make_fx(functionalize)": (
        lambda: make_fx(func.functionalize(vmap(grad(written))))(X)(X),
        WRITTEN,
    ),
    "make_fx, pre-dispatch": (
        lambda: make_fx(vmap(grad(cube)), pre_dispatch=True)(X)(2 * X),
        12 * X**2,
    ),
    "make_fx, symbolic": (
        lambda: make_fx(vmap(grad(cube)), tracing_mode="symbolic")(X)(2 * X),
        12 * X**2,
    ),
}
INSIDE = {
    "vmap(grad)": (lambda: vmap(func.grad(cube))(X), 3 * X**2),
    "grad(vmap)": (lambda: grad(lambda x: func.vmap(torch.sin)(x).sum())(X), X.cos()),
    "vmap(jvp)": (lambda: vmap(lambda x: func.jvp(torch.sin, (x,), (x,))[1])(X), X * X.cos()),
    "vmap(vmap)": (lambda: vmap(func.vmap(torch.sin))(X), X.sin()),
    "jvp(grad)": (lambda: jvp(func.grad(cube), (ROW,), (ROW,))[1], 6 * ROW**2),
    "vmap(functionalize)": (
        lambda: vmap(func.functionalize(lambda x: written(x)[None]))(X)[:, 0],
        10 + 2 * X[:, 1:].sum(1),
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_around(name):
    run, expected = AROUND[name]
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("name", INSIDE)
def test_inside(name):
    run, expected = INSIDE[name]
    torch.testing.assert_close(run(), expected)


def test_the_callers_autograd_sees_through_both():
    x = ROW.clone().requires_grad_()
    func.vmap(vmap(torch.sin))(x[None]).sum().backward()
    torch.testing.assert_close(x.grad, ROW.cos())


def test_a_module_that_is_exported():
    class Model(torch.nn.Module):
        def forward(self, x):
            return vmap(grad(cube))(x)

    exported = torch.export.export(Model(), (X,)).module()
    torch.testing.assert_close(exported(2 * X), 12 * X**2)


TURNS = {
    "ours twice": lambda: vmap(func.grad(lambda x: vmap(torch.sin)(x).sum()))(X),
    "theirs twice": lambda: func.vmap(vmap(func.grad(lambda x: x**3)))(X),
    "theirs twice, in reverse": lambda: func.grad(lambda x: vmap(func.vmap(torch.sin))(x).sum())(X),
}


@pytest.mark.parametrize("name", TURNS)
def test_in_turns_they_are_refused(name):
    with pytest.raises(StructureError, match="nested in turns") as caught:
        TURNS[name]()
    assert "import all of them from lamina" in str(caught.value)
    assert lamina.vmap(torch.sin)(X).equal(X.sin())
