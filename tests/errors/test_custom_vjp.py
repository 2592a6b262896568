"""What a `custom_vjp` function and its rule may not capture or return, and the texts about it."""

from __future__ import annotations

import pytest
import torch

from lamina import custom_vjp, grad, hessian, jacrev, jvp
from lamina_core.errors import (
    CapturedTensorError,
    NotDifferentiableError,
    RuleError,
    StructureError,
)
from tests.compositions.ruled import sine, with_rule
from tests.errors.saying import said
from tests.under import ALL, DOUBLE, inputs

close = torch.testing.assert_close


@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "grad(vmap)", "jvp", "grad(grad)"])
@pytest.mark.parametrize("way", ["in an op", "as the output", "as a residual"])
def test_a_captured_tensor_with_a_derivative(transform, way):
    def f(x):
        made = x.sin()
        fwd = {
            "in an op": lambda y: (y * made, None),
            "as the output": lambda y: (made, None),
            "as a residual": lambda y: (y * 1, made),
        }[way]
        g = custom_vjp(lambda y: y)
        g.defvjp(fwd, lambda _, ct: (ct,))
        return g(x * 2)

    with pytest.raises(CapturedTensorError, match="the fwd of <lambda> uses a tensor that is not"):
        ALL[transform](f, inputs())


def test_a_captured_tensor_of_each_owner():
    w = inputs()[1].requires_grad_()

    @with_rule(lambda x: (x * w, None), lambda _, ct: (ct,))
    def scale(x):
        return x * w

    assert said(CapturedTensorError, lambda: scale(inputs()[0].requires_grad_())) == (
        "the fwd of scale uses a tensor that is not one of its differentiable arguments\n"
        "  it carries a derivative at level 0: PyTorch's autograd\n"
        "  captured: tensor of shape [4]\n"
        "  to fix: pass it as an argument, or detach it"
    )
    with pytest.raises(CapturedTensorError):
        grad(lambda x: scale(x).sum())(inputs()[0])
    close(scale(inputs()[0]), inputs()[0] * w)  # nothing is differentiated by the rule
    found = said(
        CapturedTensorError, lambda: jvp(lambda x: grad(lambda y: sum_of(y, x))(x), (w,), (w,))
    )
    assert found.splitlines()[1] == "  it carries a derivative at level 1: jvp"


def sum_of(y, captured):
    f = custom_vjp(lambda y: y)
    f.defvjp(lambda y: (y * captured, None), lambda _, ct: (ct,))
    return f(y).sum()


def test_captured_constants_and_what_is_made_inside_are_allowed():
    constant = inputs()[1]

    def f(x):
        mask = torch.ones(4, dtype=DOUBLE)

        @with_rule(
            lambda y: (y * mask * constant + grad(lambda z: (z * y).sum())(y), None),
            lambda _, ct: (ct * mask,),
        )
        def g(y):
            raise AssertionError

        return g(x).sin().sum()

    x = inputs()[0]
    close(grad(f)(x), (x * constant + x).cos())
    close(hessian(f)(x), torch.diag(-(x * constant + x).sin()))


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "jvp(grad)", "vmap(jvp)"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_rule_may_capture_constants_of_the_level_it_is_for(transform, order):
    def f(x):
        twos = 2 * torch.ones(4, dtype=DOUBLE)
        g = custom_vjp(lambda y: y.sin())

        def bwd(y, ct):
            first, second = [y.cos() * ct, twos][::order]
            return (first * second,)

        g.defvjp(lambda y: (y.sin(), y), bwd)
        return g(x)

    close(
        ALL[transform](f, inputs()),
        ALL[transform](lambda x: 2 * x.sin() - x.detach().sin(), inputs()),
    )


def test_a_rule_that_captures_a_tensor_of_the_level_it_is_for():
    def f(x):
        g = custom_vjp(lambda y: y.sin())
        g.defvjp(lambda y: (y.sin(), None), lambda _, ct: (x * ct,))
        return g(x)

    with pytest.raises(CapturedTensorError, match="a rule of <lambda> uses a tensor that it is"):
        jvp(f, (inputs(),), (inputs(),))


def test_forward_mode_of_pytorch():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs()[0], inputs()[1])
        assert said(NotDifferentiableError, lambda: sine(dual)) == (
            "sine has a rule of its own, which torch.autograd.forward_ad does not know\n"
            "  it got a dual tensor of shape [4]\n"
            "  to fix: use lamina.jvp"
        )


