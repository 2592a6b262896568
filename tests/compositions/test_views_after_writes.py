"""Views that are first used after a write to what they view, where that use is unusual.

A view is brought up to date on its next use. That may be under `no_grad`, or by code that asks what
a tensor carries before any op has met it; neither may cost it its derivative.
"""

from __future__ import annotations

import pytest
import torch

import lamina
from lamina_core.errors import EscapedTensorError

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


def _of_a_result(x):
    u = x * 2
    view = u[:]
    u.mul_(x)
    return view


def _of_a_buffer(x):
    u = torch.zeros(3, dtype=torch.float64)
    view = u.view(1, 3)[0]
    u.copy_(x * x)
    return view


@pytest.mark.parametrize("make", [_of_a_result, _of_a_buffer])
def test_a_use_under_no_grad_costs_a_view_nothing(make):
    def function(x):
        view = make(x)
        with torch.no_grad():
            view.sum()
        return view

    leaf = X.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf).sum(), leaf)
    ones = torch.ones_like(X)
    torch.testing.assert_close(lamina.grad(lambda x: function(x).sum())(X), want)
    torch.testing.assert_close(lamina.jvp(function, (X,), (ones,))[1], want)
    torch.testing.assert_close(lamina.linearize(function, X)[1](ones), want)
    mapped = lamina.grad(lambda x: lamina.vmap(function)(x[None]).sum())(X)
    torch.testing.assert_close(mapped, want)


def test_a_use_by_a_transform_under_no_grad_costs_a_view_nothing():
    def function(x):
        view = _of_a_buffer(x)
        with torch.no_grad():
            lamina.grad(lambda y: (y * view).sum())(x)
        return view.sum()

    torch.testing.assert_close(lamina.grad(function)(X), 2 * X)


def _with_vjp():
    function = lamina.custom_vjp(lambda x, view: view.sin())
    function.defvjp(lambda x, view: (view.sin(), None), lambda _, ct: (None, 7 * ct))
    return function


def _with_vjp_of_what_is_perturbed():
    function = lamina.custom_vjp(lambda x, view: view.sin())
    function.defvjp(
        lambda x, view: (view.value.sin(), view.perturbed),
        lambda perturbed, ct: (None, 7 * ct if perturbed else None),
        symbolic_zeros=True,
    )
    return function


def _with_jvp():
    function = lamina.custom_jvp(lambda x, view: view.sin())
    function.defjvp(lambda primals, tangents: (primals[1].sin(), 7 * tangents[1]))
    return function


@pytest.mark.parametrize("only", [False, True], ids=["beside x", "alone"])
@pytest.mark.parametrize("make", [_with_vjp, _with_vjp_of_what_is_perturbed, _with_jvp])
def test_custom_rules_see_the_derivative_of_a_view(make, only):
    custom = make()

    def function(x):
        view = _of_a_buffer(x)
        return custom(x.detach() if only else x, view)

    want = 14 * X  # by the rule, 7, and by the buffer, 2 x
    torch.testing.assert_close(lamina.grad(lambda x: function(x).sum())(X), want)
    torch.testing.assert_close(lamina.jvp(function, (X,), (torch.ones_like(X),))[1], want)
    mapped = lamina.grad(lambda x: lamina.vmap(function)(x[None]).sum())(X)
    torch.testing.assert_close(mapped, want)
    torch.testing.assert_close(
        lamina.vmap(lamina.grad(lambda x: function(x).sum()))(X[None])[0], want
    )


def test_custom_vmap_sees_that_a_view_is_mapped():
    sizes = []
    custom = lamina.custom_vmap(lambda view: view.sin())

    @custom.def_vmap
    def rule(size, in_batched, view):
        sizes.append(size)
        return view.sin(), True

    out = lamina.vmap(lambda x: custom(_of_a_buffer(x)))(X[None].expand(2, 3))
    torch.testing.assert_close(out[1], (X * X).sin())
    assert sizes == [2]


def test_a_view_that_has_escaped_shows_what_was_written():
    escaped = []

    def function(x):
        u = x * 1
        escaped.append(u[:2][1:])
        u.mul_(2)
        return u.sum()

    lamina.grad(function)(X)
    torch.testing.assert_close(escaped[0] + 0, 2 * X[1:2])


def test_a_view_that_has_escaped_after_a_mapped_write_is_refused():
    escaped = []
    lamina.vmap(lambda x: escaped.append(_of_a_buffer(x)) or x)(X[None])
    with pytest.raises(EscapedTensorError):
        escaped[0] + 0


@pytest.mark.parametrize("name", ["grad", "vmap", "jvp", "vmap(grad)"])
def test_views_of_views_may_be_many(name):
    x = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64)

    def f(x):
        y = x * 1
        first = second = y
        for _ in range(1500):
            first, second = first.view(3), second[:]
        first.mul_(2)
        y.add_(1)
        return (first * second * y).sum()

    derivative = 6 * (2 * x + 1) ** 2
    run = {
        "grad": lambda: (lamina.grad(f)(x), derivative),
        "vmap": lambda: (lamina.vmap(f)(x[None]), ((2 * x + 1) ** 3).sum()[None]),
        "jvp": lambda: (lamina.jvp(f, (x,), (x,))[1], (derivative * x).sum()),
        "vmap(grad)": lambda: (lamina.vmap(lamina.grad(f))(x[None]), derivative[None]),
    }
    torch.testing.assert_close(*run[name]())


def test_a_dead_view_of_many_views():
    kept = []

    def f(x):
        y = view = x * 1
        for _ in range(1500):
            view = view.view(3)
        kept.append(view)
        y.mul_(2)
        return y.sum()

    lamina.grad(f)(torch.ones(3))
    assert (kept[0] + 0).tolist() == [2.0] * 3
