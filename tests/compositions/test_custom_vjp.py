"""`custom_vjp` under every transform: each against the same thing in plain ops."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch

from lamina import SymbolicZero, custom_vjp, grad, hessian, jvp, vjp, vmap
from tests import under
from tests.compositions.ruled import sine, with_rule
from tests.under import ALL, DOUBLE, inputs

close = torch.testing.assert_close
PAIRS = []
EACH = under.each()
pair = functools.partial(under.pair, into=PAIRS)


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
