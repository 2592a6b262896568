"""Derivatives of registered ops, by the formula that is registered with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lamina
from lamina import grad, hessian, jvp, vjp, vmap
from lamina_core.errors import NotDifferentiableError
from tests.batching.registered.ops import CALLS, OPS, rand, row_times, scaled_cube, total
from tests.errors.saying import said


def by_autograd(f, *xs):
    leaves = [x.clone().requires_grad_() for x in xs]
    return torch.autograd.grad(f(*leaves), leaves)


SCALARS = {
    "keyword": (lambda x: scaled_cube(x, 2.0, shift=1.0).sin().sum(), (3,)),
    "raw": (lambda x: OPS.raw_sine(x).square().sum(), (3,)),
    "list": (lambda x: total([x, x * 2, x.exp()]).square().sum(), (3,)),
    "two outputs": (lambda x, y: row_times(x, y)[0].sum() * row_times(x, y)[1].prod(), (2, 3)),
    "one of two outputs": (lambda x, y: row_times(x, y)[1].square().sum(), (2, 3)),
}


def arguments(f, shape, *batch):
    shapes = [shape] if f.__code__.co_argcount == 1 else [shape, shape[-1:]]
    return [rand(*batch, *s) for s in shapes]


@pytest.mark.parametrize("case", SCALARS)
def test_grad_and_vjp_use_the_registered_formula(case):
    f, shape = SCALARS[case]
    xs = arguments(f, shape)
    everything = tuple(range(len(xs)))
    expected = by_autograd(f, *xs)
    torch.testing.assert_close(grad(f, everything)(*xs), expected)
    out, pullback = vjp(f, *xs)
    torch.testing.assert_close(pullback(torch.full_like(out, 2.0)), tuple(2 * e for e in expected))


@pytest.mark.parametrize("case", SCALARS)
def test_jvp_is_the_transpose_of_the_registered_formula(case):
    f, shape = SCALARS[case]
    xs = arguments(f, shape)
    tangents = tuple(x.cos() for x in xs)
    out, out_t = jvp(f, tuple(xs), tangents)
    torch.testing.assert_close(out, f(*xs))
    expected = sum((g * t).sum() for g, t in zip(by_autograd(f, *xs), tangents, strict=True))
    torch.testing.assert_close(out_t, expected)


@pytest.mark.parametrize("case", ["keyword", "raw"])
def test_second_derivatives(case):
    f, shape = SCALARS[case]
    (x,) = arguments(f, shape)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    rows = [torch.autograd.grad(first[i], leaf, retain_graph=True)[0] for i in range(3)]
    lamina.config.fallback = "silent"  # set back by the fixture
    torch.testing.assert_close(hessian(f)(x), torch.stack(rows))
    torch.testing.assert_close(grad(lambda x: grad(f)(x).sum())(x), torch.stack(rows).sum(0))


@pytest.mark.parametrize("case", SCALARS)
def test_per_sample_gradients(case, looping):
    f, shape = SCALARS[case]
    xs = arguments(f, shape, 4)
    everything = tuple(range(len(xs)))
    found = vmap(grad(f, everything))(*xs)
    rows = [by_autograd(f, *examples) for examples in zip(*xs, strict=True)]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*rows, strict=True))))
    summed = grad(lambda *xs: vmap(f)(*xs).sum(), everything)(*xs)
    torch.testing.assert_close(summed, found)


def test_per_sample_gradients_use_the_rule():
    x = rand(4, 3)
    found = vmap(grad(lambda x: scaled_cube(x).sum()))(x)
    torch.testing.assert_close(found, 3 * x**2)
    assert len(CALLS) == 1


def test_backward_reaches_a_captured_parameter():
    weight = rand(3).requires_grad_()
    x = rand(4, 3)
    vmap(lambda x: (scaled_cube(weight) * x).sum())(x).sum().backward()
    torch.testing.assert_close(weight.grad, 3 * weight.detach() ** 2 * x.sum(0))
    mapped = rand(4, 3).requires_grad_()
    vmap(scaled_cube)(mapped).sum().backward()
    torch.testing.assert_close(mapped.grad, 3 * mapped.detach() ** 2)


def test_an_op_without_a_formula_is_an_error():
    @torch.library.custom_op("lamina_tests::no_formula", mutates_args=())
    def no_formula(x: Tensor) -> Tensor:
        return x.clone()

    x = rand(3)
    text = said(NotDifferentiableError, lambda: grad(lambda x: no_formula(x).sum())(x))
    assert "lamina_tests.no_formula.default has no derivative" in text
    assert "register_autograd" in text
    with pytest.raises(NotDifferentiableError):
        jvp(no_formula, (x,), (x,))
    torch.testing.assert_close(grad(lambda y: (no_formula(x) * y).sum())(x), x)
