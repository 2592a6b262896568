"""`custom_vjp` under every transform: each against the same thing in plain ops."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch

from lamina import SymbolicZero, custom_vjp, grad, hessian, jacrev, jvp, vjp, vmap
from lamina_core.errors import (
    CapturedTensorError,
    NotDifferentiableError,
    RuleError,
    StructureError,
)
from tests.autodiff.test_function import ALL, inputs
from tests.errors.saying import said

DOUBLE = torch.float64
close = torch.testing.assert_close
PAIRS = []
QUICK = ["plain", "vmap", "grad", "vmap(grad) last", "grad(vmap)", "jvp", "hessian", "grad(jvp)"]
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in ALL]


def pair(plain):
    """Registers a function that calls custom ones beside its twin in plain ops."""

    def register(calls):
        PAIRS.append(pytest.param(calls, plain, id=calls.__name__))
        return calls

    return register


def with_rule(fwd, bwd, **options):
    """A decorator: `custom_vjp` with a rule."""

    def decorate(fun):
        f = custom_vjp(fun, **options)
        f.defvjp(fwd, bwd)
        return f

    return decorate


# ---------------------------------------------------------------------------------------------
# Derivatives that are not those of the function tell whether the rule is used.
# ---------------------------------------------------------------------------------------------


@with_rule(lambda x: (x.sin(), x.cos()), lambda cos, ct: (3 * ct * cos,))
def sine(x):
    return x.sin()


@pair(lambda x: 3 * x.sin() - 2 * x.detach().sin())
def residuals_that_are_neither_arguments_nor_outputs(x):
    return sine(x)


@custom_vjp
def calls_itself(x):
    return x.sin()


calls_itself.defvjp(
    lambda x: (calls_itself(x), (x.cos(), calls_itself(x))),
    lambda residuals, ct: (3 * ct * residuals[0] + ct * residuals[1],),
)


def test_the_derivative_of_a_residual_from_the_function_itself_is_the_rules():
    x = inputs()[0]
    first = lambda x: grad(lambda x: calls_itself(x).sum())(x)
    slope = 3 * x.cos() + x.sin()
    close(first(x), slope)
    close(grad(lambda x: first(x).sum())(x), -3 * x.sin() + slope)


@with_rule(lambda x: (x.round(), None), lambda residuals, ct: (ct,))
def straight_through(x):
    return x.round()


@pair(lambda x: 3 * x + ((3 * x).round() - 3 * x).detach())
def rounding(x):
    return straight_through(3 * x)


@with_rule(
    lambda tree, power: ({"y": [tree["x"] ** power, "text"]}, (tree, power, None, "more")),
    lambda residuals, ct: (
        {
            "w": None,
            "x": ct["y"][0] * residuals[1] * residuals[0]["x"] ** (residuals[1] - 1),
        },
        None,
    ),
)
def trees(tree, power):
    return {"y": [tree["x"] ** power, "text"]}


@pair(lambda x: (x**3) * x.detach())
def pytrees_of_anything(x):
    out = trees({"x": x, "w": (x.sin(), 7, None)}, power=3)
    assert out["y"][1] == "text"
    return out["y"][0] * x.detach()


@with_rule(
    lambda f, x, n, y: (f(x) * n * y, (x, y)),
    lambda f, n, residuals, ct: (
        ct * n * residuals[1] * f(residuals[0]),
        ct * n * f(residuals[0]),
    ),
    nondiff_argnums=(0,),
    nondiff_argnames="n",
)
def scaled(f, x, n=2, y=None):
    return f(x) * n * y


@pair(lambda x: 2 * x.exp() * x.sin())
def arguments_that_are_not_differentiated(x):
    return scaled(torch.exp, x, y=x.sin())


@with_rule(
    lambda x, index: ((x[index].sin(), index * 2), (x, index)),
    lambda residuals, ct: (
        torch.zeros_like(residuals[0]).index_put(
            (residuals[1],), ct[0] * residuals[0][residuals[1]].cos()
        ),
        None,
    ),
)
def picked(x, index):
    return x[index].sin(), index * 2


@pair(lambda x: torch.cat([torch.zeros(2, dtype=DOUBLE), x[2:3].sin(), x[2:3].sin()]) * x)
def integer_arguments_and_outputs(x):
    index = torch.tensor([2])
    found, doubled = picked(x, index)
    assert doubled.dtype == torch.int64
    return torch.cat([torch.zeros(2, dtype=DOUBLE), found, found]) * x


@with_rule(lambda x, y: ((x, y * 1), None), lambda residuals, ct: (2 * ct[0], ct[1]))
def hands_through(x, y):
    return x, y


@pair(lambda x: 2 * x.sin() - x.detach().sin() + x)
def an_output_that_is_an_argument(x):
    first, second = hands_through(x.sin(), x)
    return first + second


class Square(torch.autograd.Function):
    """The square of sin, with the derivative of `one_in_another`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin().square()

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return ct * (3 * x.sin() - 2 * x.detach().sin()) * x.exp()


@with_rule(lambda x: (x.sin() * sine(x), x), lambda x, ct: (ct * sine(x) * x.exp(),))
def one_in_another(x):
    return x.sin() * sine(x)


@pair(lambda x: Square.apply(x))
def nested_rules(x):
    return one_in_another(x)


@pytest.mark.parametrize("transform", EACH)
@pytest.mark.parametrize(("calls", "plain"), PAIRS)
def test_under(transform, calls, plain):
    xs = inputs()
    close(ALL[transform](calls, xs.clone()), ALL[transform](plain, xs))


