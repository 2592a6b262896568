"""What a stranger's transform need not see to: views, writes, functions, threads and the rest."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import lamina
from lamina import custom_jvp, custom_vjp, custom_vmap, grad, jvp, vmap
from lamina.extend import (
    Applied,
    HandlerInterpreter,
    LevelTensor,
    RuleInterpreter,
    applying,
    explain,
    pass_down,
    print_stack,
    pytree,
    temporary_rules,
    trace_log,
)
from lamina_core.errors import (
    CapturedTensorError,
    EscapedTensorError,
    MissingRuleError,
    MutationError,
    NotDifferentiableError,
)
from tests.extend.counting import counted
from tests.extend.interval import Interval, interval
from tests.extend.test_interval import DOUBLE, assert_encloses, box, points

aten = torch.ops.aten


def assert_bounds(f, lo, hi):
    """Bounds of `f`; the box is copied, as `f` may write to it."""
    bounds = interval(f)(lo.clone(), hi.clone())
    for x in points(lo, hi):
        assert_encloses(bounds, f(x.clone()))
    return bounds


# -- views and writes ------------------------------------------------------------------------------


def through_views(x):
    y = x.clone()
    head, tail = y[:2], y[2:]
    head.mul_(2)
    y.add_(1)  # both views are stale now
    tail[0] = head[1] * tail[1]
    return torch.cat([y, head, tail])


def into_a_tensor_made_inside(x):
    out = torch.zeros(2, 4, dtype=DOUBLE)
    row = out[0]
    row.copy_(x)
    row[1:3] += x[0]
    out[1].fill_(x[3])
    return out.t().reshape(-1)


def with_out(x):
    out = torch.empty(4, dtype=DOUBLE)
    torch.add(x, x.sin(), out=out)
    return out


def of_its_own_shape(x):
    y = x.sin()
    y.unsqueeze_(0)
    return y.t_() * 2


def random_and_masked(x):
    torch.manual_seed(3)
    noise = torch.rand_like(x)
    return nn.functional.dropout(x * noise, 0.5)


@pytest.mark.parametrize(
    "f",
    [through_views, into_a_tensor_made_inside, with_out, of_its_own_shape, random_and_masked],
    ids=lambda f: f.__name__,
)
def test_what_user_code_does(f):
    lo, hi = box(3, 4)
    assert_bounds(f, lo, hi)
    xs = torch.stack([lo, hi])
    if f is not random_and_masked:
        bounds = vmap(interval(f))(xs, xs + 0.1)
        torch.testing.assert_close(interval(vmap(f))(xs, xs + 0.1), bounds)
        torch.testing.assert_close(bounds[0][0], interval(f)(xs[0], xs[0] + 0.1)[0])
        slope = grad(lambda x: interval(f)(x, x + 0.1)[1].sum())(lo)
        step = 1e-6 * lo.cos()
        upper = [interval(f)(x, x + 0.1)[1].sum() for x in (lo + step, lo - step)]
        torch.testing.assert_close((slope * step).sum() * 2, upper[0] - upper[1])
        leaf = lo.clone().requires_grad_()
        interval(f)(leaf.clone(), leaf + 0.1)[1].sum().backward()  # the user's own autograd
        torch.testing.assert_close(leaf.grad, slope)


def test_a_caller_sees_what_is_written_to_his_arguments():
    lo, hi = box(4, 4)
    given = lo.clone(), hi.clone()

    def f(x):
        x[0] = 0
        x[1:].neg_()
        return x.sum()

    interval(f)(*given)
    torch.testing.assert_close(given[0], torch.cat([lo.new_zeros(1), -hi[1:]]))
    torch.testing.assert_close(given[1], torch.cat([lo.new_zeros(1), -lo[1:]]))
    # A level below sees the write too: the derivative of what was there before is gone.
    g = grad(lambda x: interval(f)(x, y := x + 1)[1] + x.sum() + y.sum())(lo)
    torch.testing.assert_close(g, torch.tensor([0.0, -3, -3, -3], dtype=DOUBLE))


def test_one_tensor_cannot_hold_two_fields():
    x = torch.ones(3)

    def widen(x):
        return x.mul_(torch.ones(3)).add_(interval_of(x))

    def interval_of(x):
        return x.sin()

    interval(widen)(x, x)  # a constant, which stays one
    torch.testing.assert_close(x, 1 + torch.ones(3).sin())

    y, far = torch.ones(3), torch.full((3,), 2.0)

    def write(pair):
        pair[0].copy_(pair[1])
        return pair[0]

    with pytest.raises(MutationError, match="of its own for each field"):
        interval(write)((y, y), (y, far))


def test_a_captured_tensor_is_not_written_to():
    total = torch.zeros(4, dtype=DOUBLE)
    with pytest.raises(MutationError, match="captured from outside"):
        interval(lambda x: total.add_(x))(*box(1, 4))


def test_a_value_that_escapes_is_an_error_and_a_constant_is_none():
    kept = []

    def f(x):
        kept.extend((x * 2, torch.ones(4, dtype=DOUBLE) * 3))
        return x

    interval(f)(*box(1, 4))
    with pytest.raises(EscapedTensorError, match=r"IntervalTensor of shape \[4\] is used after"):
        kept[0] + 1
    torch.testing.assert_close(kept[1] + 1, torch.full((4,), 4.0, dtype=DOUBLE))


# -- functions with rules of their own -------------------------------------------------------------


class Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin() * 2

    @staticmethod
    def backward(ctx, ct):
        return ct * 100


def test_an_autograd_function_is_its_forward():
    lo, hi = box(2, 4)
    assert_bounds(lambda x: Shifted.apply(x) + x, lo, hi)
    xs = torch.stack([lo, hi])
    for run in (vmap(interval(Shifted.apply)), interval(vmap(Shifted.apply))):
        torch.testing.assert_close(run(xs, xs + 0.1), interval(lambda x: x.sin() * 2)(xs, xs + 0.1))


def test_the_backward_of_an_autograd_function_above():
    lo, hi = box(2, 4)
    bounds = interval(grad(lambda x: (Shifted.apply(x) * x).sum()))(lo, hi)
    for x in points(lo, hi):
        assert_encloses(bounds, grad(lambda x: (Shifted.apply(x) * x).sum())(x))


def test_no_derivative_of_bounds_of_an_autograd_function_unless_the_transform_says_what_it_means():
    lo, _ = box(2, 4)

    def upper(x):
        return interval(Shifted.apply)(x, x + 0.1)[1].sum()

    with pytest.raises(NotDifferentiableError, match="runs the forward"):
        grad(upper)(lo)
    with pytest.raises(NotDifferentiableError, match="runs the forward"):
        upper(lo.clone().requires_grad_())

    class Rounding(Interval):
        transform = "rounding interval"

    @applying(Rounding)
    def apply(level, custom, args, needs):
        assert custom.name == "Shifted"
        return Applied([args[0] * 2], single=True)

    def with_rule(x):
        with Rounding() as level:
            out = level.results(Shifted.apply(level.argument(x, hi=x + 0.1)))
        return out.hi.sum()

    torch.testing.assert_close(grad(with_rule)(lo), torch.full((4,), 2.0, dtype=DOUBLE))


def rules_of_the_users():
    @custom_jvp
    def by_jvp(x):
        return x.sin() * 2

    @by_jvp.defjvp
    def _(primals, tangents):
        return by_jvp(*primals), tangents[0] * 50

    @custom_vjp
    def by_vjp(x):
        return x.sin() * 2

    by_vjp.defvjp(lambda x: (by_vjp(x), x), lambda x, ct: (ct * 50,))

    @custom_vmap
    def by_vmap(x):
        return x.sin() * 2

    @by_vmap.def_vmap
    def _(size, in_batched, x):
        return x.sin() * 2, in_batched[0]

    return {"custom_jvp": by_jvp, "custom_vjp": by_vjp, "custom_vmap": by_vmap}


@pytest.mark.parametrize("name", rules_of_the_users())
def test_functions_with_rules_of_lamina(name):
    """A rule is for the function and not for its bounds: below intervals none is asked."""
    f = rules_of_the_users()[name]
    lo, hi = box(2, 4)
    xs = torch.stack([lo, hi])
    expected = interval(lambda x: x.sin() * 2)(xs, xs + 0.1)
    for run in (interval(f), vmap(interval(f)), interval(vmap(f))):
        torch.testing.assert_close(run(xs, xs + 0.1), expected)

    def upper(f, x):
        return interval(f)(x, x + 0.1)[1].sum()

    plain = grad(lambda x: upper(lambda x: x.sin() * 2, x))(lo)
    torch.testing.assert_close(grad(lambda x: upper(f, x))(lo), plain)
    torch.testing.assert_close(vmap(grad(lambda x: upper(f, x)))(xs)[0], plain)
    _, pushed = jvp(lambda x: interval(f)(x, x + 0.1)[1], (lo,), (torch.ones_like(lo),))
    torch.testing.assert_close(pushed, plain)
    # Above it the rule holds.
    low, high = interval(grad(lambda x: f(x).sum()))(lo, hi)
    factor = 2 * lo.cos() if name == "custom_vmap" else torch.full_like(lo, 50)
    assert_encloses((low, high), factor)


@pytest.mark.parametrize("wrap", [lamina.checkpoint, "torch"], ids=["lamina", "torch"])
def test_checkpoints(wrap):
    def part(x):
        return x.sin() * x

    def remade(x):
        if wrap == "torch":
            return torch_checkpoint(part, x, use_reentrant=False)
        return wrap(part)(x)

    lo, hi = box(2, 4)
    torch.testing.assert_close(interval(remade)(lo, hi), interval(part)(lo, hi))
    torch.testing.assert_close(
        interval(grad(lambda x: remade(x).sum()))(lo, hi),
        interval(grad(lambda x: part(x).sum()))(lo, hi),
    )

    def upper(f):
        return grad(lambda x: interval(f)(x, x + 0.1)[1].sum())

    torch.testing.assert_close(upper(remade)(lo), upper(part)(lo))


# -- the rest --------------------------------------------------------------------------------------


def test_no_rule_and_no_python_value():
    lo, hi = box(1, 4)
    with pytest.raises(MissingRuleError, match=r"no interval rule for aten\.erfinv\.default"):
        interval(torch.erfinv)(lo, hi)
    with pytest.raises(MissingRuleError, match=r"no interval rule for aten\._local_scalar_dense"):
        interval(lambda x: x if x.sum() > 0 else -x)(lo, hi)
    # A constant has a value.
    interval(lambda x: x if torch.ones(()) > 0 else -x)(lo, hi)


def test_threads():
    lo, hi = box(1, 4)
    found = {}

    def run(i):
        found[i] = interval(lambda x: (x * (i + 1)).sin())(lo, hi)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = dict(found)
    for i in range(4):
        run(i)
        torch.testing.assert_close(alone[i], found[i])


def test_autocast_casts_bounds():
    w = torch.ones(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        lo, hi = interval(lambda x: x @ w)(torch.zeros(2, 4), torch.ones(2, 4))
    assert lo.dtype == hi.dtype == torch.bfloat16
    torch.testing.assert_close(hi.float(), torch.full((2, 3), 4.0))


def test_the_debug_kit(capsys):
    lo, hi = box(1, 4)

    def f(x):
        print_stack()
        return x * 2

    vmap(interval(f))(torch.stack([lo, lo]), torch.stack([hi, hi]))
    assert capsys.readouterr().out.splitlines() == [
        "level 0: plain PyTorch",
        "level 1: vmap(batch_size=2, randomness='error')",
        "level 2: interval",
    ]
    text = explain("aten.mul.Tensor")
    assert "interval rule (tests.extend.interval.mul)" in text
    assert "interval family" in explain("aten.view.default")
    assert "interval decomposed" in explain("aten.linear.default")
    assert "interval missing" in explain("aten.erfinv.default")
    assert "interval family" in explain("aten.exp_.default")
    assert "counting as its `process` says" in explain("aten.exp.default")
    with trace_log() as lines:
        interval(torch.neg)(lo, hi)
    assert any("L1 interval" in line and "aten.neg.default" in line for line in lines)
    with interval_level() as level:
        assert repr(level.wrap(lo, hi=hi)) == "IntervalTensor(level=1, f64[4])"


def interval_level():
    return Interval()


def test_rules_are_inherited_and_replaced():
    class Tight(Interval):
        transform = "tight"

    with temporary_rules():

        @Tight.rule(aten.sub.Tensor)
        def sub(level, x, y, *, alpha=1):
            if x is y:
                return level.constant(torch.zeros_like(x.lo))
            return x + y * -alpha

        lo, hi = box(1, 4)
        with Tight() as level:
            x = level.argument(lo, hi=hi)
            nothing, something = level.results((x - x, x - x * 1))
        assert not nothing.lo.any()
        assert not nothing.hi.any()
        assert something.hi.all()
        with Interval() as level:
            x = level.argument(lo, hi=hi)
            out = level.results(x - x)
        torch.testing.assert_close(out.hi, hi - lo)

        @Interval.rule(aten.erfinv.default)  # later, and for both
        def erfinv(level, x):
            return level.wrap(x.lo.erfinv(), hi=x.hi.erfinv())

        with Tight() as level:
            level.results(level.argument(lo / 9, hi=hi / 9).erfinv())


def test_a_transform_without_rules():
    x = torch.linspace(-1, 1, 4, dtype=DOUBLE)

    def f(x):
        y = torch.ones(4, dtype=DOUBLE).sin()  # depends on nothing
        y[0] = x.sum()
        return (y * x).exp().sum()

    out, counts = counted(f)(x)
    torch.testing.assert_close(out, f(x))
    assert counts["aten.exp.default"] == 1
    assert "aten.sin.default" not in counts

    def counts_of_a_gradient(x):
        out, counts = counted(grad(f))(x)
        assert counts["aten.exp.default"] == 1
        return out

    torch.testing.assert_close(counts_of_a_gradient(x), grad(f)(x))
    torch.testing.assert_close(grad(lambda x: counted(f)(x)[0])(x), grad(f)(x))
    xs = torch.stack([x, x.cos()])
    torch.testing.assert_close(vmap(lambda x: counted(f)(x)[0])(xs), vmap(f)(xs))
    torch.testing.assert_close(counted(vmap(f))(xs)[0], vmap(f)(xs))
    torch.testing.assert_close(interval(lambda x: counted(f)(x)[0])(xs[0], xs[0])[0], f(xs[0]))
    leaf = x.clone().requires_grad_()
    counted(f)(leaf)[0].backward()
    torch.testing.assert_close(leaf.grad, grad(f)(x))


def test_a_transform_that_says_nothing_of_functions():
    with pytest.raises(MissingRuleError, match=r"of which counting says nothing"):
        counted(Shifted.apply)(torch.ones(2))


def test_a_transform_with_handlers():
    class NegatedTensor(LevelTensor):
        pass

    class Negating(HandlerInterpreter):
        """Stands for the negative of a value, and knows two ops."""

        wrapper = NegatedTensor
        transform = "negating"

        def constant(self, value):
            return self.wrap(-value)

        @staticmethod
        def resolve(op):
            return {aten.neg.default: negated, aten.mul.Tensor: times}.get(op, pass_down)

    def negated(level, op, args, kwargs):
        return args[0].value

    def times(level, op, args, kwargs):
        return args[0].value * args[1].value

    with Negating() as level:
        x = level.wrap(torch.tensor(3.0))
        assert (-x).item() == 3
        assert (x * x).item() == 9
        assert type(torch.ones(2)) is NegatedTensor  # user code's own tensors are constants
        assert str(level) == "negating"


def test_a_rule_of_a_function_sees_no_captured_interval():
    """An error, as with all transforms: the derivative of what is captured would be lost."""
    lo, hi = box(1, 4)

    def f(x):
        y = x * 2

        @custom_vjp
        def g(z):
            return z * y

        g.defvjp(lambda z: (z * y, z), lambda z, ct: (ct,))
        return grad(lambda z: g(z).sum())(x)

    # At the level of intervals `y` carries no derivative, and is used as any other value.
    interval(f)(lo, hi)
    with pytest.raises(CapturedTensorError):
        grad(lambda x: f(x).sum())(lo)


def test_pytrees_of_the_users_containers():
    class Box:
        def __init__(self, x):
            self.x = x

    pytree.register_node(Box, lambda box: ((box.x,), None), lambda _, children: Box(*children))
    lo, hi = box(1, 4)
    low, high = interval(lambda b: Box(b.x * 2))(Box(lo), Box(hi))
    torch.testing.assert_close((low.x, high.x), (lo * 2, hi * 2))


def test_a_rule_level_is_a_context_for_one_run():
    assert issubclass(Interval, RuleInterpreter)
    with pytest.raises(ZeroDivisionError), Interval():
        _ = 1 / 0
    assert lamina.debug.stack_text() == "level 0: plain PyTorch"
