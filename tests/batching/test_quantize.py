"""Quantisation under `vmap`, real and fake."""

from __future__ import annotations

import pytest
import torch

import lamina
from lamina import vmap
from lamina_core.errors import DataDependentError
from tests.batching.stacking import assert_stacked

X = torch.linspace(-9, 9, 60).reshape(3, 4, 5)
SCALE = torch.tensor([[0.1, 0.5, 1.0, 2.0], [0.3, 0.2, 0.7, 1.5], [1.1, 0.4, 0.6, 0.9]])
ZERO = torch.tensor([[0, 1, -2, 3], [2, 0, 0, 1], [-3, 1, 2, 0]], dtype=torch.int32)
RANGE = (-8, 7)

# PyTorch deprecates the dtypes.
quantised = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")


def test_fake_per_tensor():
    assert_stacked(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.3, 2, *RANGE), X)
    shared = SCALE[0, :1], ZERO[0, 1:2]
    assert_stacked(lambda x: torch.fake_quantize_per_tensor_affine(x, *shared, *RANGE), X)


@pytest.mark.parametrize("x", [X, X[:1].expand(3, 4, 5)], ids=["batched", "shared"])
def test_fake_with_scales_of_their_own(x):
    def per_tensor(x, scale, zero):
        return torch.fake_quantize_per_tensor_affine(x, scale[0], zero[1], *RANGE)

    def per_channel(x, scale, zero):
        return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, *RANGE)

    assert_stacked(per_tensor, x, SCALE, ZERO)
    assert_stacked(per_channel, x, SCALE, ZERO)
    assert_stacked(lambda s: per_channel(x[0], s, ZERO[0]), SCALE)
    assert_stacked(lambda x: per_channel(x, SCALE[0], ZERO[0]), x)


LEARNED = torch.tensor([[0.4, 1.5, -2.5, 30.0], [2.5, -0.7, 0.5, 1.0], [-3.2, 1.2, -9.0, 0.0]])


def test_fake_with_learned_parameters():
    one = torch._fake_quantize_learnable_per_tensor_affine
    for zero in LEARNED.T:  # halves, negative ones, some out of range
        learned(one, (), SCALE[:, :1], zero[:, None])
    learned(torch._fake_quantize_learnable_per_channel_affine, (0,), SCALE, LEARNED)


def learned(op, axis, scale, zero):
    backward = getattr(torch.ops.aten, f"{op.__name__}_backward")
    rest = (*axis, *RANGE, 0.5)
    assert_stacked(lambda x, s, z: op(x, s, z, *axis, *RANGE), X, scale, zero)
    assert_stacked(lambda x: op(x, scale[0], zero[0], *rest), X)
    assert_stacked(lambda ct, x, s, z: backward(ct, x, s, z, *rest), X.cos(), X, scale, zero)


def test_learned_parameters_where_quotients_are_halves():
    x = torch.arange(-10, 11) / 4
    scale, zero = torch.tensor([[0.5], [0.5], [1.0]]), torch.tensor([[1.0], [2.0], [3.2]])
    one = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
    assert_stacked(lambda s, z: one(x.cos(), x, s, z, -128, 127), scale, zero)
    each = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward
    x = x[None]
    assert_stacked(lambda s, z: each(x.cos(), x, s, z, 0, -128, 127), scale, zero)


def test_gradients_of_learned_parameters():
    def loss(x, scale, zero):
        out = torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, 0, *RANGE, 0.3)
        return out.square().sum()

    actual = vmap(lamina.grad(loss, (0, 1, 2)))(X, SCALE, LEARNED)
    rows = []
    for row in zip(X, SCALE, LEARNED, strict=True):
        leaves = [v.clone().requires_grad_() for v in row]
        rows.append(torch.autograd.grad(loss(*leaves), leaves))
    expected = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    torch.testing.assert_close(actual, expected)


@quantised
def test_one_scale_for_all():
    assert_stacked(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize(), X)
    scale, zero = torch.tensor(0.1), torch.tensor(0)
    assert_stacked(lambda x: torch.quantize_per_tensor(x, scale, zero, torch.qint8).int_repr(), X)
    scales, zeros = SCALE[0].double(), ZERO[0].long()
    assert_stacked(
        lambda x: torch.quantize_per_channel(x, scales, zeros, 0, torch.qint8).int_repr(), X
    )


@quantised
def test_scales_of_their_own_are_refused(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "silent")
    with pytest.raises(DataDependentError, match="fake_quantize"):
        vmap(lambda x: torch.quantize_per_tensor_dynamic(x, torch.qint8, False))(X)
    with pytest.raises(DataDependentError, match="fake_quantize"):
        vmap(lambda s, z: torch.quantize_per_channel(X[0], s, z, 0, torch.qint8))(SCALE, ZERO)
    scales, zeros = torch.tensor([[0.1], [0.2], [0.3]]), torch.tensor([0])
    with pytest.raises(DataDependentError, match="fake_quantize"):
        vmap(lambda s: torch.quantize_per_tensor([X[0]], s, zeros, torch.qint8), out_dims=None)(
            scales
        )