@pytest.mark.parametrize("transform", ["plain", "vmap(grad)", "jvp"])
@pytest.mark.parametrize(("calls", "plain"), PAIRS)
def test_under_the_users_autograd(transform, calls, plain):
    """Twice: the residuals of the first derivative are differentiated too."""
    results = []
    for f in (calls, plain):
        leaf = inputs().requires_grad_()
        out = ALL[transform](f, leaf).sin().sum()
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append((first.detach(), second))
    close(*results)


def test_the_function_runs_where_nothing_is_differentiated_and_fwd_once_elsewhere():
    runs = []

    @custom_vjp
    def f(x):
        runs.append("fun")
        return x * 1

    def fwd(x):
        runs.append("fwd")
        return x * 1, None

    f.defvjp(fwd, lambda residuals, ct: (ct,))
    x = inputs()[0]
    f(x), vmap(f)(inputs()), f(x.clone().requires_grad_().detach())
    with torch.no_grad():
        f(x.clone().requires_grad_())
    assert runs == ["fun"] * 4
    runs.clear()
    hessian(lambda x: f(x).sin().sum())(x)
    jvp(f, (x,), (x,))
    f(x.clone().requires_grad_())
    assert runs == ["fwd"] * 3


def test_the_value_has_the_derivative_of_the_rule_at_the_levels_outside_too():
    """There the ops of fwd could be differentiated instead."""
    x = inputs()[0]
    outer = lambda x: vjp(straight_through, x)[0].sum()
    close(grad(outer)(x), torch.ones_like(x))
    leaf = x.clone().requires_grad_()
    outer(leaf).backward()
    close(leaf.grad, torch.ones_like(x))


def test_symbolic_zeros():
    seen = []

    @custom_vjp
    def f(x, y):
        return x * y, x + y

    def fwd(x, y):
        seen.append((x.perturbed, y["y"].perturbed))
        return (x.value * y["y"].value, x.value + y["y"].value), (x.value, y["y"].value)

    def bwd(residuals, ct):
        _, y = residuals
        seen.append([type(c) is SymbolicZero for c in ct])
        assert repr(ct[1]) == "SymbolicZero(shape=[4], dtype=torch.float64)"
        return ct[0] * y, {"y": ct[1]}

    f.defvjp(fwd, bwd, symbolic_zeros=True)
    f.fun = lambda x, y: (x * y["y"], x + y["y"])
    x, y = inputs()[0], {"y": inputs()[1]}
    x_ct, y_ct = grad(lambda x, y: f(x, y)[0].sum(), (0, 1))(x, y)
    close(x_ct, y["y"])
    close(y_ct["y"], torch.zeros_like(x))
    close(grad(lambda x: f(x, y)[0].sum())(x), y["y"])
    close(vmap(grad(lambda x: f(x, y)[0].sum()))(inputs()), y["y"].expand(3, 4))
    assert seen[:4] == [(True, True), [False, True], (True, False), [False, True]]


def test_zeros_are_filled_in_otherwise():
    f = custom_vjp(lambda x: (x * 2, x.sum()))
    f.defvjp(lambda x: ((x * 2, x.sum()), None), lambda _, ct: (2 * ct[0] + ct[1],))
    close(grad(lambda x: f(x)[1])(inputs()[0]), torch.ones(4, dtype=DOUBLE))


def test_draws_of_fwd_are_repeated_when_it_runs_again():
    @with_rule(
        lambda x: (lambda mask: (x.square() * mask, x * mask))((torch.rand_like(x) < 0.5) * 1.0),
        lambda residual, ct: (2 * ct * residual,),
    )
    def dropped(x):
        raise AssertionError

    x = torch.ones(64, dtype=DOUBLE, requires_grad=True)
    torch.manual_seed(0)
    out = dropped(x)
    mask = (out != 0).double()
    torch.rand(7)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    before = torch.get_rng_state()
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(torch.get_rng_state(), before)
    close(second, 2 * mask)


def test_as_a_decorator_and_a_method():
    class Model:
        factor = 3.0

        @functools.partial(custom_vjp, nondiff_argnums=(0,))
        def scale(self, x):
            """Scales."""
            return x * self.factor

        scale.defvjp(
            lambda self, x: (x * self.factor, None), lambda self, residuals, ct: (ct * self.factor,)
        )

    assert Model.scale.__doc__ == "Scales."
    close(grad(lambda x: Model().scale(x).sum())(inputs()), torch.full((3, 4), 3.0, dtype=DOUBLE))


def test_the_output_can_be_written_to():
    x = inputs()[0].requires_grad_()
    sine(x).mul_(2).sum().backward()
    close(x.grad, 6 * x.detach().cos())
    close(grad(lambda x: sine(x).mul_(x).sum())(inputs()[0]), x.detach().sin() + 3 * x.cos() * x)


def test_nothing_but_the_residuals_is_kept():
    refs = {}

    def fwd(x):
        hidden, kept = x.exp(), x.cos()
        refs.update(hidden=weakref.ref(hidden), kept=weakref.ref(kept))
        return hidden.sin(), kept

    f = custom_vjp(lambda x: x)
    f.defvjp(fwd, lambda kept, ct: (ct * kept,))
    gc.disable()
    try:
        out, pull = vjp(f, inputs()[0])
        assert refs["hidden"]() is None
        del out, pull
        assert refs["kept"]() is None
        leaf = inputs()[0].requires_grad_()
        out = f(leaf)
        assert refs["hidden"]() is None
        del out
        assert refs["kept"]() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


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
