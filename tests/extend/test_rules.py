"""Rules and derivatives that a user gives: for ops of his own, and for ops of ATen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lamina
from lamina import grad, hessian, jacfwd, jacrev, jvp, linear_transpose, linearize, vjp, vmap
from lamina.extend import (
    batching_rule,
    constant,
    decomposition,
    dims,
    explain,
    jvp_rule,
    linear,
    multilinear,
    pointwise,
    temporary_rules,
    unbroadcast,
    vjp_rule,
)
from lamina_core.errors import FallbackWarning, MissingRuleError, NotDifferentiableError
from tests.under import ALL, inputs

aten = torch.ops.aten
DOUBLE = torch.float64
CALLS: list[str] = []


@pytest.fixture(autouse=True)
def scope(monkeypatch):
    """What a test registers is taken back, and no op loops."""
    CALLS.clear()
    monkeypatch.setattr(lamina.config, "fallback", "error")
    with temporary_rules():
        yield


def defined(name: str, *, signature: str, function):
    """A custom op of which PyTorch knows how to run it and nothing else."""
    return torch.library.custom_op(
        f"lamina_extended::{name}", function, mutates_args=(), schema=signature
    )


def _swirl(x, turns=1.0):
    return torch.sin(x * turns) * x.flip(-1)


def _blend(x, y, weight=0.5):
    return x * y + weight * x


SWIRL = defined("swirl", signature="(Tensor x, float turns=1.0) -> Tensor", function=_swirl)
CUBE = defined("cube", signature="(Tensor x) -> Tensor", function=lambda x: x**3)
BLEND = defined(
    "blend", signature="(Tensor x, Tensor y, *, float weight=0.5) -> Tensor", function=_blend
)
DOUBLED = defined("doubled", signature="(Tensor x, int times) -> Tensor",
                  function=lambda x, times: x.repeat(times))  # fmt: skip
OUTER = defined("outer", signature="(Tensor x, Tensor y) -> Tensor", function=torch.outer)
SPLIT = defined(
    "halves", signature="(Tensor x) -> Tensor[]", function=lambda x: [y.clone() for y in x.chunk(2)]
)
PAIR = defined(
    "sum_and_count",
    signature="(Tensor x) -> (Tensor, Tensor)",
    function=lambda x: (x.sum(), (x > 0).sum()),
)


def batch_swirl():
    @batching_rule(SWIRL)
    def rule(info, in_dims, x, turns=1.0):
        CALLS.append(f"swirl of {info.batch_size}")
        return SWIRL(dims.batch_first(x, in_dims[0]), turns), 0


def by_hand():
    @vjp_rule(SWIRL)
    def rule(needs, x, turns=1.0):
        return SWIRL(x, turns), (x, turns), swirl_pullback

    @jvp_rule(SWIRL)
    def push(tangents, x, turns=1.0):
        (x_t,) = tangents
        out_t = turns * torch.cos(x * turns) * x.flip(-1) * x_t + torch.sin(x * turns) * x_t.flip(
            -1
        )
        return SWIRL(x, turns), out_t


def swirl_pullback(residuals, needs, ct):
    x, turns = residuals
    return (turns * torch.cos(x * turns) * x.flip(-1) * ct + (torch.sin(x * turns) * ct).flip(-1),)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("forward", [True, False], ids=["both modes", "vjp alone"])
def test_every_transform_of_an_op_with_rules_by_hand(name, forward):
    batch_swirl()
    if forward:
        by_hand()
    else:

        @vjp_rule(SWIRL)
        def rule(needs, x, turns=1.0):
            return SWIRL(x, turns), (x, turns), swirl_pullback

    found = ALL[name](lambda x: SWIRL(x, turns=1.3), inputs())
    torch.testing.assert_close(found, ALL[name](lambda x: _swirl(x, 1.3), inputs()))


def test_a_rule_that_comes_later_is_used():
    x = inputs()
    with pytest.raises(MissingRuleError, match="no batching rule for lamina_extended"):
        vmap(SWIRL)(x)
    with pytest.raises(NotDifferentiableError):
        grad(lambda x: SWIRL(x).sum())(x[0])
    with pytest.raises(NotDifferentiableError):
        jvp(SWIRL, (x[0],), (x[0],))
    batch_swirl()
    by_hand()
    torch.testing.assert_close(vmap(SWIRL)(x), _swirl(x))
    assert CALLS == ["swirl of 3"]
    torch.testing.assert_close(jacrev(SWIRL)(x[0]), jacfwd(_swirl)(x[0]))
    torch.testing.assert_close(jacfwd(SWIRL)(x[0]), jacfwd(_swirl)(x[0]))
    assert "rule (tests.extend.test_rules.batch_swirl" in explain(torch.ops.lamina_extended.swirl)


def test_what_a_block_registers_is_taken_back():
    with temporary_rules():
        batch_swirl()
        vmap(SWIRL)(inputs())
    with pytest.raises(MissingRuleError, match="no batching rule for lamina_extended"):
        vmap(SWIRL)(inputs())


@pytest.mark.parametrize("name", ALL)
def test_every_transform_of_declared_ops(name):
    @batching_rule(CUBE)
    def cube(info, in_dims, x):
        return CUBE(x), in_dims[0]

    @batching_rule(DOUBLED)
    def doubled(info, in_dims, x, times):
        x = dims.batch_first(x, in_dims[0])
        return x.repeat(1, times), 0

    pointwise(CUBE, lambda t, x: 3 * x * x * t)
    linear(DOUBLED, lambda ct, x_shape, times: ct.reshape(times, *x_shape).sum(0))
    found = ALL[name](lambda x: DOUBLED(CUBE(x), 2), inputs())
    torch.testing.assert_close(found, ALL[name](lambda x: (x**3).repeat(2), inputs()))


def test_what_a_product_names():
    @batching_rule(BLEND)
    def rule(info, in_dims, x, y, *, weight=0.5):
        x, y = (dims.pad_rank(v, d, 1) for v, d in zip((x, y), in_dims, strict=True))
        return BLEND(x, y, weight=weight), 0

    pointwise(BLEND, lambda t, y, weight: t * (y + weight), lambda t, x: t * x)
    x, y = inputs()[0], inputs()[1]

    def compare(f):
        expected = f(lambda x, y: _blend(x, y, 0.3))
        torch.testing.assert_close(f(lambda x, y: BLEND(x, y, weight=0.3)), expected)

    compare(lambda f: jacrev(f, (0, 1))(x, y))
    compare(lambda f: jacfwd(f, (0, 1))(x, y))
    compare(lambda f: hessian(lambda x: f(x, y).sin().sum())(x))
    compare(lambda f: vmap(grad(lambda x, y: f(x, y).sum(), 1), (0, None))(inputs(), y))


def test_an_op_linear_in_each_operand():
    @batching_rule(OUTER)
    def rule(info, in_dims, x, y):
        x, y = (
            dims.ensure_batched(v, d, info.batch_size) for v, d in zip((x, y), in_dims, strict=True)
        )
        return x.unsqueeze(2) * y.unsqueeze(1), 0

    multilinear(OUTER, lambda ct, y: ct @ y, lambda ct, x: x @ ct)
    x, y = inputs()[0], inputs()[1, :3]
    torch.testing.assert_close(jacrev(OUTER, (0, 1))(x, y), jacrev(torch.outer, (0, 1))(x, y))
    torch.testing.assert_close(jacfwd(OUTER, (0, 1))(x, y), jacrev(torch.outer, (0, 1))(x, y))
    (pulled,) = linear_transpose(lambda y: OUTER(x, y), y)(torch.ones(4, 3, dtype=DOUBLE))
    torch.testing.assert_close(pulled, x.sum().expand(3))
    (_, push) = linearize(lambda y: OUTER(x, y.sin()), y)
    torch.testing.assert_close(push(y), torch.outer(x, y.cos() * y))


def test_an_op_made_of_others_for_every_transform():
    runs = []

    @decomposition(SWIRL)
    def parts(x, turns=1.0):
        runs.append(turns)
        return _swirl(x, turns)

    for name, transform in ALL.items():
        runs.clear()
        found = transform(lambda x: SWIRL(x, 0.7), inputs())
        torch.testing.assert_close(found, transform(lambda x: _swirl(x, 0.7), inputs()))
        assert bool(runs) == (name != "plain"), name
    assert "decomposed" in explain(torch.ops.lamina_extended.swirl.default)


def test_outputs_that_are_lists_and_tuples():
    @batching_rule(SPLIT)
    def halves(info, in_dims, x):
        return list(dims.batch_first(x, in_dims[0]).chunk(2, 1)), 0

    @vjp_rule(SPLIT)
    def split_vjp(needs, x):
        return SPLIT(x), (), lambda residuals, needs, *cts: (torch.cat(cts),)

    @jvp_rule(SPLIT)
    def split_jvp(tangents, x):
        return SPLIT(x), SPLIT(tangents[0])

    @batching_rule(PAIR)
    def pair(info, in_dims, x):
        x = dims.batch_first(x, in_dims[0])
        return (x.sum(1), (x > 0).sum(1)), (0, 0)

    @vjp_rule(PAIR)
    def pair_vjp(needs, x):
        return PAIR(x), (x.shape,), pair_pullback

    @jvp_rule(PAIR)
    def pair_jvp(tangents, x):
        return PAIR(x), (tangents[0].sum(), None)

    def pair_pullback(residuals, needs, ct, count_ct):
        return (ct.expand(residuals[0]),)

    def f(x):
        first, second = SPLIT(x)
        total, count = PAIR(first * second)
        return total * count

    def plain(x):
        first, second = x.chunk(2)
        return (first * second).sum() * (first * second > 0).sum()

    for run in (
        lambda f: vmap(f)(inputs()),
        lambda f: vmap(grad(f))(inputs()),
        lambda f: jvp(f, (inputs()[0],), (inputs()[1],)),
        lambda f: grad(lambda xs: vmap(f)(xs).sum())(inputs()),
    ):
        torch.testing.assert_close(run(f), run(plain))


def test_an_op_without_a_derivative():
    constant(CUBE)
    torch.testing.assert_close(grad(lambda x: (CUBE(x) * x).sum())(inputs()), inputs() ** 3)
    assert not jvp(CUBE, (inputs(),), (inputs(),))[1].any()


def test_a_rule_runs_as_code_of_the_level_below():
    """It may make tensors and write values to them, whatever these are, and may draw numbers."""

    @batching_rule(SWIRL)
    def rule(info, in_dims, x, turns=1.0):
        out = torch.zeros(x.shape, dtype=x.dtype)
        out.copy_(x)
        return out + torch.randn((), dtype=x.dtype), in_dims[0]

    xs = torch.stack([inputs(), inputs()])
    out = vmap(vmap(SWIRL), randomness="different")(xs)
    noise = out - xs
    torch.testing.assert_close(noise[0], noise[0, 0, 0].expand(3, 4))
    assert noise[0, 0, 0] != noise[1, 0, 0]
    assert grad(lambda xs: vmap(SWIRL)(xs).sum())(inputs()).eq(1).all()


def test_a_rule_that_leaves_a_call_to_the_parts():
    op = aten.absolute.default  # a composite op

    @batching_rule(op)
    def rule(info, in_dims, x):
        CALLS.append("absolute")
        return NotImplemented

    @vjp_rule(op)
    def vjp_of(needs, x):
        CALLS.append("vjp")
        return NotImplemented

    x = inputs()
    torch.testing.assert_close(vmap(grad(lambda x: x.absolute().sum()))(x), x.sign())
    assert CALLS[0] == "vjp"
    torch.testing.assert_close(vmap(torch.absolute)(x), x.abs())
    assert CALLS[-1] == "absolute"


# -- an op of ATen that has no rule ----------------------------------------------------------------


def integers(*shape):
    return (torch.arange(torch.Size(shape).numel()) % 7 - 3).reshape(shape).to(torch.int8)


def test_an_op_of_aten_without_a_batching_rule(monkeypatch):
    a, b = integers(2, 3, 4), integers(2, 4, 5)
    monkeypatch.setattr(lamina.config, "fallback", "silent")
    looped = vmap(torch._int_mm)(a, b)
    monkeypatch.setattr(lamina.config, "fallback", "error")

    @batching_rule(aten._int_mm.default)
    def rule(info, in_dims, self, mat2):
        a, b = (
            dims.ensure_batched(v, d, info.batch_size)
            for v, d in zip((self, mat2), in_dims, strict=True)
        )
        return torch.bmm(a.int(), b.int()), 0

    torch.testing.assert_close(vmap(torch._int_mm)(a, b), looped)
    torch.testing.assert_close(vmap(torch._int_mm, (0, None))(a, b[0])[0], looped[0])


def test_an_op_of_aten_gets_another_derivative():
    """A straight-through rounding, for all transforms, of an op that has a derivative of zero."""
    assert not grad(lambda x: x.round().sum())(inputs()).any()
    pointwise(aten.round.default, lambda t: t, replace=True)
    assert grad(lambda x: x.round().sum())(inputs()).eq(1).all()
    assert vmap(grad(lambda x: (x.round() ** 2).sum()))(inputs()).eq(2 * inputs().round()).all()
    torch.testing.assert_close(jvp(torch.round, (inputs(),), (inputs(),))[1], inputs())


def test_in_place_forms_follow():
    @batching_rule(aten.erfinv.default, replace=True)
    def rule(info, in_dims, self):
        CALLS.append("erfinv")
        return self.erfinv(), in_dims[0]

    pointwise(aten.erfinv.default, lambda t: t * 5, replace=True)
    x = inputs() / 3

    def f(x):
        return x.clone().erfinv_().sum()

    assert grad(f)(x).eq(5).all()
    vmap(lambda x: torch.zeros(4, dtype=DOUBLE).copy_(x).erfinv_())(x)
    assert vmap(grad(f))(x).eq(5).all()


def test_unbroadcast_is_for_pullbacks_of_broadcasting_ops():
    @vjp_rule(BLEND)
    def rule(needs, x, y, *, weight=0.5):
        return BLEND(x, y, weight=weight), (x, y, weight), pullback

    def pullback(residuals, needs, ct):
        x, y, weight = residuals
        x_ct = unbroadcast(ct * (y + weight), x.shape) if needs[0] else None
        return x_ct, unbroadcast(ct * x, y.shape) if needs[1] else None

    x, y = inputs(), inputs()[:1, :1]
    for argnums in (0, 1, (0, 1)):
        found = grad(lambda x, y: BLEND(x, y).sin().sum(), argnums)(x, y)
        expected = grad(lambda x, y: _blend(x, y, 0.5).sin().sum(), argnums)(x, y)
        torch.testing.assert_close(found, expected)


def test_residuals_of_a_users_rule_can_be_packed():
    by_hand()
    packed: list[Tensor] = []

    def pack(x):
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = grad(lambda x: SWIRL(x).sum())(inputs()[0])
    torch.testing.assert_close(found, grad(lambda x: _swirl(x).sum())(inputs()[0]))
    assert len(packed) == 1


def test_a_pullback_is_given_none_for_an_output_without_cotangent():
    @vjp_rule(SPLIT)
    def rule(needs, x):
        return SPLIT(x), (x,), pullback

    def pullback(residuals, needs, first, second):
        assert second is None
        return (torch.cat([first, torch.zeros_like(first)]),)

    torch.testing.assert_close(
        grad(lambda x: SPLIT(x)[0].sum())(inputs()[0]), torch.tensor([1, 1, 0, 0], dtype=DOUBLE)
    )


def test_the_loop_warns_and_says_where_to_register(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "warn")
    with pytest.warns(FallbackWarning, match="register_vmap for an op of your own"):
        vmap(CUBE)(inputs())


def test_vjp_function_of_an_op_with_rules():
    by_hand()
    out, pull = vjp(SWIRL, inputs()[0])
    torch.testing.assert_close(out, _swirl(inputs()[0]))
    torch.testing.assert_close(pull(out), vjp(_swirl, inputs()[0])[1](out))
