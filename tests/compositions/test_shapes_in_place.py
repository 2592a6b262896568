"""`t_()` and its kin, on arguments and on what is made inside, with views taken before and after.

The oracles are loops of plain PyTorch and `torch.autograd`.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from lamina import grad, hessian, jacrev, jvp, vjp, vmap

DOUBLE = torch.float64
RESHAPE = {
    "t_": lambda x: x.t_(),
    "transpose_": lambda x: x.transpose_(0, 1),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "squeeze_": lambda x: x.squeeze_(),
    "squeeze_ of a dim": lambda x: x.squeeze_(1),
    "swapaxes_": lambda x: x.swapaxes_(0, 1),
    "swapdims_": lambda x: x.swapdims_(0, 1),
    "as_strided_": lambda x: x.as_strided_((2, 2), (1, 2)),
    "twice": lambda x: x.t_().unsqueeze_(1),
}


def inputs(name):
    shape = (3, 3, 1) if name == "squeeze_" else (3, 3, 1, 2) if "of a dim" in name else (3, 3, 2)
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1, count, dtype=DOUBLE).reshape(shape)


def weighted(x):
    return x * torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device).reshape(x.shape)


def of_an_argument(x, change):
    change(x)
    return weighted(x)


def of_what_is_made(x, change):
    x = x * 1
    change(x)
    return weighted(x)


def written_after(x, change):
    change(x).mul_(3)
    return (x * x).sum(0)


def views_before(x, change):
    first, last = x[0], x[-1]
    change(x)
    x.mul_(3)
    last.add_(1)
    return weighted(x).sum() * 2 + first.sum() * last.sum()


def a_view(x, change):
    part = x[1:]
    change(part).mul_(3)
    return weighted(x)


PROGRAMS = [of_an_argument, of_what_is_made, written_after, views_before, a_view]


def gradient(f, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf.clone()), leaf)[0]


def pushed(f, x, v):
    return torch.func.jvp(lambda x: f(x.clone()), (x,), (v,))[1]


# Strides reach beyond a view, and in a derivative there is no memory there.
CASES = [
    pytest.param(name, program, id=f"{name}-{program.__name__}")
    for name, program in itertools.product(RESHAPE, PROGRAMS)
    if name != "as_strided_" or program not in (views_before, a_view)
]


@pytest.mark.parametrize(("name", "program"), CASES)
def test_under(name, program):
    xs = inputs(name)

    def f(x):
        return program(x, RESHAPE[name])

    def loss(x):
        return f(x).sin().sum()

    def pulled(x):
        out, pullback = vjp(f, x)
        return pullback(torch.cos(out))[0]

    x, v = xs[1], xs[0].cos()
    out = f(x.clone())
    gradients = torch.stack([gradient(loss, x) for x in xs])
    plain = torch.autograd.functional
    for actual, expected in {
        "vmap": (vmap(f)(xs.clone()), torch.stack([f(x.clone()) for x in xs])),
        "vmap last": (
            vmap(f, -1)(xs.clone().movedim(0, -1)),
            torch.stack([f(x.clone()) for x in xs]),
        ),
        "grad": (grad(loss)(x.clone()), gradients[1]),
        "vjp": (pulled(x.clone()), gradient(lambda x: (f(x) * out.cos()).sum(), x)),
        "jvp": (jvp(f, (x.clone(),), (v,))[1], pushed(f, x, v)),
        "jacrev": (jacrev(f)(x.clone()), plain.jacobian(lambda x: f(x.clone()), x)),
        "vmap(grad)": (vmap(grad(loss))(xs.clone()), gradients),
        "grad(vmap)": (grad(lambda xs: vmap(loss)(xs.clone()).sum())(xs), gradients),
        "hessian": (hessian(loss)(x.clone()), plain.hessian(lambda x: loss(x.clone()), x)),
    }.values():
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("transform", [grad, vmap])
def test_the_caller_sees_what_is_written_and_not_the_shape(transform):
    x = torch.ones(2, 2, 2, dtype=DOUBLE) if transform is vmap else torch.ones(2, 3, dtype=DOUBLE)
    shape = x.shape

    def f(x):
        x.t_().mul_(2)
        return x.sum()

    transform(f)(x)
    assert x.shape == shape
    assert x.eq(2).all()


def test_views_taken_before_an_exchange_of_data_show_the_old():
    def of_a_constant(x):
        y = torch.ones(2, dtype=DOUBLE)
        first = y[0]
        y.data = torch.zeros(2, dtype=DOUBLE)
        y.add_(x[0])
        return first * x.sum() + y.sum()

    def of_an_example(x):
        y = x * 2
        first = y[0]
        y.data = torch.zeros(3, 2, dtype=DOUBLE)
        y.add_(1)
        first.mul_(2)
        return first.sum() * y.sum()

    xs = inputs("t_")
    for f in (of_a_constant, of_an_example):
        torch.testing.assert_close(vmap(f)(xs), torch.stack([f(x) for x in xs]))
