"""What is said where a transform cannot know what an op means: values, randomness, leaks, rules."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from lamina import config, grad, vmap
from lamina_core.errors import (
    DataDependentError,
    EscapedTensorError,
    MissingRuleError,
    RandomnessError,
)
from tests.errors.saying import said

X = torch.arange(6.0).reshape(2, 3)


def test_item():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x: x.sum().item())(X)), """"""
    )


def test_an_if():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x: x if x.sum() > 0 else -x)(X)), """"""
    )


def test_float_in_a_nested_vmap():
    assert_expected_inline(
        said(DataDependentError, lambda: grad(lambda x: vmap(vmap(float))(x))(X)), """"""
    )


def test_nonzero():
    assert_expected_inline(said(DataDependentError, lambda: vmap(torch.nonzero)(X)), """""")


def test_unique():
    assert_expected_inline(said(DataDependentError, lambda: vmap(torch.unique)(X)), """""")


def test_a_mask_as_index():
    assert_expected_inline(said(DataDependentError, lambda: vmap(lambda x: x[x > 1])(X)), """""")


def test_masked_select():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x: torch.masked_select(x, x > 1))(X)), """"""
    )


def test_repeat_interleave():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(torch.repeat_interleave)(X.long())), """"""
    )


def test_allclose():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x: torch.allclose(x, X[0]))(X)), """"""
    )


def test_a_random_op():
    assert_expected_inline(
        said(RandomnessError, lambda: vmap(lambda x: x + torch.randn(3))(X)), """"""
    )


def test_dropout():
    assert_expected_inline(
        said(RandomnessError, lambda: vmap(grad(lambda x: torch.dropout(x, 0.5, True).sum()))(X)),
        """""",
    )


def test_one_draw_from_parameters_that_differ():
    assert_expected_inline(
        said(RandomnessError, lambda: vmap(lambda x: torch.normal(x, 1.0), randomness="same")(X)),
        """""",
    )


def test_a_tensor_that_escaped():
    kept = []
    vmap(lambda x: kept.append(x * 2))(X)
    assert_expected_inline(said(EscapedTensorError, lambda: kept[0] + 1), """""")


def test_a_tensor_that_escaped_into_another_vmap():
    kept = []
    vmap(vmap(kept.append))(X)
    assert_expected_inline(said(EscapedTensorError, lambda: vmap(lambda x: x + kept[0])(X)), """""")


def test_no_batching_rule(monkeypatch):
    monkeypatch.setattr(config, "fallback", "error")
    assert_expected_inline(said(MissingRuleError, lambda: vmap(torch.histc)(X)), """""")
