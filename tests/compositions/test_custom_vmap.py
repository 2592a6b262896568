"""`custom_vmap` under every transform: the rule is used, and its derivative is right."""

from __future__ import annotations

import pytest
import torch

from lamina import custom_vmap, grad, hessian, jvp, linear_transpose, linearize, vjp, vmap
from lamina_core.errors import CapturedTensorError, RuleError
from tests import under
from tests.errors.saying import said
from tests.under import ALL, DOUBLE, inputs

close = torch.testing.assert_close
EACH = under.each("vmap(jvp)", "vmap(hessian)")


def scaled(x, w):
    """[n], [n] -> [n], and a number that does not depend on x."""
    return x.sin() * w, w.square().sum(-1)


def make():
    """`scaled` with a rule, and the list of calls of the rule."""
    calls = []
    f = custom_vmap(scaled)

    @f.def_vmap
    def rule(axis_size, in_batched, x, w):
        calls.append((axis_size, *in_batched))
        out, square = scaled(x, w)
        return (out, square), (any(in_batched), in_batched[1])

    return f, calls


@pytest.mark.parametrize("transform", EACH)
@pytest.mark.parametrize("way", ["both", "one constant", "the constant first"])
def test_under(transform, way):
    f, calls = make()
    constant = torch.linspace(-1, 1, 4, dtype=DOUBLE)

    def with_(f):
        def g(x):
            pair = {
                "both": lambda: f(x, x.cos()),
                "one constant": lambda: f(x, constant),
                "the constant first": lambda: f(constant, x),
            }[way]()
            return pair[0] * pair[1]

        return g

    xs = inputs()
    close(ALL[transform](with_(f), xs), ALL[transform](with_(scaled), xs))
    assert bool(calls) == ("vmap" in transform)  # the jacobians map tangents, not arguments


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0)])
def test_each_choice_of_batched_arguments(in_dims):
    f, calls = make()
    args = [
        {0: inputs(), 1: inputs().T.contiguous(), None: inputs()[2]}[d].clone() for d in in_dims
    ]
    loss = lambda f: lambda x, w: sum(out.sin().sum() for out in f(x, w))
    for transform in (
        lambda f: f,
        lambda f: grad(loss(f), (0, 1)),
        lambda f: lambda x, w: jvp(f, (x, w), (w, x)),
        lambda f: lambda x, w: jvp(lambda x: f(x, w), (x,), (w,)),
        lambda f: hessian(loss(f), (0, 1)),
        lambda f: lambda x, w: vjp(f, x, w)[1]((x, None)),
    ):
        close(vmap(transform(f), in_dims)(*args), vmap(transform(scaled), in_dims)(*args))
    flags = tuple(d is not None for d in in_dims)
    assert calls[0] == (3, *flags)


def test_the_derivative_is_that_of_the_rule():
    f = custom_vmap(lambda x: x.sin())
    f.def_vmap(lambda axis_size, in_batched, x: (5 * x, True))
    xs = inputs()
    loss = lambda x: f(x).sum()
    close(grad(loss)(xs[0]), xs[0].cos())
    close(vmap(grad(loss))(xs), torch.full_like(xs, 5))
    close(vmap(lambda x: jvp(f, (x,), (x,)))(xs), (5 * xs, 5 * xs))
    close(grad(lambda xs: vmap(f)(xs).sum())(xs), torch.full_like(xs, 5))


def test_pytrees_and_arguments_that_are_no_tensors():
    seen = []

    @custom_vmap
    def f(tree, power=2):
        return {"y": tree["x"] ** power, "power": power}

    @f.def_vmap
    def rule(axis_size, in_batched, tree, power):
        seen.append((in_batched, power))
        return {"y": tree["x"] ** power, "power": power}, True

    xs = inputs()
    g = lambda x, w: f({"x": x, "w": [w, None]}, power=3)
    out = vmap(g, (0, None), {"y": 0, "power": None})(xs, xs)
    close(out["y"], xs**3)
    assert out["power"] == 3
    assert seen == [([{"x": True, "w": [False, False]}, False], 3)]
    close(vmap(grad(lambda x: g(x, xs)["y"].sum()))(xs), 3 * xs**2)


