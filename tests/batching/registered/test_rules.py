"""Batching rules of registered ops: who finds them, and what runs where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lamina
from lamina import vmap
from lamina_core.debug import explain
from lamina_core.errors import FallbackWarning, MissingRuleError, RuleError
from tests.batching.registered.ops import CALLS, LIBRARY, OPS, rand, row_times, scaled_cube, total
from tests.errors.saying import said


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
