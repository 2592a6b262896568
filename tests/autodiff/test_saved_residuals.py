"""`saved_residuals`: what a tape keeps, each storage once, and where it comes from."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch.autograd import Function
from torch.autograd.graph import save_on_cpu

from lamina import (
    checkpoint,
    checkpoint_name,
    checkpoint_policies,
    custom_vjp,
    grad,
    print_saved_residuals,
    saved_residuals,
    vmap,
)
from lamina_core.errors import NotDifferentiableError

X = torch.linspace(-1, 1, 15).reshape(5, 3)
W = torch.linspace(1, 2, 9).reshape(3, 3)
MASK = torch.ones(3)


def block(x, w):
    h = checkpoint_name(torch.nn.functional.linear(x, w), "hidden").tanh()
    y = torch.nn.functional.layer_norm(h * MASK, (3,))
    return y.exp().sum()


FIRST = block.__code__.co_firstlineno


def printed(func, *args, **kwargs):
    """What is printed, lines of this file counted from the first of `block`."""
    file = io.StringIO()
    print_saved_residuals(func, *args, file=file, **kwargs)
    return re.sub(
        r"test_saved_residuals\.py:(\d+)",
        lambda found: f"line {int(found[1]) - FIRST}",
        file.getvalue(),
    )


def test_what_is_printed():
    assert printed(block, X, W) == (
        "8 residuals, 328 bytes\n"
        "  f32[3, 3], 36 bytes: argument w, for aten.linear.default at line 1\n"
        "  f32[5, 3], 60 bytes: argument x, for aten.linear.default at line 1\n"
        "  f32[5, 3], 60 bytes: output of aten.tanh.default, for aten.tanh.default at line 1\n"
        "  f32[3], 12 bytes: captured tensor, for aten.mul.Tensor at line 2\n"
        "  f32[5, 3], 60 bytes: output of aten.mul.Tensor, for aten.layer_norm.default at line 2\n"
        "  f32[5, 1], 20 bytes: computed for aten.layer_norm.default, "
        "for aten.layer_norm.default at line 2\n"
        "  f32[5, 1], 20 bytes: computed for aten.layer_norm.default, "
        "for aten.layer_norm.default at line 2\n"
        "  f32[5, 3], 60 bytes: output of aten.exp.default, for aten.exp.default at line 3\n"
    )


def test_what_is_printed_of_a_checkpoint():
    run = checkpoint(block)
    here = printed.__code__.co_firstlineno
    text = printed(run, X, W)
    assert re.sub(r"line \d+", "line n", text) == (
        "2 residuals, 96 bytes\n"
        "  f32[5, 3], 60 bytes: argument x, for a checkpoint at line n\n"
        "  f32[3, 3], 36 bytes: argument w, for a checkpoint at line n\n"
    )
    assert here > FIRST
    keep = checkpoint_policies.save_only_these_names("hidden")
    text = printed(checkpoint(block, policy=keep), X, W)
    assert text.splitlines()[3].startswith(
        "  f32[5, 3], 60 bytes: output of aten.linear.default named 'hidden', for a checkpoint"
    )


def test_a_region_in_a_region_keeps_nothing_of_its_own():
    inner = checkpoint(torch.tanh)
    found = saved_residuals(checkpoint(lambda x: inner(x.sin()).cos().sum()), X)
    assert [residual.why for residual in found] == ["argument x"]


def test_records():
    found = saved_residuals(block, X, W)
    first = found[0]
    assert (first.shape, first.dtype, first.bytes) == ((3, 3), torch.float32, 36)
    assert (first.op, first.why) == ("aten.linear.default", "argument w")
    assert first.source == f"{__file__}:{FIRST + 1}"


def test_each_storage_once_and_views_by_what_they_hold():
    def f(x):
        y = x.sin()
        return (y * y).sum() + (y[:2].exp() * y[:2]).sum() + y.t().sin().sum()

    found = saved_residuals(f, X)
    assert sorted(residual.why for residual in found) == [
        "argument x",
        "output of aten.exp.default",
        "output of aten.sin.default",
    ]
    (whole,) = saved_residuals(lambda x: x[:1].sin().sum(), X)
    assert (whole.shape, whole.bytes) == ((1, 3), 60)


def test_arguments_are_named_as_the_function_names_them():
    def f(params, *rest, scale):
        return (params["w"][0] * rest[1] * scale).sum()

    found = saved_residuals(f, {"w": [X]}, X.sin(), X.cos(), scale=X.exp())
    names = {residual.why for residual in found}
    assert names >= {"argument params['w'][0]", "argument rest[1]", "argument scale"}


def test_functions_with_rules_of_their_own():
    class Twice(Function):
        @staticmethod
        def forward(ctx, x):
            hidden = x.cos()
            ctx.save_for_backward(hidden)
            return x.sin()

        @staticmethod
        def backward(ctx, ct):
            return ct * ctx.saved_tensors[0]

    f = custom_vjp(lambda x: x.sin())
    f.defvjp(lambda x: (x.sin(), x.cos()), lambda cos, ct: (ct * cos,))
    ours, theirs = (saved_residuals(g, X)[0] for g in (lambda x: f(x), lambda x: Twice.apply(x)))
    assert (ours.op, ours.why, ours.bytes) == ("<lambda>", "output of aten.cos.default", 60)
    assert (theirs.op, theirs.why, theirs.bytes) == ("Twice", "computed for Twice", 60)
    assert ours.source.startswith(f"{__file__}:")


def test_borrowed_formulas():
    found = saved_residuals(lambda x: torch.linalg.matrix_exp(x.sin()).sum(), X[:3])
    assert [(residual.op, residual.why) for residual in found] == [
        ("aten.sin.default", "argument x"),
        ("aten.linalg_matrix_exp.default", "output of aten.linalg_matrix_exp.default"),
        ("aten.linalg_matrix_exp.default", "output of aten.sin.default"),
    ]


def test_other_hooks():
    def pack(tensor):
        return tensor * 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (found,) = saved_residuals(lambda x: x.sin().sum(), X)
    assert (found.op, found.why) == ("aten.sin.default", "held by saved-tensor hooks")
    with save_on_cpu():
        (found,) = saved_residuals(lambda x: x.sin().sum(), X)
    assert found.bytes == 60


@pytest.mark.parametrize("outer", [vmap, lambda f: grad(lambda x: f(x).sum())])
def test_inside_a_transform_the_plain_tensors_are_listed(outer):
    found = []

    def f(x):
        found.extend(saved_residuals(lambda x: x.sin().sum(), x))
        return x

    outer(f)(X)
    assert [(residual.shape, residual.why) for residual in found] == [((5, 3), "argument x")]


def test_nothing_is_left_behind():
    saved_residuals(block, X, W)
    with pytest.raises(ZeroDivisionError):
        saved_residuals(lambda x: 1 / 0, X)
    with pytest.raises(NotDifferentiableError):
        saved_residuals(lambda x: x, 3)
    assert torch.equal(grad(lambda x: x.sin().sum())(X), X.cos())
