"""Derivatives of the backward passes of the margin losses, which PyTorch has no formula for.

The losses themselves borrow PyTorch's formula, whose backward is a fused op.
"""

from __future__ import annotations

from typing import Any

from lamina.autodiff.declare import decomposition
from lamina_core.overloads import aten

_MEAN = 1  # the number that ATen gives the reduction


def _rows(x: Any) -> Any:
    """One row per example: [N, C], [C] and [] become [N, C], [1, C] and [1, 1]."""
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def _share(grad_output: Any, rows: Any, reduction: int) -> Any:
    """What a term of the loss gets of the cotangent: [N, 1] or a scalar."""
    share = grad_output / rows.shape[1]
    if reduction == _MEAN:
        return share / rows.shape[0]
    return share.reshape(-1, 1) if share.dim() else share


@decomposition(aten.multi_margin_loss_backward.default)
def multi_margin_loss_backward(
    grad_output: Any,
    self: Any,
    target: Any,
    p: float,
    margin: float,
    weight: Any = None,
    reduction: int = _MEAN,
) -> Any:
    """[] or [N], scores [N, C], classes [N], weights [C] -> [N, C]"""
    x, y = _rows(self), target.reshape(-1, 1)
    excess = margin + x - x.gather(1, y)
    counts = (excess > 0).scatter(1, y, False)
    slope = counts.to(x.dtype) if p == 1 else (p * excess).masked_fill(counts.logical_not(), 0)
    if weight is not None:
        slope = slope * weight.take(y)
    pulled = _share(grad_output, x, reduction) * slope
    return pulled.scatter_add(1, y, -pulled.sum(1, keepdim=True)).reshape(self.shape)


@decomposition(aten.multilabel_margin_loss_backward.default)
def multilabel_margin_loss_backward(
    grad_output: Any, self: Any, target: Any, reduction: int, is_target: Any
) -> Any:
    """[] or [N], scores [N, C], classes [N, C] up to the first -1, [N, C] -> [N, C]"""
    x, y, hit = _rows(self), _rows(target), _rows(is_target)
    listed = (y < 0).cumsum(1) == 0
    y = y.clamp_min(0)
    # One class that is a target against one that is not: [N, C, C].
    counts = x.unsqueeze(1) + 1 - x.gather(1, y).unsqueeze(2) > 0
    counts = (counts & listed.unsqueeze(2) & (hit == 0).unsqueeze(1)).to(x.dtype)
    slope = counts.sum(1).scatter_add(1, y, -counts.sum(2))
    return (_share(grad_output, x, reduction) * slope).reshape(self.shape)
