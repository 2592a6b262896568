"""Writes inside `vmap` where the caller's own autograd follows: the oracle is a loop of it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamina import functional_call, stack_module_state, vmap

DOUBLE = torch.float64


def add(a, w):
    b = a.clone()
    b.add_(w)
    return b * w


def multiplied(a, w):
    return (a * 1).mul_(w)


def copied(a, w):
    b = torch.zeros_like(a)
    b.copy_(w)
    return b * a


def an_element(a, w):
    b = torch.zeros_like(a)
    b[0] = a[0] * w[1]
    return b


def a_slice(a, w):
    b = a * 1
    b[:2] = w[:2] * a[:2]
    return b * w


def made_inside(a, w):
    b = torch.zeros(4, dtype=a.dtype)
    b[:2] = w[:2]
    b[2:] = a[2:]
    return b * w


def detached(a, w):
    b = a.detach().clone()
    b[1:].mul_(w[1:])
    return b


def a_mask(a, w):
    b = (a > 9).to(a.dtype)
    b += w
    return b * a


def transposed(a, w):
    b = a.reshape(2, 2) * 1
    b.T.copy_(w.reshape(2, 2))
    return b * a.reshape(2, 2)


def diagonal(a, w):
    b = a.reshape(2, 2) * 1
    b.diagonal().add_(w[:2])
    return b * b


def flattened(a, w):
    b = a.reshape(2, 2) * 1
    b.view(-1).mul_(w)
    b.flatten()[1:].add_(a[1:])
    return b


def filled(a, w):
    b = a * w
    c = b * 3
    b[0].fill_(2.0)
    return c + b


def saved_before(a, w):
    b = a * 1
    c = b * w
    b[1:] = 0
    return c + b


def a_view_before_anyone_follows(a, w):
    b = a * 1
    first, rest = b[0], b[1:]
    rest.add_(w[1:])
    return b * first + rest.sum()


def indexed(a, w):
    b = a * 1
    b[torch.tensor([0, 2])] = w[:2]
    b.index_add_(0, torch.tensor([1]), w[3:])
    b.masked_fill_(torch.tensor([False, False, False, True]), 3.0)
    return b * w


def under_no_grad(a, w):
    b = a * w
    with torch.no_grad():
        b.mul_(2)
    return b * w


def _in_place(name):
    def activated(a, w):
        return getattr(a * w, name)() * w

    activated.__name__ = name
    return activated


ACTIVATIONS = [
    *map(_in_place, ["exp_", "sigmoid_", "tanh_", "sqrt_", "rsqrt_", "reciprocal_", "relu_"]),
    lambda a, w: (a * w).pow_(3),
    lambda a, w: F.elu(a * w, inplace=True),
    lambda a, w: F.leaky_relu(a * w, inplace=True),
    lambda a, w: F.selu(a * w, inplace=True),
    lambda a, w: F.hardswish(a * w, inplace=True),
    lambda a, w: F.threshold(a * w, 2.0, 1.0, inplace=True),
    lambda a, w: (a * w).cumprod_(0),
    lambda a, w: (a * w).xlogy_(w),
]
PROGRAMS = [
    *(add, multiplied, copied, an_element, a_slice, made_inside, detached, a_mask, transposed),
    *(diagonal, flattened, filled, a_view_before_anyone_follows, indexed),
    *ACTIVATIONS,
]


def inputs():
    return (
        torch.arange(12.0, dtype=DOUBLE).reshape(3, 4) / 4 + 0.3,
        torch.tensor([1.5, 0.5, 2.0, 1.0], dtype=DOUBLE).requires_grad_(),
    )


def loop(f, xs, w):
    return torch.stack([f(x, w) for x in xs])


UNDER = {
    "vmap": lambda f, xs, w: vmap(f, (0, None))(xs, w),
    "captured": lambda f, xs, w: vmap(lambda x: f(x, w))(xs),
    "last": lambda f, xs, w: vmap(lambda x: f(x, w), -1)(xs.movedim(0, -1)),
    "chunks": lambda f, xs, w: vmap(lambda x: f(x, w), chunk_size=2)(xs),
    "mapped w": lambda f, xs, w: vmap(f)(xs, w.expand(3, 4)),
    "vmap(vmap)": lambda f, xs, w: vmap(vmap(lambda x: f(x, w)))(xs[None])[0],
}


@pytest.mark.parametrize("follows", ["w", "both"])
@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("transform", UNDER)
def test_gradients(transform, f, follows):
    xs, w = inputs()
    leaves = [w]
    if follows == "both":
        leaves.append(xs.requires_grad_())
    expected, actual = loop(f, xs, w), UNDER[transform](f, xs, w)
    torch.testing.assert_close(actual, expected)
    assert actual.requires_grad == expected.requires_grad
    weights = torch.arange(1.0, expected.numel() + 1, dtype=DOUBLE).reshape(expected.shape)
    for got, wanted in zip(
        torch.autograd.grad((actual * weights).sum(), leaves, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_a_write_to_what_was_saved():
    xs, w = inputs()
    out = vmap(lambda a: saved_before(a, w))(xs)  # a loop is an error of PyTorch's
    (w_ct,) = torch.autograd.grad(out.sum(), w)
    torch.testing.assert_close(w_ct, xs.sum(0))
    out = vmap(lambda a: under_no_grad(a, w))(xs)
    torch.testing.assert_close(out, 2 * xs * w * w)


WRITES = {
    "whole": lambda a, w: a.add_(w),
    "an element": lambda a, w: a[0].add_(w[1]),
    "a slice": lambda a, w: a[1:].sub_(w[1:]),
    "assigned": lambda a, w: a.__setitem__(slice(0, 2), w[:2]),
    "a view of a view": lambda a, w: a.view(2, 2).T[0].copy_(w[:2]),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("in_dim", [0, 1])
def test_arguments_are_written_to(name, in_dim):
    def f(a):
        WRITES[name](a, w)
        return a.sum()

    base, w = inputs()
    results = []
    for run in (lambda x: torch.stack([f(x.select(in_dim, i)) for i in range(3)]), vmap(f, in_dim)):
        x = (base if in_dim == 0 else base.T).clone()
        if name == "a view of a view" and in_dim == 1:
            x = x.T.contiguous().T
        out = run(x)
        assert x.requires_grad
        results.append((x, out, torch.autograd.grad(x.sum() + out.sum(), w)[0]))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_an_argument_that_was_saved_is_an_error():
    def f(a):
        c = a * w
        a[1:].mul_(2)
        return c

    xs, w = inputs()
    out = vmap(f)(xs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), w)


def test_an_ensemble_with_activations_in_place():
    models = [
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)).double()
        for _ in range(3)
    ]
    params, buffers = stack_module_state(models)
    x = torch.linspace(-1, 1, 15, dtype=DOUBLE).reshape(5, 3)
    out = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
    grads = torch.autograd.grad(out.square().sum(), list(params.values()))
    for i, model in enumerate(models):
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close([grad[i] for grad in grads], list(expected))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_loss_that_writes_in_place_itself(reduction):
    xs, w = inputs()
    target = torch.tensor([1.0, -1.0], dtype=DOUBLE)

    def f(a):
        left, right = (a * w).reshape(2, 2), (a + w).reshape(2, 2)
        return F.cosine_embedding_loss(left, right, target, reduction=reduction)

    for got, wanted in itertools.pairwise(
        [
            torch.autograd.grad(out.sum(), w)[0]
            for out in (vmap(f)(xs), loop(lambda a, _: f(a), xs, w))
        ]
    ):
        torch.testing.assert_close(got, wanted)
