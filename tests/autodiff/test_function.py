"""`torch.autograd.Function` under every transform: each against the same thing in plain ops."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch.autograd import Function

from lamina import grad, jacfwd, jvp, linearize, vjp, vmap
from lamina_core.errors import DataDependentError, NotDifferentiableError
from tests.autodiff.functions import (
    PAIRS,
    GradientsInside,
    Numpy,
    Product,
    Sin,
    legacy,
    saved_output,
)
from tests.under import ALL, DOUBLE, FIRST, inputs


@pytest.mark.parametrize("transform", ALL)
@pytest.mark.parametrize(("calls", "plain"), PAIRS)
def test_under(transform, calls, plain):
    xs = inputs()
    run = ALL[transform]
    torch.testing.assert_close(run(calls, xs.clone()), run(plain, xs))
    assert torch.equal(xs, inputs())


def test_forward_runs_once_on_plain_tensors():
    seen = []

    class Counted(Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(type(x))
            return x * 2

        @staticmethod
        def backward(ctx, ct):
            return ct * 2

    x = inputs()[0]
    grad(lambda x: grad(lambda x: jvp(Counted.apply, (x,), (x,))[1].square().sum())(x).sum())(x)
    assert seen == [torch.Tensor]


def test_numpy_inside():
    x = inputs()[0]
    expected = (x**3).cos() * 3 * x.square()
    torch.testing.assert_close(grad(lambda x: Numpy.apply(x).sin().sum())(x), expected)
    value, _ = vjp(lambda x: grad(lambda x: Numpy.apply(x).sum())(x), x)
    torch.testing.assert_close(value, 3 * x.square())


def test_gradients_inside_forward():
    x = inputs()[0]
    found = grad(lambda x: grad(lambda y: GradientsInside.apply(y))(x.detach()).sum() + x.sum())(x)
    torch.testing.assert_close(found, torch.ones_like(x))
    found = grad(lambda x: GradientsInside.apply(x))(x)
    torch.testing.assert_close(found, x.cos() * x + x.sin())


# ---------------------------------------------------------------------------------------------
# The user's own autograd around and beside the transforms
# ---------------------------------------------------------------------------------------------


def test_under_the_users_autograd():
    xs = inputs()
    for run in (FIRST["vmap"], FIRST["grad"], FIRST["vmap(grad)"], FIRST["jvp"], ALL["hessian"]):
        for calls, plain in ((legacy, PAIRS[0].values[1]), (saved_output, torch.exp)):
            grads = []
            for f in (calls, plain):
                leaf = xs.clone().requires_grad_()
                out = run(f, leaf).sin().sum()
                (first,) = torch.autograd.grad(out, leaf, create_graph=True)
                (second,) = torch.autograd.grad(first.square().sum(), leaf)
                grads.append((first.detach(), second))
            torch.testing.assert_close(*grads)


def test_a_captured_parameter_that_requires_grad():
    weight = torch.tensor([1.0, 2.0, 0.5, -1.0], dtype=DOUBLE, requires_grad=True)
    x = inputs()[0]

    def loss(x):
        return Product.apply(x, 2.0, weight)[0].sin().sum()

    found = grad(loss)(x)
    (weight_ct,) = torch.autograd.grad(found.sum(), weight)
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((y * weight * 2).sin().sum(), y, create_graph=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weight_ct, torch.autograd.grad(expected.sum(), weight)[0])


def test_outside_of_transforms_nothing_changes():
    x = inputs()[0].requires_grad_()
    out = Sin.apply(x)
    assert type(out.grad_fn).__name__ == "SinBackward"
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], 3 * x.cos())


def test_an_apply_stored_before_the_import():
    program = """
import torch

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, ct):
        return ct * 2

stored = Doubled.apply

from lamina import grad

