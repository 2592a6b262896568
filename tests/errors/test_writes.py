"""What is said about in-place ops whose meaning is not clear."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from lamina import grad, vjp, vmap
from lamina_core.errors import MutationError
from tests.errors.saying import said

X = torch.arange(6.0).reshape(2, 3)


def test_a_captured_tensor_under_vmap():
    total = torch.zeros(3)
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x: total.add_(x))(X)),
        """\
aten.add_.Tensor writes a value of this transform to a tensor captured from outside it
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  captured, or passed without being mapped: a tensor of shape [3]
  to fix: pass it as an argument (a mapped one under vmap), make it inside, or do not write""",
    )


def test_an_argument_that_is_not_mapped():
    total = torch.zeros(3)
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x, t: t.add_(x), in_dims=(0, None))(X, total)),
        """\
aten.add_.Tensor writes a value of this transform to a tensor captured from outside it
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  captured, or passed without being mapped: a tensor of shape [3]
  to fix: pass it as an argument (a mapped one under vmap), make it inside, or do not write""",
    )


def test_a_captured_tensor_under_grad():
    total = torch.zeros(3)
    assert_expected_inline(
        said(MutationError, lambda: grad(lambda x: total.mul_(x).sum())(X[0])),
        """\
aten.mul_.Tensor writes a value of this transform to a tensor captured from outside it
  while interpreting at level 1: grad
  captured, or passed without being mapped: a tensor of shape [3]
  to fix: pass it as an argument (a mapped one under vmap), make it inside, or do not write""",
    )


def test_a_captured_tensor_in_a_random_op():
    noise = torch.zeros(3)
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x: noise.normal_(), randomness="different")(X)),
        """\
aten.normal_.default writes a value of this transform to a tensor captured from outside it
  while interpreting at level 1: vmap(batch_size=2, randomness='different')
  captured, or passed without being mapped: a tensor of shape [3]
  to fix: pass it as an argument (a mapped one under vmap), make it inside, or do not write""",
    )


def test_operands_that_do_not_broadcast():
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x: x[0].add_(x))(X.clone())),
        """\
aten.add_.Tensor writes to a tensor of shape [], which the other operands do not broadcast to
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use the out-of-place form of the op""",
    )


def test_a_result_of_another_shape():
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x: torch.sum(x, 0, out=torch.zeros(5)))(X)),
        """\
aten.sum.IntList_out writes a result of shape [] to a tensor of shape [5]
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use the out-of-place form of the op""",
    )


def test_an_out_that_would_be_resized():
    assert_expected_inline(
        said(MutationError, lambda: vmap(lambda x: torch.sin(x, out=torch.empty(0)))(X)),
        """\
aten.sin.out would resize its out argument of shape [0]
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  the result has shape [3]
  to fix: use the op without out=, or give an out of the result's shape""",
    )


def test_a_view_of_another_dtype():
    def loss(x):
        y = x * 2
        y.view(torch.int32).zero_()
        return y.sum()

    assert_expected_inline(
        said(MutationError, lambda: grad(loss)(X)),
        """\
cannot write through aten.view.dtype, which views torch.float32 as torch.int32 under a derivative
  while interpreting at level 1: grad
  to fix: write to the tensor itself, with values of its own dtype""",
    )


def test_no_counterpart_out_of_place():
    assert_expected_inline(
        said(MutationError, lambda: grad(lambda x: torch.ops.aten.set_data.default(x * 2, X))(X)),
        """\
aten.set_data.default writes to its argument and has no out-of-place counterpart
  while interpreting at level 1: grad
  to fix: use the out-of-place form of the op""",
    )


def test_memory_that_is_exchanged():
    assert_expected_inline(
        said(MutationError, lambda: grad(lambda x: (x * 2).set_(X, 0, (2, 3)).sum())(X)),
        """\
aten.set_.source_Tensor_storage_offset exchanges the memory of a tensor
  while interpreting at level 1: grad
  a tensor of a transform, whether an argument of it or made inside, has none
  to fix: go on with the other tensor, or write its values by x.copy_(other)""",
    )


def test_a_residual_that_was_written_over():
    scale = torch.ones(2, 3)
    out, vjp_fn = vjp(lambda x: x * scale, X)
    scale.add_(1)
    assert_expected_inline(
        said(MutationError, lambda: vjp_fn(out)),
        """\
a tensor that the gradient of aten.mul.Tensor needs was written to in place
  it has the shape [2, 3]
  to fix: write to a clone of it""",
    )


@pytest.mark.filterwarnings("ignore")  # of what tracing is good for
def test_a_write_that_is_not_traced():
    traced = vmap(lambda x: x.sin().mul_(2))
    with pytest.raises(MutationError, match="does not see what is written"):
        torch.jit.trace(traced, (X,))
