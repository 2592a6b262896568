"""What is said to those who write rules."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from lamina.autodiff.declare import pointwise, vjp_rule
from lamina.debug import explain
from lamina.vmap.table import batching_rule
from lamina_core.errors import RuleError
from tests.errors.saying import said

aten = torch.ops.aten


def rule(info, in_dims, x):
    return x, in_dims[0]


def test_a_second_batching_rule():
    assert_expected_inline(said(RuleError, lambda: batching_rule(aten.trace.default)(rule)), """""")


def test_a_second_derivative():
    assert_expected_inline(
        said(RuleError, lambda: pointwise(aten.tanh.default, lambda t, out: t)), """"""
    )


def test_a_rule_for_a_function():
    assert_expected_inline(said(RuleError, lambda: batching_rule(torch.sin)(rule)), """""")


def test_a_rule_for_all_overloads_at_once():
    assert_expected_inline(said(RuleError, lambda: vjp_rule(aten.sum)(rule)), """""")


def test_a_derivative_that_names_no_argument():
    assert_expected_inline(
        said(RuleError, lambda: pointwise(aten.atan2.default, lambda t, x, beta: t)), """"""
    )


def test_explain_of_no_op():
    assert_expected_inline(said(RuleError, lambda: explain("aten.no_such_op")), """""")