assert grad(lambda x: stored(x).sum())(torch.ones(2)).tolist() == [2, 2]
"""
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": path})


def test_only_constants():
    """No argument is transformed: an output can still be written to with values that are."""
    constant = inputs()[1]

    def f(x):
        out = Sin.apply(constant)
        out.mul_(x)
        return out.sum()

    torch.testing.assert_close(grad(f)(inputs()[0]), constant.sin())


def test_under_no_grad():
    def f(x):
        with torch.no_grad():
            y = Sin.apply(x)
        return (x * y).sum()

    x = inputs()[0]
    torch.testing.assert_close(grad(f)(x), x.sin())


# ---------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_which_level_asks_for_gradients():
    """`needs_input_grad` tells each level what that level needs."""
    seen = []

    class Needs(Function):
        @staticmethod
        def forward(ctx, x, y):
            seen.append(ctx.needs_input_grad)
            return x * 2 + y

        @staticmethod
        def backward(ctx, ct):
            seen.append(ctx.needs_input_grad)
            return ct * 2, ct

    x, y = inputs()[0], inputs()[1]
    grad(lambda y: grad(lambda x: Needs.apply(x, y).sin().sum())(x).sum())(y)
    assert seen == [(True, True), (True, False), (False, True)]


def test_nothing_is_kept_alive():
    refs = []

    class Kept(Function):
        @staticmethod
        def forward(ctx, x):
            out = x.exp()
            ctx.save_for_backward(out)
            refs.append(weakref.ref(out))
            return out

        @staticmethod
        def backward(ctx, ct):
            return ct * ctx.saved_tensors[0]

    gc.disable()
    try:
        grad(lambda x: Kept.apply(x).sum())(inputs()[0])
        grad(lambda x: grad(lambda x: Kept.apply(x).sum())(x).sum())(inputs()[0])
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_threads():
    results = []

    def work():
        names = ("grad", "vmap(grad)", "hessian", "jvp")
        results.extend(ALL[name](legacy, inputs()) for name in names)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12


def test_an_exception_in_forward_or_backward_leaves_the_levels_working():
    class Fails(Function):
        @staticmethod
        def forward(ctx, x):
            raise KeyError("stop")

    class FailsBackward(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, ct):
            raise KeyError("stop")

    def f(x):
        for function in (Fails, FailsBackward):
            with pytest.raises(KeyError):
                grad(lambda x, apply=function.apply: apply(x).sum())(x)
            with pytest.raises(KeyError):
                vmap(grad(lambda x, apply=function.apply: apply(x * x)))(x)
        return x.sin().sum()

    torch.testing.assert_close(grad(f)(inputs()[0]), inputs()[0].cos())


def under_no_grad(x, g):
    with torch.no_grad():
        return g * x.cos()


def recomputed(x, g):
    with torch.enable_grad():
        inside = x.detach().requires_grad_()
        return torch.autograd.grad(inside.sin(), inside, g)[0]


# A backward that is no function of the cotangents, or none that can be transposed. With jvp by
# `torch.autograd.forward_ad` PyTorch refuses every Function without a jvp of its own.
OPAQUE = {
    "no_grad": under_no_grad,
    "detach": lambda x, g: g.detach() * x.cos(),
    "detached in part": lambda x, g: g * x.cos() + g.detach(),
    "tolist": lambda x, g: torch.tensor(g.tolist(), dtype=g.dtype) * x.cos(),
    "clipped": lambda x, g: g.clamp(-0.1, 0.1),
    "normalised": lambda x, g: g / g.norm(),
    "constant": lambda x, g: torch.ones_like(x),
    "a graph of its own": recomputed,
    "looked at": lambda x, g: g if g.sum() != 7 else 2 * g,
}


def sine(pull_back):
    """A sine whose backward calls a function of x and the cotangent."""

    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return pull_back(ctx.saved_tensors[0], g)

    return Sine.apply


@pytest.mark.parametrize("name", OPAQUE)
def test_no_tangent_is_made_of_an_opaque_backward(name):
    f, x = sine(OPAQUE[name]), inputs()[0]
    for run in (
        lambda: jvp(f, (x,), (x,)),
        lambda: vmap(lambda x: jvp(f, (x,), (x,))[1])(x[None]),
        lambda: linearize(f, x),
        lambda: jacfwd(f)(x),
    ):
        with pytest.raises((NotDifferentiableError, DataDependentError)):
            run()


def test_a_backward_in_parts():
    def pull_back(x, g):
        left = torch.where(x > 0, g, 0) * x.cos()
        right = g.masked_fill(x > 0, 0).clone().mul_(x.cos())
        return (left + right)[torch.arange(len(x))]

    f, (x, t, _) = sine(pull_back), inputs()
    torch.testing.assert_close(jvp(f, (x,), (t,))[1], x.cos() * t)
    second = jvp(lambda x: jvp(f, (x,), (t,))[1], (x,), (t,))[1]
    torch.testing.assert_close(second, -x.sin() * t * t)
    torch.testing.assert_close(grad(lambda x: jvp(f, (x,), (t,))[1].sum())(x), -x.sin() * t)
