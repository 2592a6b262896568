"""A transform written with `lamina.extend` alone: it is right, and nests with all of ours."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lamina import functional_call, grad, jacrev, jvp, vjp, vmap
from lamina.extend import temporary_rules
from tests.extend import interval as written
from tests.extend import interval_rules as _more_rules
from tests.extend.interval import Interval, interval

DOUBLE = torch.float64
W = torch.linspace(-1.3, 1.1, 12, dtype=DOUBLE).reshape(3, 4).sin()
POINTS = 12


def at(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def box(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    lo = at(seed, *shape)
    return lo, lo + at(seed + 1, *shape).abs() * 0.3


def points(lo: torch.Tensor, hi: torch.Tensor):
    """Points of a box: its corners along the diagonal, and some at random."""
    yield from (lo, hi)
    for seed in range(POINTS):
        share = torch.rand(lo.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        yield lo + (hi - lo) * share


def assert_encloses(bounds, value, slack: float = 1e-9) -> None:
    lo, hi = bounds
    assert lo.shape == hi.shape == value.shape
    assert bool((lo <= hi + slack).all())
    assert bool((lo - slack <= value).all()), (lo, value)
    assert bool((value <= hi + slack).all()), (hi, value)


def test_it_is_short_and_knows_the_door_alone():
    source = inspect.getsource(written)
    code = [line for line in source.splitlines() if line.strip() and '"""' not in line]
    assert len(code) < 80
    for module in (source, inspect.getsource(_more_rules)):
        names = [node.module for node in ast.walk(ast.parse(module)) if hasattr(node, "module")]
        assert {n for n in names if n.startswith("lamina")} <= {"lamina.extend"}


# -- random programs -------------------------------------------------------------------------------

UNARY = (
    "-{a}",
    "{a}.sin()",
    "{a}.cos()",
    "{a}.tanh()",
    "torch.sigmoid({a})",
    "torch.relu({a} - 0.1)",
    "{a}.tanh().exp()",
    "{a} * 0.7",
    "1.3 - {a}",
    "{a} ** 2",
    "{a} ** 3",
    "{a}.clamp(-0.5, 0.7)",
    "{a}.flip(0)",
    "{a}.cumsum(0)",
    "{a} @ W.T @ W",
    "F.linear({a}, W, W[:, 0]) @ W",
    "{a}.reshape(4).unsqueeze(0).squeeze(0)",
    "torch.stack([{a}, {a}.sin()]).t()[:, 1]",
    "torch.cat([{a}[2:], {a}[:2]])",
    "torch.where({a} > 0.1, {a}, {a} * 0.3)",
    "written_to({a})",
)
BINARY = (
    "{a} + {b}",
    "{a} - {b}",
    "{a} * {b}",
    "torch.add({a}, {b}, alpha=-0.4)",
    "torch.maximum({a}, {b})",
    "torch.minimum({a}, {b})",
    "torch.where({a} > {b}, {a}.sin(), {b})",
    "{a}.dot({b}) + {a}",
    "torch.outer({a}, {b}).sum(1)",
)


def written_to(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4, dtype=DOUBLE)
    out[1:3] = x[:2]
    out[0] = x[3] * x[0]
    out.mul_(0.5)
    out[3:].copy_(x[2:3])
    return out


@st.composite
def programs(draw: Callable) -> str:
    """An expression of a vector `x` of 4, that gives a vector of 4."""
    known = ["x"]
    lines = []
    for i in range(draw(st.integers(1, 6))):
        template = draw(st.sampled_from((*UNARY, *BINARY)))
        a, b = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        name = f"v{i}"
        lines.append(f"    {name} = {template.format(a=a, b=b)}")
        known.append(name)
    return "\n".join(["def f(x):", *lines, f"    return {known[-1]}"])


def compiled(program: str) -> Callable:
    scope = {"torch": torch, "F": F, "W": W, "written_to": written_to}
    exec(program, scope)
    return scope["f"]


def searched(count: int):
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=phases,
        suppress_health_check=health,
        database=None,
    )


@searched(60)
@given(programs(), st.integers(0, 99))
def test_no_point_of_the_box_leaves_the_bounds(program, seed):
    note(program)
    f = compiled(program)
    lo, hi = box(seed, 4)
    bounds = interval(f)(lo, hi)
    for x in points(lo, hi):
        assert_encloses(bounds, f(x))


@searched(25)
@given(programs(), st.integers(0, 99))
def test_vmap_on_either_side(program, seed):
    note(program)
    f = compiled(program)
    lo, hi = box(seed, 3, 4)
    one_by_one = [interval(f)(lo, hi) for lo, hi in zip(lo, hi, strict=True)]
    expected = tuple(torch.stack(ends) for ends in zip(*one_by_one, strict=True))
    torch.testing.assert_close(vmap(interval(f))(lo, hi), expected)
    torch.testing.assert_close(interval(vmap(f))(lo, hi), expected)
    nested = vmap(interval(vmap(f)), 1, 1)(torch.stack([lo, lo], 1), torch.stack([hi, hi], 1))
    torch.testing.assert_close(nested, tuple(torch.stack([end, end], 1) for end in expected))


