"""Derivatives of the backward passes of `cdist` and `pdist`, which PyTorch has no formula for.

The distances themselves borrow PyTorch's formula, whose backward is a fused op. As in
`vector_norms` the subgradient at distance 0 is 0; the maximum norm gives every entry of the largest
size the whole cotangent, as the fused op does.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lamina.autodiff.declare import decomposition
from lamina_core.overloads import aten


def _slope(gap: Any, p: float) -> Any:
    """[.., M] -> [.., M]: the derivative of the p-norm over the last dim."""
    if p == 0:
        return torch.zeros_like(gap)
    if p == 1:
        return gap.sign()
    size = gap.abs()
    if math.isinf(p):
        return gap.sign().masked_fill(size != size.amax(-1, keepdim=True), 0)
    # A root or a power of 0 has no derivative that could be multiplied by 0.
    zero = gap == 0
    apart = zero.logical_not().any(-1, keepdim=True)
    size = size.masked_fill(zero, 1)
    total = size.pow(p).masked_fill(zero, 0).sum(-1, keepdim=True)
    norm = total.masked_fill(apart.logical_not(), 1).pow(1 / p)
    return gap.sign() * (size / norm).pow(p - 1)


@decomposition(aten._cdist_backward.default)
def cdist_backward(grad: Any, x1: Any, x2: Any, p: float, cdist: Any) -> Any:
    """[*B, P, R], [*B, P, M], [*B, R, M], [*B, P, R] -> [*B, P, M]; like x1 if that is empty."""
    if 0 in (*x1.shape, *x2.shape):
        return torch.zeros_like(x1)
    slope = _slope(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)
    return (grad.unsqueeze(-1) * slope).sum(-2)


@decomposition(aten._pdist_backward.default)
def pdist_backward(grad: Any, x: Any, p: float, pdist: Any) -> Any:
    """[N * (N - 1) / 2], [N, M], [N * (N - 1) / 2] -> [N, M]"""
    rows = x.shape[0]
    first, second = torch.triu_indices(rows, rows, 1, device=x.device)
    pulled = grad.unsqueeze(-1) * _slope(x.index_select(0, first) - x.index_select(0, second), p)
    zero = torch.zeros_like(x)
    return zero.index_add(0, first, pulled).index_add(0, second, -pulled)
