"""What is said where an index that differs between examples is wanted as one Python number."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from lamina import grad, vmap
from lamina_core.errors import DataDependentError, MutationError
from tests.errors.saying import said

X = torch.arange(6.0).reshape(2, 3)
I = torch.tensor([0, 2])  # noqa: E741 - as in x[i]


def test_a_slice():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x, i: x[i:])(X, I)),
        """\
an index of one Python number is wanted, but each example has its own
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  it comes from x[i:j], range(i) or a_list[i] with a batched i
  to fix: use torch.narrow(x, dim, i, length) for x[i:j], and torch.stack(a_list)[i]""",
    )


def test_a_list_in_grad():
    def loss(x, i):
        return x * [1.0, 2.0][i]

    assert_expected_inline(
        said(DataDependentError, lambda: vmap(grad(loss))(X[:, 0], I)),
        """\
an index of one Python number is wanted, but each example has its own
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  it comes from x[i:j], range(i) or a_list[i] with a batched i
  to fix: use torch.narrow(x, dim, i, length) for x[i:j], and torch.stack(a_list)[i]""",
    )


def test_a_write_to_a_captured_tensor():
    table = torch.zeros(3)

    def write(i):
        table[i] = 1

    assert_expected_inline(
        said(MutationError, lambda: vmap(write)(I)),
        """\
an in-place op writes a value of this transform to a tensor captured from outside it
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  captured, or passed without being mapped: a tensor of shape [3]
  to fix: pass it as an argument (a mapped one under vmap), make it inside, or do not write""",
    )


def test_a_mask_without_dims():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x, i: x[i > 0])(X, I)),
        """\
aten.item.default needs one Python value, but there are 2
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  it comes from .item(), float(), bool(), int() or an `if` on a batched tensor
  to fix: use torch.where in place of an `if`, and tensor ops in place of .item()""",
    )
