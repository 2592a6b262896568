"""What is said about in-place ops whose meaning is not clear."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from lamina import grad, vjp, vmap
from lamina_core.errors import MutationError
from tests.errors.saying import said

X = torch.arange(6.0).reshape(2, 3)


def test_a_captured_tensor_under_vmap():
    total = torch.zeros(3)
    assert_expected_inline(said(MutationError, lambda: vmap(lambda x: total.add_(x))(X)), """""")


def test_an_argument_that_is_not_mapped():
    total = torch.zeros(3)
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x, t: t.add_(x), in_dims=(0, None))(X, total)),
        """""",
    )


def test_a_captured_tensor_under_grad():
    total = torch.zeros(3)
    assert_expected_inline(
        said(MutationError, lambda: grad(lambda x: total.mul_(x).sum())(X[0])), """"""
    )


def test_a_captured_tensor_in_a_random_op():
    noise = torch.zeros(3)
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x: noise.normal_(), randomness="different")(X)),
        """""",
    )


def test_a_write_through_detach():
    def loss(x):
        y = x * 2
        y.detach().zero_()
        return y.sum()

    assert_expected_inline(said(MutationError, lambda: grad(loss)(X)), """""")


def test_operands_that_do_not_broadcast():
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x: x[0].add_(x))(X.clone())), """"""
    )


def test_a_result_of_another_shape():
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x: torch.sum(x, 0, out=torch.zeros(5)))(X)), """"""
    )


def test_an_out_that_would_be_resized():
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x: torch.sin(x, out=torch.empty(0)))(X)), """"""
    )


def test_an_argument_that_changes_shape():
    assert_expected_inline(
        said(MutationError, lambda: grad(lambda x: x.t_().sum())(X.clone())), """"""
    )


def test_a_view_of_a_base_that_changed_shape():
    def loss(x):
        y = x * 2
        row = y[0]
        y.t_()
        return row.sum()

    assert_expected_inline(said(MutationError, lambda: grad(loss)(X)), """""")


def test_a_view_of_another_dtype():
    def loss(x):
        y = x * 2
        y.view(torch.int32).zero_()
        return y.sum()

    assert_expected_inline(said(MutationError, lambda: grad(loss)(X)), """""")


def test_no_counterpart_out_of_place():
    assert_expected_inline(
        said(MutationError, lambda: grad(lambda x: torch.ones(2, 3, out=x * 2).sum())(X)), """"""
    )


def test_a_residual_that_was_written_over():
    scale = torch.ones(2, 3)
    out, vjp_fn = vjp(lambda x: x * scale, X)
    scale.add_(1)
    assert_expected_inline(said(MutationError, lambda: vjp_fn(out)), """""")
