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
        said(DataDependentError, lambda: vmap(lambda x: x.sum().item())(X)),
        """\
aten.item.default needs one Python value, but there are 2
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  it comes from .item(), float(), bool(), int() or an `if` on a batched tensor
  to fix: use torch.where in place of an `if`, and tensor ops in place of .item()""",
    )


def test_an_if():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x: x if x.sum() > 0 else -x)(X)),
        """\
aten.item.default needs one Python value, but there are 2
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  it comes from .item(), float(), bool(), int() or an `if` on a batched tensor
  to fix: use torch.where in place of an `if`, and tensor ops in place of .item()""",
    )


def test_float_in_a_nested_vmap():
    assert_expected_inline(
        said(DataDependentError, lambda: grad(lambda x: vmap(vmap(float))(x))(X)),
        """\
aten.item.default needs one Python value, but there are 3
  while interpreting at level 3: vmap(batch_size=3, randomness='error')
  it comes from .item(), float(), bool(), int() or an `if` on a batched tensor
  to fix: use torch.where in place of an `if`, and tensor ops in place of .item()""",
    )


def test_nonzero():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(torch.nonzero)(X)),
        """\
aten.nonzero.default would give each example an output of its own shape
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use torch.where, a masked reduction or torch.nonzero_static""",
    )


def test_unique():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(torch.unique)(X)),
        """\
aten._unique2.default would give each example an output of its own shape
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use s = x.sort().values and s[1:] != s[:-1], which marks where a new value starts, or \
count integers below n with zeros(n).scatter_add(0, x, ones)""",
    )


def test_unique_neighbours_and_rows():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(torch.unique_consecutive)(X)),
        """\
aten.unique_consecutive.default would give each example an output of its own shape
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use x[1:] != x[:-1], which marks where a new value starts""",
    )
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x: torch.unique(x, dim=0))(X[..., None])),
        """\
aten.unique_dim.default would give each example an output of its own shape
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use (x[1:] != x[:-1]).any(1), which marks where a new row starts, behind a sort of the \
rows""",
    )


def test_a_mask_as_index():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x: x[x > 1])(X)),
        """\
a mask that differs between examples would give each a result of its own shape
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use torch.where, a masked reduction or torch.nonzero_static""",
    )


def test_masked_select():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x: torch.masked_select(x, x > 1))(X)),
        """\
aten.masked_select.default would give each example an output of its own shape
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use torch.where, a masked reduction or torch.nonzero_static""",
    )


def test_repeat_interleave():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(torch.repeat_interleave)(X.long())),
        """\
aten.repeat_interleave.Tensor would give each example an output of its own shape
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: pass output_size, which says how many elements each example has""",
    )


def test_allclose():
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(lambda x: torch.allclose(x, X[0]))(X)),
        """\
aten.allclose.default gives one Python value, and the 2 examples disagree
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use torch.isclose(...).all(), which stays a tensor""",
    )


def test_a_random_op():
    assert_expected_inline(
        said(RandomnessError, lambda: vmap(lambda x: x + torch.randn(3))(X)),
        """\
aten.randn.default draws random numbers, and vmap was not told what that means
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: pass randomness="different" for a draw per example, or "same" for one for all""",
    )


def test_dropout():
    assert_expected_inline(
        said(RandomnessError, lambda: vmap(grad(lambda x: torch.dropout(x, 0.5, True).sum()))(X)),
        """\
aten.native_dropout.default draws random numbers, and vmap was not told what that means
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: pass randomness="different" for a draw per example, or "same" for one for all""",
    )


def test_a_tensor_that_escaped():
    kept = []
    vmap(lambda x: kept.append(x * 2))(X)
    assert_expected_inline(
        said(EscapedTensorError, lambda: kept[0] + 1),
        """\
a batched tensor of shape [3] is used after its vmap returned
  escaped from level 1: vmap(batch_size=2, randomness='error')
  to fix: return the tensor from the mapped function instead of storing it""",
    )


def test_a_tensor_that_escaped_into_another_vmap():
    kept = []
    vmap(vmap(kept.append))(X)
    assert_expected_inline(
        said(EscapedTensorError, lambda: vmap(lambda x: x + kept[0])(X)),
        """\
a batched tensor of shape [] is used after its vmap returned
  escaped from level 2: vmap(batch_size=3, randomness='error')
  to fix: return the tensor from the mapped function instead of storing it""",
    )


def test_no_batching_rule(monkeypatch):
    monkeypatch.setattr(config, "fallback", "error")
    assert_expected_inline(
        said(MissingRuleError, lambda: vmap(torch._test_functorch_fallback)(X, X)),
        """\
no batching rule for aten._test_functorch_fallback.default
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  registered overloads of the same op: none
  to fix: add one, as transforms/lamina/batching/rules/README.md says
  or loop over the examples, with lamina.config.fallback = "warn\"""",
    )


def test_an_op_that_loops_on_purpose(monkeypatch):
    monkeypatch.setattr(config, "fallback", "error")
    a = torch.ones(2, 3, 4, dtype=torch.int8)
    assert_expected_inline(
        said(MissingRuleError, lambda: vmap(torch._int_mm)(a, a.mT)),
        """\
no batching rule for aten._int_mm.default: PyTorch has no product of batches of integer matrices
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  registered overloads of the same op: none
  to fix: loop over the examples, with lamina.config.fallback = "warn\"""",
    )


def test_counts_of_different_lengths():
    numbers = torch.tensor([[0, 1], [2, 1]])
    assert_expected_inline(
        said(DataDependentError, lambda: vmap(torch.bincount)(numbers)),
        """\
aten.bincount.default would give each example an output of its own shape
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: pass a minlength above every number, or use zeros(n).scatter_add(0, x, ones)""",
    )


def test_quantised_with_scales_of_their_own():
    zero = torch.tensor(0)

    def quantise(x, scale):
        return torch.quantize_per_tensor(x, scale, zero, torch.qint8)

    assert_expected_inline(
        said(DataDependentError, lambda: vmap(quantise)(X, torch.tensor([0.1, 0.2]))),
        """\
aten.quantize_per_tensor.tensor_qparams would give each example a scale of its own, and a \
quantised tensor has one
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use torch.fake_quantize_per_tensor_affine, which stays in floating point""",
    )


def test_memory():
    expected = """\
the memory of BatchedTensor(level=1, bdim=0, size=2, f32[3]) was asked for, which has none of its \
own
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: register the kernel as an op (torch.library.custom_op), or call it inside an \
autograd.Function"""
    assert said(MissingRuleError, lambda: vmap(lambda x: x.data_ptr())(X)) == expected
    assert said(MissingRuleError, lambda: vmap(torch.from_dlpack)(X)) == expected
