"""What is said to those who write rules."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from lamina.autodiff.declare import pointwise, vjp_rule
from lamina.batching.table import batching_rule
from lamina.debug import explain
from lamina_core.errors import RuleError
from tests.errors.saying import said

aten = torch.ops.aten


def rule(info, in_dims, x):
    return x, in_dims[0]


def test_a_second_batching_rule():
    assert_expected_inline(
        said(RuleError, lambda: batching_rule(aten.trace.default)(rule)),
        """\
a second batching rule for aten.trace.default
  first owner: lamina.batching.rules.reductions.trace
  second owner: tests.errors.test_registration.rule
  to fix: keep one of the two; lamina.extend takes replace=True""",
    )


def test_a_second_derivative():
    assert_expected_inline(
        said(RuleError, lambda: pointwise(aten.tanh.default, lambda t, out: t)),
        """\
a second vjp rule for aten.tanh.default
  first owner: lamina.autodiff.rules.activations.Pointwise(aten.tanh.default)
  second owner: tests.errors.test_registration.Pointwise(aten.tanh.default)
  to fix: keep one of the two; lamina.extend takes replace=True""",
    )


def test_a_rule_for_a_function():
    assert_expected_inline(
        said(RuleError, lambda: batching_rule(torch.sin)(rule)),
        """\
a batching rule is registered for an OpOverload
  got: builtin_function_or_method sin
  to fix: name the overload, such as aten.sum.dim_IntList""",
    )


def test_a_rule_for_all_overloads_at_once():
    assert_expected_inline(
        said(RuleError, lambda: vjp_rule(aten.sum)(rule)),
        """\
a vjp rule is registered for an OpOverload
  got: OpOverloadPacket sum
  to fix: name the overload, such as aten.sum.dim_IntList""",
    )


def test_a_derivative_that_names_no_argument():
    assert_expected_inline(
        said(RuleError, lambda: pointwise(aten.atan2.default, lambda t, x, beta: t)),
        """\
a derivative of aten.atan2.default names 'beta', which is no argument of the op
  arguments of the op: self, other
  to fix: name one of these, or out, or an operand: x, y, z, w""",
    )


def test_explain_of_no_op():
    assert_expected_inline(
        said(RuleError, lambda: explain("aten.no_such_op")),
        """\
there is no op named 'aten.no_such_op'
  to fix: name it as torch.ops does, such as 'aten.mul.Tensor'""",
    )
