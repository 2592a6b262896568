"""Cotangents of parts are written into one buffer, and into no other."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lamina

X = torch.arange(20, dtype=torch.float64).reshape(5, 4).sin()


def rows(x):
    state = torch.zeros(4, dtype=x.dtype)
    for row in range(5):
        state = (state + x[row]).tanh()
    return state.sum()


def several_kinds(x):
    return (
        x[1].sin().sum()
        + (x[1:4] * x[:3]).sum()
        + x.diagonal().exp().sum()
        + x.select(1, 2).cos().sum()
        + x[::2, 1:].tanh().sum()
    )


def parts_of_parts(x):
    middle = x[1:4]
    return (middle[0] * middle[1] * middle[0, 1]).sum() + middle.sin().sum()


def part_and_whole(x):
    y = x * 2
    return (y[0] * y[1]).sum() + (y * y).sum() + y[0].sum()


def whole_and_part(x):
    y = x * 2
    first = y[0] * y[1]
    return (y * y).sum() * first.sum() + (y.t() @ y).sum()


def one_cotangent_twice(x):
    # The sum hands the same tensor to both of its operands: neither may be written to.
    y, z = x * 2, x * 3
    both = y[1:] + z[1:]
    return (both * both).sum() + y[2].sum() + (z * y).sum()


def written(x):
    y = x.clone()
    y[1] = y[0] * 2
    y[:, 2] += y[:, 1]
    return (y * y).sum()


def a_part_alone(x):
    return x[2, 1:3].exp().sum()


FUNCTIONS = [
    rows,
    several_kinds,
    parts_of_parts,
    part_and_whole,
    whole_and_part,
    one_cotangent_twice,
    written,
    a_part_alone,
]


def by_autograd(f, x):
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
    if x.is_complex():
        return grad.detach(), None
    return grad.detach(), torch.autograd.grad((grad * X.cos()).sum(), x)[0]


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", ["rows", "columns", "complex"])
def test_gradients_are_those_of_autograd(f, layout):
    x = X.t().contiguous().t() if layout == "columns" else X
    if layout == "complex":
        x = torch.complex(X, X.cos())
        real, f = f, lambda z: torch.view_as_real(real(z)).sum()
    grad, second = by_autograd(f, x)
    torch.testing.assert_close(lamina.grad(f)(x), grad)
    if second is not None:
        along = lamina.grad(lambda x: (lamina.grad(f)(x) * X.cos()).sum())
        torch.testing.assert_close(along(x), second)
    torch.testing.assert_close(
        lamina.vmap(lamina.grad(f))(torch.stack([x, -x])),
        torch.stack([grad, by_autograd(f, -x)[0]]),
    )


def test_a_pullback_may_be_used_again():
    _, pullback = lamina.vjp(several_kinds, X)
    one = torch.ones((), dtype=X.dtype)
    first = pullback(one)[0].clone()
    torch.testing.assert_close(pullback(one)[0], first)
    torch.testing.assert_close(pullback(2 * one)[0], 2 * first)


def test_the_cotangent_given_is_not_written_to():
    _, pullback = lamina.vjp(lambda x: (x[1:], x[0], x), X)
    cts = (torch.ones(4, 4), torch.ones(4), torch.ones(5, 4))
    cts = tuple(ct.double() for ct in cts)
    found = pullback(cts)[0]
    torch.testing.assert_close(found, torch.full((5, 4), 2.0, dtype=torch.float64))
    assert all((ct == 1).all() for ct in cts)
    found.zero_()
    assert all((ct == 1).all() for ct in cts)


def test_autograd_of_the_user_follows():
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(lamina.grad(several_kinds)(x).sin().sum(), x)
    y = X.clone().requires_grad_()
    (inner,) = torch.autograd.grad(several_kinds(y), y, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(inner.sin().sum(), y)[0])


class Written(TorchDispatchMode):
    """Counts the elements that factories of zeros make."""

    def __init__(self):
        super().__init__()
        self.zeros = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (
            torch.ops.aten.zeros,
            torch.ops.aten.new_zeros,
            torch.ops.aten.select_backward,
            torch.ops.aten.slice_backward,
        ):
            self.zeros += out.numel()
        return out


@pytest.mark.parametrize("count", [10, 40])
def test_the_work_of_a_loop_over_rows_is_linear(count):
    x = torch.randn(count, 3)
    _, pullback = lamina.vjp(lambda x: sum(x[i].sin() for i in range(count)), x)
    with Written() as mode:
        pullback(torch.ones(3))
    assert mode.zeros == x.numel()
