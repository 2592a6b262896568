"""Traps of elementwise ops, reductions, views and indexing that random samples do not reach.

The oracle is `torch.autograd`: for values where no formula decides (ties, kinks, singular points),
for dtypes and complex cotangents, and for second derivatives where a special case hides them.
"""

from __future__ import annotations

import math
import operator

import pytest
import torch
from torch.autograd import forward_ad

import lamina

aten = torch.ops.aten
nan, inf = math.nan, math.inf


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def by_autograd(f, *primals):
    """Gradients of the sum of f, and the gradients of the sum of those."""
    leaves = [p.detach().requires_grad_() for p in primals]
    out = f(*leaves).sum()
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(out, leaves, create_graph=True, **options)
    total = sum(g.sum() for g in first)
    second = (
        torch.autograd.grad(total, leaves, **options)
        if total.requires_grad
        else [torch.zeros_like(x) for x in leaves]
    )
    return [g.detach() for g in first], list(second)


def same_as_autograd(f, *primals):
    """Both derivatives in reverse mode, and the first in forward mode, agree with autograd's."""
    first, second = by_autograd(f, *primals)
    numbers = tuple(range(len(primals)))

    def gradient(*xs):
        return lamina.grad(lambda *ys: f(*ys).sum(), numbers)(*xs)

    actual = gradient(*primals)
    torch.testing.assert_close(list(actual), first, equal_nan=True)
    pulled = lamina.grad(lambda *xs: sum(g.sum() for g in gradient(*xs)), numbers)(*primals)
    torch.testing.assert_close(list(pulled), second, equal_nan=True)
    if all(torch.isfinite(g).all() for g in first):
        ones = tuple(torch.ones_like(p) for p in primals)
        _, pushed = lamina.jvp(lambda *xs: f(*xs).sum(), primals, ones)
        with forward_ad.dual_level():  # which is not the transposed pullback at every NaN
            out = f(*map(forward_ad.make_dual, primals, ones)).sum()
            torch.testing.assert_close(pushed, forward_ad.unpack_dual(out).tangent)


# -- kinks, ties, singular points ------------------------------------------------------------------

TIES = vector(2.0, -1.0, 2.0, 0.0, 2.0)


@pytest.mark.parametrize(
    "f",
    [
        torch.abs,
        torch.nn.functional.relu,
        torch.nn.functional.elu,
        torch.nn.functional.hardswish,
        torch.nn.functional.hardtanh,
        torch.sgn,
        torch.square,
        lambda x: x.clamp(-1, 2),
        lambda x: x.clamp(min=0),
        lambda x: x.clamp(max=2),
        lambda x: torch.nn.functional.prelu(x, vector(0.3)),
    ],
)
def test_kinks(f):
    same_as_autograd(f, vector(-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0))


@pytest.mark.parametrize("f", [torch.maximum, torch.minimum, torch.fmax, torch.fmin, torch.max])
def test_ties_of_two(f):
    same_as_autograd(f, vector(1.0, 2.0, 3.0, nan), vector(1.0, 3.0, 2.0, 1.0))


@pytest.mark.parametrize(
    "f",
    [
        torch.amax,
        torch.amin,
        torch.max,
        torch.median,
        torch.min,
        lambda x: x.max(0).values,
        lambda x: x.cummax(0).values,
        lambda x: x.kthvalue(4).values,
        lambda x: x.norm(inf),
        lambda x: x.sort(stable=True).values * vector(1.0, 2.0, 3.0, 4.0, 5.0),
        lambda x: x.topk(2).values,
    ],
)
def test_ties_of_a_reduction(f):
    same_as_autograd(f, TIES)


@pytest.mark.parametrize("p", [0, 0.5, 1, 1.5, 2, 3, inf, -inf])
def test_norm_at_the_zero_vector(p):
    (actual,) = by_autograd(lambda x: torch.linalg.vector_norm(x, p), torch.zeros(3))[0]
    found = lamina.grad(lambda x: torch.linalg.vector_norm(x, p))(torch.zeros(3))
    torch.testing.assert_close(found, actual)


def test_sqrt_at_zero_is_infinite():
    assert lamina.grad(torch.sqrt)(torch.tensor(0.0)) == inf


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, 0.5, 0.0])
def test_power_by_a_number(exponent):
    same_as_autograd(lambda x: x**exponent, vector(0.0, 2.0, 3.0))


