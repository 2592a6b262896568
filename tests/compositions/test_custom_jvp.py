"""`custom_jvp` under every transform: each against the same thing in plain ops."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch

from lamina import SymbolicZero, custom_jvp, grad, hessian, jacrev, jvp, vjp, vmap
from lamina_core.errors import CapturedTensorError, RuleError, StructureError
from tests import under
from tests.errors.saying import said
from tests.under import ALL, DOUBLE, inputs

close = torch.testing.assert_close
PAIRS = []
EACH = under.each()
pair = functools.partial(under.pair, into=PAIRS)


# Derivatives that are not those of the function tell whether the rule is used.


@custom_jvp
def sine(x):
    return x.sin()


@sine.defjvp
def sine_jvp(primals, tangents):
    (x,), (x_t,) = primals, tangents
    return sine(x), 3 * x_t * x.cos()


@pair(lambda x: 3 * x.sin() - 2 * x.detach().sin())
def a_rule(x):
    return sine(x)


@custom_jvp
def product(x, y):
    return x * y


product.defjvps(lambda x_t, out, x, y: 2 * x_t * y, lambda y_t, out, x, y: y_t * out / y)


@pair(lambda x: 2 * x * x.exp().detach() + x.detach() * x.exp() - 2 * x.detach() * x.exp().detach())
def a_rule_for_each_argument_once(x):
    return product(x, x.exp().detach()) + product(x.detach(), x.exp()) - (x * x.exp()).detach()


@custom_jvp
def only_the_first(x, y):
    return x * y.sin()


only_the_first.defjvps(lambda x_t, out, x, y: x_t * y.sin(), None)


@pair(lambda x: Frozen.apply(x.exp(), x))
def an_argument_without_a_rule(x):
    return only_the_first(x.exp(), x)


class Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x * y.sin()

    @staticmethod
    def backward(ctx, ct):
        (y,) = ctx.saved_tensors
        return ct * y.sin(), None


@functools.partial(custom_jvp, nondiff_argnums=(1,), nondiff_argnames="f")
def trees(tree, power, scale=2.0, f=None):
    return {"y": [f(tree["x"]) ** power * scale, "text"], "none": None}


@trees.defjvp
def trees_jvp(power, f, primals, tangents):
    tree, scale = primals
    tree_t, scale_t = tangents
    assert (scale, scale_t) == (3.0, 0.0)
    assert tree_t["w"] is None
    x = tree["x"]
    y_t = power * f(x) ** (power - 1) * tree_t["x"] * scale
    return trees(tree, power, scale, f), {"y": [y_t, None], "none": None}


@pair(lambda x: Cubed.apply(x))
def pytrees_of_anything(x):
    out = trees({"x": x, "w": torch.tensor(2)}, 3, scale=3.0, f=torch.exp)
    assert out["y"][1] == "text"
    return out["y"][0]


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp() ** 3 * 3

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return ct * 9 * x.exp() ** 2


@custom_jvp
def with_numbers(x):
    return x.sort().values, x.argsort()


@with_numbers.defjvp
def with_numbers_jvp(primals, tangents):
    values, order = with_numbers(*primals)
    return (values, order), (tangents[0].gather(0, order), None)


@pair(lambda x: x.sort().values.sin() * 2)
def outputs_without_a_derivative(x):
    values, order = with_numbers(x)
    assert order.dtype == torch.int64
    return values.sin() * 2


@pytest.mark.parametrize("transform", EACH)
@pytest.mark.parametrize(("calls", "plain"), PAIRS)
def test_under(transform, calls, plain):
    xs = inputs()
    close(ALL[transform](calls, xs.clone()), ALL[transform](plain, xs))


@pytest.mark.parametrize("transform", ["plain", "vmap(grad)", "jvp"])
@pytest.mark.parametrize(("calls", "plain"), PAIRS)
def test_under_the_users_autograd(transform, calls, plain):
    results = []
    for f in (calls, plain):
        leaf = inputs().requires_grad_()
        out = ALL[transform](f, leaf).sin().sum()
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append((first.detach(), second))
    close(*results)


def test_two_arguments():
    x, y = inputs()[0], inputs()[1]
    close(grad(lambda x, y: product(x, y).sum(), (0, 1))(x, y), (2 * y, x))
    close(jvp(product, (x, y), (y, x)), (x * y, 2 * y * y + x * x))
    close(jacrev(product, (0, 1))(x, y), (torch.diag(2 * y), torch.diag(x)))


def test_a_stable_derivative():
    """The example of the docstring, where plain ops give nan."""

    @custom_jvp
    def log1pexp(x):
        return torch.log1p(x.exp())

    log1pexp.defjvp(lambda primals, ts: (log1pexp(*primals), ts[0] * torch.sigmoid(primals[0])))
    x = torch.tensor([-1.0, 100.0])
    close(vmap(grad(log1pexp))(x), torch.sigmoid(x))
    close(vmap(grad(grad(log1pexp)))(x), torch.sigmoid(x) * torch.sigmoid(-x))


def test_symbolic_zeros():
    seen = []

    @custom_jvp
    def f(x, y):
        return x * y, x + y

    def rule(primals, tangents):
        (x, y), (x_t, y_t) = primals, tangents
        seen.append(type(y_t) is SymbolicZero)
        out_t = x_t * y
        return f(x, y), (out_t if seen[-1] else out_t + x * y_t, SymbolicZero(x))

    f.defjvp(rule, symbolic_zeros=True)
    x, y = inputs()[0], inputs()[1]
    close(jvp(lambda x: f(x, y), (x,), (x,)), (f(x, y), (x * y, torch.zeros_like(x))))
    close(grad(lambda x, y: sum(f(x, y)).sum(), (0, 1))(x, y), (y, x))
    assert seen == [True, False]


def test_draws_are_repeated_by_the_rule():
    @custom_jvp
    def dropped(x):
        return x * (torch.rand_like(x) < 0.5)

    dropped.defjvp(
        lambda primals, ts: (lambda mask: (primals[0] * mask, ts[0] * mask))(
            torch.rand_like(primals[0]) < 0.5
        )
    )
    x = torch.ones(64, dtype=DOUBLE)
    out, pull = vjp(dropped, x)
    before = torch.get_rng_state()
    close(pull(x)[0], out)
    assert torch.equal(torch.get_rng_state(), before)
    close(*jvp(dropped, (x,), (x,)))
    out, out_t = vmap(lambda x: jvp(dropped, (x,), (x,)), randomness="different")(x.expand(3, 64))
    close(out, out_t)
    assert not torch.equal(out[0], out[1])


def test_nothing_but_arguments_is_kept():
    refs = []

    def hidden(x):
        refs.append(weakref.ref(x))
        return x

    f = custom_jvp(lambda x: hidden(x.exp()).sin())
    f.defjvp(lambda primals, ts: (f(*primals), ts[0]))
    gc.disable()
    try:
        kept = vjp(f, inputs()[0])
        assert refs.pop()() is None
        del kept
    finally:
        gc.enable()


@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "grad(vmap)", "jvp", "grad(grad)"])
def test_a_captured_tensor_with_a_derivative(transform):
    def f(x):
        made = x.sin()
        g = custom_jvp(lambda y: y * made)
        g.defjvp(lambda primals, tangents: (g(*primals), tangents[0]))
        return g(x * 2)

    with pytest.raises(CapturedTensorError, match="<lambda> uses a tensor that is not one of its"):
        ALL[transform](f, inputs())


def answers(rule):
    g = custom_jvp(lambda tree: {"b": tree["a"] * 2})
    g.defjvp(rule)
    return lambda: grad(lambda tree: g(tree)["b"].sum())({"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            lambda primals, tangents: primals[0]["a"],
            "the jvp of <lambda> returned a Tensor\n"
            "  expected: a pair (output, output_tangent)\n"
            "  to fix: return (output, output_tangent)",
        ),
        (
            lambda primals, tangents: (primals[0], {"b": tangents[0]["a"]}),
            "the jvp of <lambda> returned outputs whose structure is not that of the output of "
            "fun\n"
            "  expected: {'b': *}\n"
            "  got: {'a': *}\n"
            "  to fix: return one entry for each leaf of the output of fun, None for zero",
        ),
        (
            lambda primals, tangents: ({"b": primals[0]["a"]}, tangents[0]["a"]),
            "the jvp of <lambda> returned tangents whose structure is not that of the output\n"
            "  expected: {'b': *}\n"
            "  got: *\n"
            "  to fix: return one entry for each leaf of the output, None for zero",
        ),
        (
            lambda primals, tangents: ({"b": primals[0]["a"]}, {"b": tangents[0]["a"].sum()}),
            "the jvp of <lambda> returned tangents that do not fit the output\n"
            "  expected at ['b']: torch.float32 tensor of shape [2]\n"
            "  got: torch.float32 tensor of shape []\n"
            "  to fix: return a tensor of the same shape and dtype, or None for zero",
        ),
    ],
    ids=["no pair", "other output", "other structure", "other shape"],
)
def test_a_rule_that_returns_what_does_not_fit(rule, text):
    assert said(RuleError, answers(rule)) == text


def test_a_function_without_a_rule():
    assert said(RuleError, lambda: custom_jvp(torch.sin)(inputs())) == (
        "sin is a custom_jvp function without a rule\n"
        "  to fix: define it, with sin.defjvp(rule) or sin.defjvps(*rules)"
    )


def test_defjvps_that_do_not_fit():
    f = custom_jvp(lambda x, y: x * y)
    f.defjvps(lambda x_t, out, x, y: x_t)
    assert said(RuleError, lambda: hessian(lambda x: f(x, x).sum())(inputs()[0])) == (
        "defjvps of <lambda> got 1 rules, but it is called with 2 arguments\n"
        "  to fix: give one for each argument, None for one without a derivative"
    )
    g = custom_jvp(lambda x, y: x * y, nondiff_argnums=1)
    assert said(StructureError, lambda: g.defjvps(None)) == (
        "defjvps of <lambda>, which has arguments that are not differentiated\n  to fix: use defjvp"
    )