def test_under_the_users_autograd():
    f, _ = make()
    results = []
    for g in (f, scaled):
        leaf = inputs().requires_grad_()
        loss = lambda x, g=g: (g(x, x)[0] * g(x, x)[1]).sum()
        out = vmap(grad(loss))(leaf)
        (first,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append((first.detach(), second))
    close(*results)


def test_maps_in_maps_use_the_rule_of_the_innermost():
    f, calls = make()
    xs = torch.stack([inputs(), inputs().cos()])
    close(vmap(vmap(f))(xs, xs), vmap(vmap(scaled))(xs, xs))
    assert calls == [(3, True, True)]
    calls.clear()
    close(
        vmap(lambda x: vmap(lambda w: f(x, w))(inputs()))(xs[0]),
        vmap(lambda x: vmap(lambda w: scaled(x, w))(inputs()))(xs[0]),
    )
    assert calls == [(3, False, True)]


def test_captured_constants_are_allowed_and_other_tensors_of_the_transforms_are_not():
    def call(x, captured):
        f = custom_vmap(lambda y: y * captured)
        f.def_vmap(lambda axis_size, in_batched, y: (y * captured, True))
        return f(x).sum()

    xs = inputs()
    ones = lambda: torch.ones(4, dtype=DOUBLE)
    close(vmap(grad(lambda x: call(x, ones() * 2)))(xs), torch.full_like(xs, 2))
    for transform in (vmap, lambda f: vmap(grad(f))):
        with pytest.raises(CapturedTensorError) as error:
            transform(lambda x: call(x * 2, x.cos()))(xs)
        assert str(error.value).startswith("a rule of <lambda> uses a tensor that it is not given")


def test_a_function_without_a_rule_runs_where_it_is_not_mapped():
    f = custom_vmap(torch.sin)
    close(grad(lambda x: f(x).sum())(inputs()), inputs().cos())
    assert said(RuleError, lambda: vmap(f)(inputs())) == (
        "sin is a custom_vmap function without a rule, and it is mapped\n"
        "  to fix: define it, with sin.def_vmap(rule)"
    )


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            lambda x: x,
            "the vmap rule of sin returned a Tensor\n"
            "  expected: a pair (output, out_batched)\n"
            "  to fix: return (output, out_batched)",
        ),
        (
            lambda x: ((x, x), (True,)),
            "the vmap rule of sin: out_batched does not fit output\n"
            "  out_batched has 1 entry but output has 2\n"
            "  to fix: write out_batched like output, or put one value in its place for the whole "
            "of output",
        ),
        (
            lambda x: (x, 0),
            "the vmap rule of sin returned 0 in out_batched\n"
            "  to fix: return True or False for each output",
        ),
        (
            lambda x: (x.T, True),
            "the vmap rule of sin returned an output of shape [4, 3] as batched\n"
            "  expected: 3, the batch size, in dim 0\n"
            "  to fix: move the batch dim to the front, or return False for it",
        ),
    ],
    ids=["no pair", "other structure", "no bool", "no batch dim"],
)
def test_a_rule_that_returns_what_does_not_fit(answer, text):
    f = custom_vmap(torch.sin)
    f.def_vmap(lambda axis_size, in_batched, x: answer(x))
    assert said(RuleError, lambda: vmap(f)(inputs())) == text


def test_its_linearised_form_can_be_transposed():
    product = custom_vmap(lambda v, w: v.sin() * w.exp())
    product.def_vmap(lambda size, in_batched, v, w: (v.sin() * w.exp(), True))
    x = torch.tensor([[0.3, -0.7, 1.1], [0.5, 0.2, -0.4]], dtype=torch.float64)
    ct = x.cos()

    def function(x):
        return vmap(lambda v: product(v, v.flip(0)))(x)

    def plain(x):
        return x.sin() * x.flip(1).exp()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(plain(leaf), leaf, ct, create_graph=True)
    (again,) = torch.autograd.grad(want, leaf, ct)
    _, push = linearize(function, x)
    close(linear_transpose(push, x)(ct)[0], want)
    _, push = linearize(grad(lambda x: (function(x) * ct).sum()), x)
    close(linear_transpose(push, x)(ct)[0], again)