def test_power_of_zero_and_to_zero():
    base, exponent = vector(0.0, 0.0, 2.0, 3.0), vector(0.0, 2.0, 0.0, 1.5)
    first, _ = by_autograd(torch.pow, base, exponent)
    found = lamina.grad(lambda x, y: torch.pow(x, y).sum(), (0, 1))(base, exponent)
    torch.testing.assert_close(list(found), first)
    assert lamina.grad(lambda y: (0.0**y).sum())(vector(0.0, 1.0, 2.0)).tolist() == [0, 0, 0]
    same_as_autograd(lambda y: 2.0**y, exponent)


@pytest.mark.parametrize("f", [torch.xlogy, torch.special.xlog1py, torch.hypot])
def test_two_operands_at_zero(f):
    first, _ = by_autograd(f, vector(0.0, 2.0, 0.0), vector(2.0, 3.0, 1.0))
    found = lamina.grad(lambda x, y: f(x, y).sum(), (0, 1))(
        vector(0.0, 2.0, 0.0), vector(2.0, 3.0, 1.0)
    )
    torch.testing.assert_close(list(found), first, equal_nan=True)


@pytest.mark.parametrize("zeros", [(), (1,), (1, 3)])
@pytest.mark.parametrize("f", [torch.prod, lambda x: x.cumprod(0), lambda x: x.prod(0)])
def test_products_with_zero_factors(f, zeros):
    x = vector(2.0, 3.0, -1.0, 0.5)
    x[list(zeros)] = 0.0
    same_as_autograd(f, x)


def test_where_keeps_the_dead_branch_out():
    def f(x):
        return torch.where(x > 0, x.sqrt(), torch.zeros_like(x))

    found = lamina.grad(lambda x: f(x).sum())(vector(4.0, -1.0))
    torch.testing.assert_close(found, by_autograd(f, vector(4.0, -1.0))[0][0], equal_nan=True)
    assert found.isnan().tolist() == [False, True]


def test_logsumexp_and_logcumsumexp_of_large_values():
    same_as_autograd(lambda x: x.logsumexp(0), vector(1000.0, 999.0, -1000.0))
    found = lamina.grad(lambda x: x.logcumsumexp(0).sum())(vector(1000.0, 999.0, -1000.0))
    assert found.isfinite().all()
    assert found.sum().item() == pytest.approx(3.0)


def test_variance_without_degrees_of_freedom():
    for f in (lambda x: x.var(0), lambda x: x.std(0, correction=0)):
        first, _ = by_autograd(f, vector(2.0, 2.0))
        torch.testing.assert_close(lamina.grad(lambda x, f=f: f(x).sum())(vector(2.0, 2.0)), *first)


# -- broadcasting and dtypes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "f",
    [
        torch.add,
        torch.atan2,
        torch.div,
        torch.mul,
        torch.pow,
        lambda x, y: torch.lerp(x, y, 0.3),
        lambda x, y: torch.where(x > 1, x, y),
        lambda x, y: torch.addcdiv(x, x, y, value=0.5),
        lambda x, y: torch.clamp(x, y, y + 1),
    ],
)
@pytest.mark.parametrize("shapes", [((2, 1, 3), (4, 1)), ((), (2, 3)), ((1,), ()), ((0, 3), (3,))])
def test_broadcasting(f, shapes):
    torch.manual_seed(0)
    same_as_autograd(f, *[torch.rand(s, dtype=torch.float64) + 0.5 for s in shapes])


@pytest.mark.parametrize("kinds", [("float32", "float64"), ("float64", "float16")])
def test_each_cotangent_has_the_dtype_of_its_primal(kinds):
    x, y = (torch.tensor([1.5, 2.0], dtype=getattr(torch, kind)) for kind in kinds)
    for f in (torch.mul, torch.div, torch.add, lambda x, y: torch.cat([x, y])):
        x_ct, y_ct = lamina.grad(lambda x, y, f=f: f(x, y).sum(), (0, 1))(x, y)
        assert (x_ct.dtype, y_ct.dtype) == (x.dtype, y.dtype)


