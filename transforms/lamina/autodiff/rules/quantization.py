"""Derivatives of the backward passes of learned fake quantisation, which PyTorch has none for.

x is rounded to `q = round(x / scale + zero_point)`, clamped to what the integers hold, and scaled
back. Its cotangents are those of Esser et al., Learned Step Size Quantization (2020), where
rounding passes a tangent through; in their own derivatives rounding is what it is, flat.
"""

from __future__ import annotations

from typing import Any

from lamina.autodiff.declare import decomposition
from lamina_core.overloads import aten


def _terms(
    grad: Any, x: Any, scale: Any, zero_point: Any, low: int, high: int, grad_factor: float
) -> Any:
    """The cotangent of x, and what each entry gives to that of scale and zero_point."""
    zero = zero_point.round().clamp(low, high)
    rounded = (x / scale + zero).round()
    inside = (rounded >= low) & (rounded <= high)
    slope = rounded.clamp(low, high) - zero
    x_ct = grad.masked_fill(inside.logical_not(), 0)
    scaled = grad * grad_factor
    scale_ct = scaled * (slope - (x / scale).masked_fill(inside.logical_not(), 0))
    return x_ct, scale_ct, (-scaled * scale).masked_fill(inside, 0)


@decomposition(aten._fake_quantize_learnable_per_tensor_affine_backward.default)
def learnable_per_tensor_backward(
    grad: Any,
    self: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
) -> Any:
    """Twice [*S], twice [1] -> [*S], twice [1]"""
    x_ct, *rest = _terms(grad, self, scale, zero_point, quant_min, quant_max, grad_factor)
    return x_ct, *(term.sum().reshape(scale.shape) for term in rest)


@decomposition(aten._fake_quantize_learnable_per_channel_affine_backward.default)
def learnable_per_channel_backward(
    grad: Any,
    self: Any,
    scale: Any,
    zero_point: Any,
    axis: int,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
) -> Any:
    """Twice [*S], twice [S[axis]] -> [*S], twice [S[axis]]"""
    others = [d for d in range(self.dim()) if d != axis % self.dim()]
    shape = [1 if d in others else -1 for d in range(self.dim())]
    scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    x_ct, *rest = _terms(grad, self, scale, zero_point, quant_min, quant_max, grad_factor)
    return x_ct, *(term.sum(others) if others else term for term in rest)