@searched(25)
@given(programs(), st.integers(0, 99))
def test_the_derivative_of_a_bound(program, seed):
    note(program)
    f = compiled(program)
    centre, direction = at(seed, 4), at(seed + 7, 4)

    def upper(x):
        return interval(f)(x - 0.1, x + 0.13)[1].sum()

    slopes = [
        (upper(centre + h * direction) - upper(centre - h * direction)) / (2 * h)
        for h in (1e-5, 5e-6)
    ]
    _, pushed = jvp(upper, (centre,), (direction,))
    torch.testing.assert_close((grad(upper)(centre) * direction).sum(), pushed)
    if torch.isclose(*slopes, rtol=1e-4):  # else there is a kink
        torch.testing.assert_close(pushed, slopes[1], rtol=1e-3, atol=1e-5)


SMOOTH = tuple(t for t in UNARY if "clamp" not in t)


@searched(25)
@given(st.lists(st.sampled_from(SMOOTH), min_size=1, max_size=3), st.integers(0, 99))
def test_bounds_of_a_derivative(templates, seed):
    lines = [f"    x = {template.format(a='x')}" for template in templates]
    program = "\n".join(["def f(x):", *lines, "    return x"])
    note(program)
    f = compiled(program)
    lo, hi = box(seed, 4)

    def slope(x):
        return grad(lambda x: (f(x) * W[1]).sum())(x)

    def pushed(x):
        return jvp(f, (x,), (W[0],))[1]

    for derivative in (slope, pushed):
        bounds = interval(derivative)(lo, hi)
        for x in points(lo, hi):
            assert_encloses(bounds, derivative(x))


# -- compositions by hand --------------------------------------------------------------------------


def test_interval_of_an_interval():
    lo, hi = box(3, 4)

    def widened(x):
        return interval(torch.sin)(x - 0.1, x + 0.1)[1]

    bounds = interval(widened)(lo, hi)
    for x in points(lo, hi):
        assert_encloses(bounds, widened(x))


def test_a_network_and_its_certified_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    x = at(1, 5, 4)

    def worst(params, x):
        lo, hi = interval(lambda x: functional_call(model, params, (x,)))(x - 0.1, x + 0.1)
        return (hi - lo).square().sum()

    grads = grad(worst)(params, x)
    each = vmap(grad(worst), (None, 0))(params, x)
    for name in params:
        torch.testing.assert_close(each[name].sum(0), grads[name])
    # The user's own autograd, to parameters that are captured.
    lo, hi = interval(model)(x - 0.1, x + 0.1)
    (hi - lo).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


@pytest.mark.parametrize("which", ["lo", "hi", "both"])
def test_backward_to_the_box(which):
    lo, hi = box(5, 4)
    leaves = [
        end.clone().requires_grad_(which in (name, "both"))
        for name, end in (("lo", lo), ("hi", hi))
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def width(lo, hi):
        least, most = interval(lambda x: (W @ x).relu().sin() * x[:3])(lo, hi)
        return (most - least).square().sum()

    found = torch.autograd.grad(width(*leaves), wanted)
    argnums = {"lo": (0,), "hi": (1,), "both": (0, 1)}[which]
    torch.testing.assert_close(found, grad(width, argnums=argnums)(lo, hi))


def test_pytrees_and_constants():
    lo, hi = {"a": at(1, 2), "b": [at(2, 3)]}, {"a": at(1, 2) + 1, "b": [at(2, 3) + 1]}

    def f(tree):
        return {"sum": tree["a"].sum() + tree["b"][0].sum(), "shape": 3, "one": torch.ones(2)}

    least, most = interval(f)(lo, hi)
    torch.testing.assert_close(most["sum"] - least["sum"], torch.tensor(5.0, dtype=DOUBLE))
    assert least["shape"] == 3
    torch.testing.assert_close(least["one"], most["one"])


def test_jacobians_of_bounds():
    lo, hi = box(9, 4)
    jacobian = jacrev(lambda lo: interval(lambda x: W @ x)(lo, hi)[1])(lo)
    torch.testing.assert_close(jacobian, W.clamp_max(0))
    (pulled,) = vjp(lambda hi: interval(lambda x: W @ x)(lo, hi)[1], hi)[1](torch.ones(3).double())
    torch.testing.assert_close(pulled, W.clamp_min(0).sum(0))


def test_a_rule_more():
    lo, hi = box(2, 4)
    with temporary_rules():

        @Interval.rule(torch.ops.aten.abs.default)
        def absolute(level, x):
            return torch.maximum(x, -x)

        bounds = interval(torch.abs)(lo, hi)
        for x in points(lo, hi):
            assert_encloses(bounds, x.abs())