def test_sum_in_another_dtype():
    x = torch.ones(3, dtype=torch.float16)
    assert lamina.grad(lambda x: x.sum(dtype=torch.float64))(x).dtype == torch.float16
    assert lamina.grad(lambda x: x.softmax(0, dtype=torch.float64)[0])(x).dtype == torch.float16


# -- complex ---------------------------------------------------------------------------------------

Z = torch.tensor([1 + 2j, -0.5 + 0.3j, 0.7 - 1.1j], dtype=torch.complex128)


@pytest.mark.parametrize(
    "f",
    [
        torch.abs,
        torch.acosh,
        torch.angle,
        torch.exp,
        torch.reciprocal,
        torch.sgn,
        torch.sigmoid,
        torch.tanh,
        torch.view_as_real,
        torch.Tensor.conj,
        lambda z: z * z.conj(),
        lambda z: z.conj() / (z + 1j),
        lambda z: z.cumprod(0),
        lambda z: z.imag * z.real,
        lambda z: z.imag.sin(),
        lambda z: z.logsumexp(0),
        lambda z: z.prod(),
        lambda z: z.std(),
        lambda z: z**3,
        lambda z: torch.linalg.vector_norm(z, 3),
    ],
)
def test_complex_cotangents_are_conjugated_as_autograd_does(f):
    leaf = Z.clone().requires_grad_()
    out = f(leaf)
    torch.manual_seed(0)
    ct = torch.randn_like(out.detach())
    (expected,) = torch.autograd.grad(out, leaf, ct)
    value, pullback = lamina.vjp(f, Z)
    torch.testing.assert_close(value, out.detach().resolve_conj())
    torch.testing.assert_close(*pullback(ct), expected)
    cts = torch.stack([ct, 2 * ct])
    (batched,) = lamina.vmap(lambda ct: lamina.vjp(f, Z)[1](ct))(cts)
    torch.testing.assert_close(batched[1], 2 * expected)
    step, z_t = 1e-6, torch.randn_like(Z)
    slope = (f(Z + step * z_t) - f(Z - step * z_t)) / (2 * step)
    torch.testing.assert_close(lamina.jvp(f, (Z,), (z_t,))[1], slope, rtol=1e-5, atol=1e-7)


def test_a_real_operand_of_a_complex_result():
    def f(x):
        return (torch.complex(x, x * 2) * (1 - 1j)).abs() + torch.polar(x, x * 3).imag

    same_as_autograd(f, vector(1.0, 2.0))


# -- views -----------------------------------------------------------------------------------------

X = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T if x.dim() == 2 else x.mT,
        lambda x: x.chunk(2, -1)[1],
        lambda x: x.diagonal(1, -1, 0),
        lambda x: x.expand(5, 2, 3, 4)[1:3],
        lambda x: x.flatten(1),
        lambda x: x.movedim((0, 1), (-1, 0)),
        lambda x: x.permute(-1, 0, 1),
        lambda x: x.reshape(4, -1),
        lambda x: x.select(-1, -2),
        lambda x: x.split([1, 3], 2)[1],
        lambda x: x.squeeze(0).squeeze((0, 1)),
        lambda x: x.transpose(0, -1).unsqueeze(-1),
        lambda x: x.unbind(1)[2],
        lambda x: x.unfold(2, 2, 1),
        lambda x: x.view(6, 4)[::2, -3:-1],
        lambda x: x[..., None, 1:, :],
    ],
)
def test_view(view):
    same_as_autograd(lambda x: view(x).sin() ** 2, X / 10)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[0],
        lambda x: x[:, 1:],
        lambda x: x.diagonal(0, 1, 2),
        lambda x: x.view(6, 4)[1],
        lambda x: x.permute(2, 0, 1)[1],
        lambda x: x.movedim(2, 0)[..., 1],
        lambda x: x.narrow(1, 1, 2).mT,
    ],
)
def test_write_through_a_view(view):
    def f(x):
        base = x * 2
        before = base.exp()
        view(base).mul_(3).add_(1)
        return (base * base).sum() + before.sum()

    leaf = (X / 10).requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(lamina.grad(f)(X / 10), expected)
    tangent = torch.ones_like(X)
    _, pushed = lamina.jvp(f, (X / 10,), (tangent,))
    torch.testing.assert_close(pushed, expected.sum())


