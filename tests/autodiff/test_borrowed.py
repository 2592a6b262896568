"""Derivatives that PyTorch has no formula for, or a wrong one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import lamina
from lamina import grad, hessian, jvp, vjp, vmap
from lamina_core.errors import NotDifferentiableError

aten = torch.ops.aten


def slopes(f, x, step=1e-5):
    """Central differences of `f` along each element of `x`."""
    sides = [(f(x + step * e), f(x - step * e)) for e in torch.eye(len(x), dtype=x.dtype)]
    return torch.stack([(hi - lo) / (2 * step) for hi, lo in sides])


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------
# Ops that autograd knows nothing about
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    with torch.library._scoped_library("lamina_test_borrowed", "FRAGMENT") as made:
        made.define("unknown(Tensor x) -> Tensor")
        made.impl("unknown", lambda x: x.sin(), "CPU")
        made.define("flat(Tensor x) -> Tensor")
        made.impl("flat", lambda x: x.sign(), "CPU")
        made.impl("flat", torch.library.fallthrough_kernel, "Autograd")
        yield torch.ops.lamina_test_borrowed


@pytest.mark.parametrize("mode", ["grad", "jvp"])
def test_an_op_without_a_formula_is_an_error(library, mode):
    x = torch.randn(3)
    f = lambda x: library.unknown(x).sum()
    with pytest.raises(NotDifferentiableError, match=r"unknown\.default has no deriv"):
        grad(f)(x) if mode == "grad" else jvp(f, (x,), (x,))


def test_an_op_without_a_formula_may_stand_where_no_derivative_is_asked_for(library):
    x = torch.randn(3)
    near(grad(lambda x: (library.unknown(x.detach()) * x).sum())(x), x.sin())


def test_an_op_that_is_declared_constant_has_a_zero_derivative(library):
    x = torch.randn(3)
    near(grad(lambda x: (library.flat(x) * x).sum())(x), x.sign())


# ---------------------------------------------------------------------------------------------
# Formulas of our own
# ---------------------------------------------------------------------------------------------


def test_rrelu_has_the_slopes_that_were_drawn():
    x = torch.randn(50, dtype=torch.float64)
    out, pullback = vjp(lambda x: F.rrelu(x, 0.1, 0.3, training=True), x)
    near(pullback(torch.ones_like(x))[0], out / x)
    out, out_t = jvp(lambda x: F.rrelu(x, 0.1, 0.3, training=True), (x,), (x,))
    near(out_t, out)


def test_as_strided_scatter_against_central_differences():
    x, src = torch.randn(12, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def f(both):
        x, src = both[:12].reshape(3, 4), both[12:].reshape(2, 2)
        return torch.as_strided_scatter(x, src, (2, 2), (5, 2), 1).sin().sum()

    both = torch.cat([x, src])
    near(grad(f)(both), slopes(f, both))
    near(jvp(f, (both,), (both.cos(),))[1], slopes(f, both) @ both.cos())


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean", "prod", "amax", "amin"])
def test_scatter_reduce_with_a_larger_source(reduce, include_self):
    index = torch.tensor([[0, 2, 2], [0, 1, 2]])

    def f(both):
        x, src = both[:12].reshape(3, 4), both[12:].reshape(4, 5)
        return x.scatter_reduce(0, index, src, reduce, include_self=include_self).sin().sum()

    both = torch.randn(32, dtype=torch.float64)
    near(grad(f)(both), slopes(f, both))


@pytest.mark.parametrize("include_self", [True, False])
def test_products_with_zeros_have_right_second_derivatives(include_self):
    index = torch.tensor([0, 0, 2, 2, 1, 2])

    def f(both):
        x, src = both[:4], both[4:]
        return x.scatter_reduce(0, index, src, "prod", include_self=include_self).sum()

    both = torch.tensor([2.0, 0, 3, 0.5, 0, 4, 0, 0, 5, 7], dtype=torch.float64)
    near(grad(f)(both), slopes(f, both))
    near(hessian(f)(both), slopes(grad(f), both))


def test_the_second_derivative_of_glu():
    f = lambda x: F.glu(x.reshape(2, 4)).square().sum()
    x = torch.randn(8, dtype=torch.float64)
    near(hessian(f)(x), slopes(grad(f), x))
    near(lamina.jacrev(grad(f))(x), slopes(grad(f), x))


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no such loss"
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_chunked_loss_of_a_linear_layer(reduction):
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    target = torch.tensor([0, 3, 1, 1, 2])
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)

    def chunked(x, weight):
        return F.linear_cross_entropy(x, weight, target, reduction=reduction, options=options).sum()

    def plain(x, weight):
        return F.cross_entropy(F.linear(x, weight), target, reduction=reduction).sum()

    near(grad(chunked, (0, 1))(x, weight), grad(plain, (0, 1))(x, weight))
    both = lambda f: vmap(grad(f, (0, 1)), (0, None))(torch.stack([x, 2 * x]), weight)
    near(both(chunked), both(plain))


# ---------------------------------------------------------------------------------------------
# Writes that the user's own autograd follows
# ---------------------------------------------------------------------------------------------


def written_rows(x):
    y = x.sin()
    y[1:] *= 2
    return torch.special.erfcx(y).sum()


def written_scalar(x):
    y = torch.zeros((), dtype=x.dtype)
    y.copy_(x[0])
    return (y**3 * x).sum()


def written_in_another_dtype(x):
    y = torch.zeros(2, *x.shape)
    y.copy_(x)
    return (y**3).sum().to(x.dtype)


@pytest.mark.parametrize("f", [written_rows, written_scalar, written_in_another_dtype])
def test_autograd_through_a_gradient_of_writes(f):
    leaf = torch.randn(4, dtype=torch.float64).requires_grad_()
    (inner,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(inner.sin().sum(), leaf)
    (found,) = torch.autograd.grad(grad(f)(leaf).sin().sum(), leaf)
    near(found, expected)


def test_a_captured_leaf_that_is_written_to_a_constant():
    weight = torch.randn(3).requires_grad_()

    def f(x):
        y = torch.zeros(3)
        y.copy_(weight)
        return (x * y).sum()

    (found,) = torch.autograd.grad(grad(f)(torch.randn(3)).sum(), weight)
    near(found, torch.ones(3))