def answers(fwd=None, bwd=None):
    """A function of a dict and a tensor with a rule that is wrong somewhere."""

    def f(tree, y):
        return tree["a"] * y

    g = custom_vjp(f)
    g.defvjp(fwd or (lambda tree, y: (tree["a"] * y, None)), bwd or (lambda _, ct: ({"a": ct}, ct)))
    x = torch.ones(2)
    return lambda: grad(lambda tree: g(tree, x).sum())({"a": x})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            answers(fwd=lambda tree, y: tree["a"]),
            "the fwd of f returned a TrackedTensor\n"
            "  expected: a pair (output, residuals)\n"
            "  to fix: return (output, residuals)",
        ),
        (
            answers(bwd=lambda _, ct: ct),
            "the bwd of f returned a Tensor\n"
            "  expected: a tuple of 2, one cotangent for each differentiated argument\n"
            "  to fix: return such a tuple, with None for an argument without one",
        ),
        (
            answers(bwd=lambda _, ct: (ct,)),
            "the bwd of f returned a tuple of 1\n"
            "  expected: a tuple of 2, one cotangent for each differentiated argument\n"
            "  to fix: return such a tuple, with None for an argument without one",
        ),
        (
            answers(bwd=lambda _, ct: ({"b": ct}, ct)),
            "the bwd of f returned cotangents whose structure is not that of the arguments\n"
            "  expected: ({'a': *}, *)\n"
            "  got: ({'b': *}, *)\n"
            "  to fix: return one entry for each leaf of the arguments, None for zero",
        ),
        (
            answers(bwd=lambda _, ct: ({"a": ct[:1]}, ct)),
            "the bwd of f returned cotangents that do not fit the arguments\n"
            "  expected at [0]['a']: torch.float32 tensor of shape [2]\n"
            "  got: torch.float32 tensor of shape [1]\n"
            "  to fix: return a tensor of the same shape and dtype, or None for zero",
        ),
        (
            answers(bwd=lambda _, ct: ({"a": ct.double()}, ct)),
            "the bwd of f returned cotangents that do not fit the arguments\n"
            "  expected at [0]['a']: torch.float32 tensor of shape [2]\n"
            "  got: torch.float64 tensor of shape [2]\n"
            "  to fix: return a tensor of the same shape and dtype, or None for zero",
        ),
    ],
    ids=["no pair", "no tuple", "too few", "other keys", "other shape", "other dtype"],
)
def test_a_rule_that_returns_what_does_not_fit(call, text):
    assert said(RuleError, call) == text


def test_a_function_without_a_rule():
    assert said(RuleError, lambda: custom_vjp(torch.sin)(inputs())) == (
        "sin is a custom_vjp function without a rule\n"
        "  to fix: define it, with sin.defvjp(fwd, bwd)"
    )


def test_arguments_that_do_not_fit():
    def f(x, *, scale=1.0):
        return x * scale

    g = custom_vjp(f)
    g.defvjp(lambda x: (x, None), lambda _, ct: (ct,))
    assert said(StructureError, lambda: g(inputs())) == (
        "f has arguments that cannot be given by position: scale\n"
        "  a rule of the user's takes all arguments by position\n"
        "  to fix: take keyword-only parameters out of its signature"
    )
    assert said(StructureError, lambda: custom_vjp(sum_of, nondiff_argnames="z")) == (
        "nondiff_argnames of sum_of has 'z', which is no parameter\n"
        "  parameters: y, captured\n"
        "  to fix: name a parameter"
    )
    h = custom_vjp(lambda x: x, nondiff_argnums=1)
    h.defvjp(lambda x: (x, None), lambda _, ct: (ct,))
    assert said(StructureError, lambda: h(inputs())).startswith(
        "nondiff_argnums of <lambda> is (1,), but it is called with 1 arguments"
    )


def test_an_exception_in_a_rule_leaves_the_levels_working():
    @with_rule(lambda x: 1 / 0, lambda _, ct: (ct,))
    def fails(x):
        return x

    def f(x):
        with pytest.raises(ZeroDivisionError):
            grad(lambda y: (fails(y) * x).sum())(x)
        with pytest.raises(ZeroDivisionError):
            fails(x)
        return sine(x).sum()

    x = inputs()[0]
    close(grad(f)(x), 3 * x.cos())
    close(jacrev(sine)(x), torch.diag(3 * x.cos()))