def test_write_through_one_of_several_views():
    """PyTorch refuses this; the oracle writes to the same region through a view of its own."""

    def f(x, pieces):
        base = x * 2
        pieces(base).mul_(3)
        return (base * base).sum()

    expected = lamina.grad(f)(X, lambda x: x.narrow(1, 2, 1))
    torch.testing.assert_close(lamina.grad(f)(X, lambda x: x.split(2, 1)[1]), expected)
    torch.testing.assert_close(lamina.grad(f)(X, lambda x: x.unbind(1)[2]), expected)


def test_pieces_that_nobody_uses_are_zeros():
    found = lamina.grad(lambda x: x.split(1)[0].sum() + x.unbind(1)[2].sum())(torch.ones(2, 3))
    assert found.tolist() == [[1, 1, 2], [0, 0, 1]]


# -- indices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[torch.tensor([1, 1, 0])],
        lambda x: x[:, torch.tensor([0, -1, 0])],
        lambda x: x[torch.tensor([[0], [1]]), :, torch.tensor([1, 1])],
        lambda x: x[X > 5],
        lambda x: x.gather(2, torch.zeros(2, 3, 2, dtype=torch.long)),
        lambda x: x.index_select(1, torch.tensor([2, 2])),
        lambda x: x.masked_select(X[0] > 5),
        lambda x: x.take(torch.tensor([0, -1, 0])),
    ],
)
def test_reading_twice_adds_up(read):
    same_as_autograd(lambda x: read(x).sin(), X / 10)


ROWS = torch.tensor([1, 0])


@pytest.mark.parametrize(
    "write",
    [
        lambda x, v: x.index_put((ROWS,), v),
        lambda x, v: x.index_put((torch.tensor([1, 1]),), v, accumulate=True),
        lambda x, v: x.index_put((x > 1,), v[0, 0, 0]),
        lambda x, v: x.index_add(0, torch.tensor([1, 1]), v, alpha=2),
        lambda x, v: x.index_copy(0, ROWS, v),
        lambda x, v: x.index_fill(1, torch.tensor([0, 0]), v[0, 0, 0]),
        lambda x, v: x.masked_fill(x > 1, v[0, 0, 0]),
        lambda x, v: x.masked_scatter(x > 1, v),
        lambda x, v: x.scatter(0, torch.zeros(1, 2, 4, dtype=torch.long), v[:1, :2]),
        lambda x, v: x.scatter_add(0, torch.zeros(1, 3, 4, dtype=torch.long), v[:1]),
        lambda x, v: x.select_scatter(v[0], 0, 1),
        lambda x, v: torch.where(x > 1, x, v),
    ],
)
def test_overwriting(write):
    same_as_autograd(lambda x, v: write(x, v).sin(), X / 10, (X + 1) / 7)


def test_a_source_larger_than_the_index_gets_zeros():
    index = torch.zeros(1, 2, dtype=torch.long)
    for op in (torch.scatter, torch.scatter_add):
        found = lamina.grad(lambda v, op=op: op(torch.zeros(3, 2), 0, index, v).sum())(
            torch.ones(2, 2)
        )
        assert found.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("op", [operator.add, operator.mul], ids=["add", "mul"])
def test_a_result_is_laid_out_like_its_first_operand(op):
    """Python asks the wrapper first where the other operand is a plain tensor."""
    x, y = torch.randn(3, 5), torch.randn(5, 3)

    def f(y):
        return op(x, y.t())

    assert f(y).stride() == (5, 1)
    assert lamina.vjp(f, y)[0].stride() == (5, 1)
    assert lamina.jvp(f, (y,), (y,))[0].stride() == (5, 1)


# -- what has no derivative, and what is kept ------------------------------------------------------


@pytest.mark.parametrize(
    "f", [torch.floor, torch.round, torch.sign, torch.trunc, torch.Tensor.detach]
)
def test_constants_give_zeros(f):
    assert lamina.grad(lambda x: f(x).sum())(vector(0.5, 1.5)).tolist() == [0.0, 0.0]
    assert lamina.jvp(f, (vector(0.5),), (vector(1.0),))[1].tolist() == [0.0]


def test_sgn_of_real_values_gives_zeros():
    assert lamina.grad(lambda x: torch.sgn(x).sum())(vector(0.5, -1.5)).tolist() == [0.0, 0.0]
