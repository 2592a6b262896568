"""Ops defined with `torch.library` under the transforms: registered rules, derivatives, writes.

The oracle is the op itself, called in a loop over the examples, and `torch.autograd`.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch._functorch import autograd_function

import lamina
from lamina import grad, hessian, jvp, vjp, vmap
from lamina_core.debug import explain
from lamina_core.errors import (
    FallbackWarning,
    MissingRuleError,
    MutationError,
    NotDifferentiableError,
    RuleError,
)
from tests.errors.saying import said

LIBRARY = torch.library.Library("lamina_tests", "DEF")
OPS = torch.ops.lamina_tests
CALLS: list[tuple] = []


@pytest.fixture(autouse=True)
def no_calls(monkeypatch):
    """Forgets the calls of rules, forbids loops, and bars the way into torch.func's own."""
    CALLS.clear()
    monkeypatch.setattr(lamina.config, "fallback", "error")

    def barred(*args, **kwargs):
        raise AssertionError("the rule was reached through torch.func")

    monkeypatch.setattr(autograd_function, "custom_function_call_vmap_helper", barred)


@pytest.fixture
def looping(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "silent")


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# -- the ops ---------------------------------------------------------------------------------------


@torch.library.custom_op("lamina_tests::scaled_cube", mutates_args=())
def scaled_cube(x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
    return torch.from_numpy(x.detach().numpy() ** 3 * scale + shift)


@scaled_cube.register_vmap
def _(info, in_dims, x, scale=1.0, *, shift=0.0):
    CALLS.append((info.batch_size, info.randomness, in_dims))
    return scaled_cube(x, scale, shift=shift), in_dims[0]


def _setup(ctx, inputs, keyword_only_inputs, output):
    x, ctx.scale = inputs
    ctx.save_for_backward(x)


scaled_cube.register_autograd(
    lambda ctx, ct: (ct * 3 * ctx.saved_tensors[0] ** 2 * ctx.scale, None), setup_context=_setup
)


@torch.library.custom_op("lamina_tests::row_times", mutates_args=())
def row_times(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[n, m], [m] -> [n, m], [n]; no rule of its own."""
    product = x.detach().numpy() * y.detach().numpy()
    return torch.from_numpy(product), torch.from_numpy(product.sum(1))


def _row_times_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _row_times_backward(ctx, product_ct, total_ct):
    x, y = ctx.saved_tensors
    ct = product_ct + total_ct[:, None]
    return ct * y, (ct * x).sum(0)


row_times.register_autograd(_row_times_backward, setup_context=_row_times_setup)


@torch.library.custom_op("lamina_tests::total", mutates_args=())
def total(xs: list[Tensor]) -> Tensor:
    return torch.from_numpy(sum(x.detach().numpy() for x in xs))


def _total_setup(ctx, inputs, output):
    ctx.count = len(inputs[0])


total.register_autograd(lambda ctx, ct: [ct] * ctx.count, setup_context=_total_setup)

LIBRARY.define("raw_sine(Tensor x) -> Tensor")
LIBRARY.impl("raw_sine", lambda x: torch.from_numpy(x.numpy()).sin(), "CPU")
torch.library.register_autograd(
    "lamina_tests::raw_sine",
    lambda ctx, ct: ct * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
LIBRARY.define("composite(Tensor x, Tensor y) -> Tensor")
LIBRARY.impl("composite", lambda x, y: x.sin() @ y, "CompositeImplicitAutograd")


@torch.library.custom_op("lamina_tests::accumulate_", mutates_args={"x"})
def accumulate_(x: Tensor, by: Tensor) -> Tensor:
    """Adds to x in place and gives the sum of the result."""
    array = x.detach().numpy()
    array += by.detach().numpy()
    return torch.tensor(array.sum(-1))


@torch.library.custom_op("lamina_tests::zero_all_", mutates_args={"xs"})
def zero_all_(xs: list[Tensor]) -> None:
    for x in xs:
        x.detach().numpy()[...] = 0


LIBRARY.define("negate_(Tensor(a!) x, *, Tensor(b!)? count=None) -> Tensor(a!)")


def _negate(x, *, count=None):
    if count is not None:
        count.add_(1)
    return x.neg_()


LIBRARY.impl("negate_", _negate, "CPU")


# -- batching rules --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
def test_the_rule_of_a_custom_op_is_used(dim):
    x = rand(4, 5)
    out = vmap(lambda x: scaled_cube(x, 2.0, shift=1.0), in_dims=dim, out_dims=dim)(x)
    torch.testing.assert_close(out, 2 * x**3 + 1)
    ((size, randomness, in_dims),) = CALLS
    assert (size, randomness, in_dims[0]) == (x.shape[dim], "error", dim)
    assert "vmap   rule" in explain("lamina_tests.scaled_cube")


def test_a_rule_runs_at_the_level_below():
    x = rand(2, 3, 4)
    out = vmap(vmap(scaled_cube, in_dims=1), randomness="same")(x)
    torch.testing.assert_close(out, (x**3).movedim(-1, 1))
    assert [call[:2] for call in CALLS] == [(4, "error"), (2, "same")]


def test_a_rule_may_make_tensors_and_write_to_them():
    @torch.library.custom_op("lamina_tests::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    @doubled.register_vmap
    def _(info, in_dims, x):
        out = torch.zeros(x.shape, dtype=x.dtype)
        out.copy_(x * 2)
        return out, in_dims[0]

    x = rand(2, 3, 4)
    torch.testing.assert_close(vmap(vmap(doubled))(x), 2 * x)


@pytest.mark.parametrize("as_overload", [False, True], ids=["by name", "by overload"])
@pytest.mark.parametrize("decorated", [False, True], ids=["called", "decorator"])
def test_a_rule_registered_for_a_raw_op_is_used_also_after_the_first_call(
    as_overload, decorated, looping
):
    name = f"late_{as_overload}_{decorated}".lower()
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    LIBRARY.impl(name, lambda x: x.exp(), "CPU")
    op = getattr(OPS, name).default
    x = rand(2, 3)
    torch.testing.assert_close(vmap(op)(x), x.exp())

    def rule(info, in_dims, x):
        CALLS.append(in_dims)
        return op(x), in_dims[0]

    wanted = op if as_overload else f"lamina_tests::{name}"
    if decorated:
        torch.library.register_vmap(wanted, lib=LIBRARY)(rule)
    else:
        torch.library.register_vmap(wanted, rule, lib=LIBRARY)
    torch.testing.assert_close(vmap(op)(x), x.exp())
    assert CALLS == [(0,)]


def test_the_rule_of_an_op_that_is_gone_is_not_used():
    for factor in (2, 3):
        library = torch.library.Library("lamina_gone", "DEF")
        library.define("scale(Tensor x) -> Tensor")
        library.impl("scale", lambda x, factor=factor: x * factor, "CompositeImplicitAutograd")
        if factor == 2:
            torch.library.register_vmap(
                "lamina_gone::scale", lambda info, dims, x: (x * 0, dims[0]), lib=library
            )
        out = vmap(torch.ops.lamina_gone.scale.default)(torch.ones(2, 3))
        torch.testing.assert_close(out, torch.full((2, 3), 0.0 if factor == 2 else 3.0))
        library._destroy()


def test_without_a_rule_an_op_runs_example_by_example(monkeypatch):
    x, y = rand(2, 3, 4), rand(2, 4)
    assert said(MissingRuleError, lambda: vmap(row_times)(x, y)).startswith(
        "no batching rule for lamina_tests.row_times.default"
    )
    monkeypatch.setattr(lamina.config, "fallback", "warn")
    with pytest.warns(FallbackWarning, match="lamina_tests.row_times") as caught:
        product, sums = vmap(row_times, in_dims=(0, None))(x, y[0])
    assert "torch.library.register_vmap for an op of your own" in str(caught[0].message)
    torch.testing.assert_close(product, x * y[0])
    torch.testing.assert_close(sums, (x * y[0]).sum(-1))


def test_lists_of_tensors(looping):
    x, y = rand(2, 3), rand(3)
    torch.testing.assert_close(vmap(lambda x: total([x, y, x]))(x), x + y + x)


def test_a_composite_op_is_decomposed():
    x, y = rand(2, 3, 4), rand(4)
    torch.testing.assert_close(vmap(OPS.composite.default, in_dims=(0, None))(x, y), x.sin() @ y)
    assert "vmap   decomposed" in explain("lamina_tests.composite")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x, "returned Tensor"),
        (lambda x: (x, 1), r"shape [2, 3] with out_dims 1"),
        (lambda x: (x, (0, 0)), r"out_dims (0, 0)"),
        (lambda x: ([x, x], (0,)), r"2 outputs and out_dims (0,)"),
    ],
    ids=["no pair", "wrong dim", "too many dims", "too few dims"],
)
def test_a_wrong_answer_of_a_rule_is_an_error(answer, words, monkeypatch):
    definition = torch._library.custom_ops.OPDEFS["lamina_tests::scaled_cube"]
    monkeypatch.setattr(definition, "_vmap_fn", lambda info, in_dims, x: answer(x))
    text = said(RuleError, lambda: vmap(scaled_cube)(rand(2, 3)))
    assert text.startswith("the vmap of lamina_tests.scaled_cube.default returned")
    assert words in text
    assert "while interpreting at level 1" in text


def test_torch_func_still_finds_the_rules(monkeypatch):
    monkeypatch.undo()
    x = rand(2, 3)
    torch.testing.assert_close(torch.func.vmap(scaled_cube)(x), x**3)


# -- derivatives -----------------------------------------------------------------------------------


def by_autograd(f, *xs):
    leaves = [x.clone().requires_grad_() for x in xs]
    return torch.autograd.grad(f(*leaves), leaves)


SCALARS = {
    "keyword": (lambda x: scaled_cube(x, 2.0, shift=1.0).sin().sum(), (3,)),
    "raw": (lambda x: OPS.raw_sine(x).square().sum(), (3,)),
    "list": (lambda x: total([x, x * 2, x.exp()]).square().sum(), (3,)),
    "two outputs": (lambda x, y: row_times(x, y)[0].sum() * row_times(x, y)[1].prod(), (2, 3)),
    "one of two outputs": (lambda x, y: row_times(x, y)[1].square().sum(), (2, 3)),
}


def arguments(f, shape, *batch):
    shapes = [shape] if f.__code__.co_argcount == 1 else [shape, shape[-1:]]
    return [rand(*batch, *s) for s in shapes]


@pytest.mark.parametrize("case", SCALARS)
def test_grad_and_vjp_use_the_registered_formula(case):
    f, shape = SCALARS[case]
    xs = arguments(f, shape)
    everything = tuple(range(len(xs)))
    expected = by_autograd(f, *xs)
    torch.testing.assert_close(grad(f, everything)(*xs), expected)
    out, pullback = vjp(f, *xs)
    torch.testing.assert_close(pullback(torch.full_like(out, 2.0)), tuple(2 * e for e in expected))


@pytest.mark.parametrize("case", SCALARS)
def test_jvp_is_the_transpose_of_the_registered_formula(case):
    f, shape = SCALARS[case]
    xs = arguments(f, shape)
    tangents = tuple(x.cos() for x in xs)
    out, out_t = jvp(f, tuple(xs), tangents)
    torch.testing.assert_close(out, f(*xs))
    expected = sum((g * t).sum() for g, t in zip(by_autograd(f, *xs), tangents, strict=True))
    torch.testing.assert_close(out_t, expected)


@pytest.mark.parametrize("case", ["keyword", "raw"])
def test_second_derivatives(case):
    f, shape = SCALARS[case]
    (x,) = arguments(f, shape)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    rows = [torch.autograd.grad(first[i], leaf, retain_graph=True)[0] for i in range(3)]
    lamina.config.fallback = "silent"  # set back by the fixture
    torch.testing.assert_close(hessian(f)(x), torch.stack(rows))
    torch.testing.assert_close(grad(lambda x: grad(f)(x).sum())(x), torch.stack(rows).sum(0))


@pytest.mark.parametrize("case", SCALARS)
def test_per_sample_gradients(case, looping):
    f, shape = SCALARS[case]
    xs = arguments(f, shape, 4)
    everything = tuple(range(len(xs)))
    found = vmap(grad(f, everything))(*xs)
    rows = [by_autograd(f, *examples) for examples in zip(*xs, strict=True)]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*rows, strict=True))))
    summed = grad(lambda *xs: vmap(f)(*xs).sum(), everything)(*xs)
    torch.testing.assert_close(summed, found)


def test_per_sample_gradients_use_the_rule():
    x = rand(4, 3)
    found = vmap(grad(lambda x: scaled_cube(x).sum()))(x)
    torch.testing.assert_close(found, 3 * x**2)
    assert len(CALLS) == 1


def test_backward_reaches_a_captured_parameter():
    weight = rand(3).requires_grad_()
    x = rand(4, 3)
    vmap(lambda x: (scaled_cube(weight) * x).sum())(x).sum().backward()
    torch.testing.assert_close(weight.grad, 3 * weight.detach() ** 2 * x.sum(0))
    mapped = rand(4, 3).requires_grad_()
    vmap(scaled_cube)(mapped).sum().backward()
    torch.testing.assert_close(mapped.grad, 3 * mapped.detach() ** 2)


def test_an_op_without_a_formula_is_an_error():
    @torch.library.custom_op("lamina_tests::no_formula", mutates_args=())
    def no_formula(x: Tensor) -> Tensor:
        return x.clone()

    x = rand(3)
    text = said(NotDifferentiableError, lambda: grad(lambda x: no_formula(x).sum())(x))
    assert "lamina_tests.no_formula.default has no derivative" in text
    assert "register_autograd" in text
    with pytest.raises(NotDifferentiableError):
        jvp(no_formula, (x,), (x,))
    torch.testing.assert_close(grad(lambda y: (no_formula(x) * y).sum())(x), x)


# -- ops that write --------------------------------------------------------------------------------


def test_a_write_to_what_is_made_inside(looping):
    x, by = rand(4, 3), rand(3)

    def f(x, by):
        mine = x.sin()
        return accumulate_(mine, by), mine

    sums, mine = vmap(f, in_dims=(0, None))(x, by)
    torch.testing.assert_close(mine, x.sin() + by)
    torch.testing.assert_close(sums, (x.sin() + by).sum(-1))


def test_a_write_to_what_all_examples_share_until_then(looping):
    x = rand(4, 3)

    def f(x):
        mine = torch.zeros(3, dtype=torch.float64)
        other = mine[1:]
        accumulate_(mine, x)
        return mine, other

    mine, other = vmap(f)(x)
    torch.testing.assert_close(mine, x)
    torch.testing.assert_close(other, x[:, 1:])


def test_a_write_through_a_view(looping):
    x, by = rand(4, 3, 5), rand(4, 3)

    def f(x, by):
        mine = x.clone()
        accumulate_(mine[:, 1], by)
        return mine

    expected = x.clone()
    expected[:, :, 1] += by
    torch.testing.assert_close(vmap(f)(x, by), expected)


def test_a_write_to_an_argument_reaches_the_caller(looping):
    x, by = rand(3, 4), rand(4, 3)
    expected = x + by.T
    vmap(accumulate_, in_dims=(1, 0))(x, by)
    torch.testing.assert_close(x, expected)


def test_a_write_under_two_levels(looping):
    x, by = rand(2, 4, 3), rand(4, 3)

    def f(x, by):
        mine = x * 2
        accumulate_(mine, by)
        return mine

    torch.testing.assert_close(vmap(vmap(f), in_dims=(0, None))(x, by), 2 * x + by)


def test_a_list_of_tensors_is_written(looping):
    x, y = rand(4, 3), rand(4, 2)

    def f(x, y):
        x, y = x.clone(), y.clone()
        zero_all_([x, y[1:]])
        return x, y

    zeroed, rest = vmap(f)(x, y)
    torch.testing.assert_close(zeroed, torch.zeros_like(x))
    torch.testing.assert_close(rest, torch.stack([y[:, 0], torch.zeros(4).double()], 1))


def test_an_op_that_returns_what_it_writes(looping):
    x = rand(4, 3)

    def f(x):
        mine, count = x.clone(), torch.zeros(())
        out = OPS.negate_(mine, count=count)
        assert out is mine
        return OPS.negate_(out[1:]), out, count

    part, whole, count = vmap(f)(x)
    torch.testing.assert_close(part, x[:, 1:])
    torch.testing.assert_close(whole, torch.cat([-x[:, :1], x[:, 1:]], 1))
    torch.testing.assert_close(count, torch.ones(4))


def test_the_rule_of_an_op_that_writes():
    @torch.library.custom_op("lamina_tests::fill_", mutates_args={"x"})
    def fill_(x: Tensor, y: Tensor) -> None:
        x.copy_(y)

    @fill_.register_vmap
    def _(info, in_dims, x, y):
        CALLS.append(in_dims)
        x = x.movedim(in_dims[0], -1)
        x.copy_(y if in_dims[1] is None else y.movedim(in_dims[1], -1))
        return None, None

    def f(x, y):
        mine = torch.zeros(3, dtype=torch.float64)
        fill_(mine, y)
        fill_(x, y)
        return mine

    x, y = rand(4, 3), rand(3, 4)
    torch.testing.assert_close(vmap(f, in_dims=(0, 1))(x, y), y.T)
    torch.testing.assert_close(x, y.T)
    assert len(CALLS) == 2


def test_a_write_to_a_captured_tensor_is_an_error(looping):
    captured = torch.zeros(3, dtype=torch.float64)
    text = said(MutationError, lambda: vmap(lambda x: accumulate_(captured, x))(rand(4, 3)))
    assert "lamina_tests.accumulate_.default writes a value of this transform" in text
    assert not captured.any()


def test_a_write_of_constants_inside_a_derivative():
    x = rand(3)

    def f(y):
        mine = x.clone()
        accumulate_(mine, x)
        return (mine * y).sum()

    torch.testing.assert_close(grad(f)(rand(3)), 2 * x)
    torch.testing.assert_close(jvp(f, (x,), (x,))[1], (2 * x * x).sum())


def test_a_write_that_would_lose_a_derivative_is_an_error():
    x = rand(3)

    def into(y):
        mine = y.clone()
        accumulate_(mine, x)
        return mine.sum()

    def of(y):
        mine = x.clone()
        accumulate_(mine, y)
        return mine.sum()

    for f in (into, of):
        for call in (lambda f=f: grad(f)(x), lambda f=f: jvp(f, (x,), (x,))):
            text = said(NotDifferentiableError, call)
            assert "accumulate_.default writes to its argument and has no derivative" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        def quietly(y):
            with torch.no_grad():
                mine = y.clone()
                accumulate_(mine, y)
            return (mine * y).sum()

        torch.testing.assert_close(grad(quietly)(x), 2 * x)


def test_per_sample_gradients_around_a_write(looping):
    x = rand(4, 3)

    def f(y):
        mine = y.detach().clone()
        accumulate_(mine, y.detach())
        return (mine * y).sum()

    torch.testing.assert_close(vmap(grad(f))(x), 2 * x)
