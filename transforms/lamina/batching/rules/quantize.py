"""Batching rules of quantisation: one scale and zero point for all examples, or fake ones for each.

A quantised tensor has its scale inside, so examples with scales of their own cannot share one.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import ensure_batched, logical_rank, normalize, pad_rank, physical
from lamina.batching.table import batching_rule, decomposition
from lamina_core.errors import DataDependentError
from lamina_core.overloads import aten

__all__: list[str] = []

# Elementwise on quantised tensors.
_ELEMENTWISE = [aten.dequantize.self, aten.int_repr.default]


def _register_elementwise(op: Any) -> None:
    @batching_rule(op, state="family")
    def elementwise(info: Any, in_dims: Any, x: Any) -> Any:
        """[B, *S] -> [B, *S]"""
        return op(x), in_dims[0]


for _op in _ELEMENTWISE:
    _register_elementwise(_op)


def _own_scales(info: Any, name: str) -> Exception:
    error: Exception = info.interpreter.error(
        DataDependentError,
        f"{name} would give each example a scale of its own, and a quantised tensor has one",
        "to fix: use torch.fake_quantize_per_tensor_affine, which stays in floating point",
    )
    return error


@batching_rule(aten.quantize_per_channel.default)
def quantize_per_channel(
    info: Any, in_dims: Any, x: Any, scales: Any, zero_points: Any, axis: int, dtype: Any
) -> Any:
    """[B, *S], [C], [C] -> [B, *S]"""
    if in_dims[1] is not None or in_dims[2] is not None:
        raise _own_scales(info, "aten.quantize_per_channel.default")
    at = physical(axis, x, in_dims[0])
    return aten.quantize_per_channel(x, scales, zero_points, at, dtype), in_dims[0]


@batching_rule(aten.quantize_per_tensor.default)
def quantize_per_tensor(
    info: Any, in_dims: Any, x: Any, scale: float, zero_point: int, dtype: Any
) -> Any:
    """[B, *S] -> [B, *S]"""
    return aten.quantize_per_tensor(x, scale, zero_point, dtype), in_dims[0]


@batching_rule(aten.quantize_per_tensor.tensor_qparams)
def quantize_per_tensor_tensor_qparams(
    info: Any, in_dims: Any, x: Any, scale: Any, zero_point: Any, dtype: Any
) -> Any:
    """[B, *S], [], [] -> [B, *S]"""
    if in_dims[1] is not None or in_dims[2] is not None:
        raise _own_scales(info, "aten.quantize_per_tensor.tensor_qparams")
    return aten.quantize_per_tensor(x, scale, zero_point, dtype), in_dims[0]


@batching_rule(aten.quantize_per_tensor_dynamic.default)
def quantize_per_tensor_dynamic(
    info: Any, in_dims: Any, x: Any, dtype: Any, reduce_range: bool
) -> Any:
    """[B, *S] -> an error: the range of the data sets the scale."""
    raise _own_scales(info, "aten.quantize_per_tensor_dynamic.default")


# -- in floating point -----------------------------------------------------------------------------


def _fake(x: Any, scale: Any, zero_point: Any, low: int, high: int) -> Any:
    """The rounded value and whether it was in range, for operands that broadcast."""
    steps = torch.round(x * (1.0 / scale)) + zero_point
    out, inside = _in_range(steps, scale, zero_point, low, high)
    return out.to(x.dtype), inside


def _in_range(steps: Any, scale: Any, zero_point: Any, low: int, high: int) -> tuple[Any, Any]:
    """The value that a number of steps stands for, cut off, and whether it was in range."""
    out = (steps.clamp(low, high) - zero_point) * scale
    return out, (steps >= low) & (steps <= high)


@batching_rule(aten.fake_quantize_per_channel_affine_cachemask.default)
def fake_quantize_per_channel(
    info: Any, in_dims: Any, x: Any, scale: Any, zero_point: Any, axis: int, low: int, high: int
) -> Any:
    """[B, *S], [B, C], [B, C] -> [B, *S], twice"""
    x_bdim, *others = in_dims[:3]
    if others == [None, None]:
        op = aten.fake_quantize_per_channel_affine_cachemask
        outs = op(x, scale, zero_point, physical(axis, x, x_bdim), low, high)
        return tuple(outs), (x_bdim, x_bdim)
    rank = logical_rank(x, x_bdim)
    trailing = [1] * (rank - 1 - normalize(axis, rank))
    columns = []
    for value, bdim in zip((scale, zero_point), others, strict=True):
        value = ensure_batched(value, bdim, info.batch_size)
        columns.append(pad_rank(value.reshape((*value.shape, *trailing)), 0, rank))
    return _fake(pad_rank(x, x_bdim, rank), *columns, low, high), (0, 0)


@batching_rule(aten.fake_quantize_per_tensor_affine_cachemask.default)
def fake_quantize_per_tensor(
    info: Any, in_dims: Any, x: Any, scale: float, zero_point: int, low: int, high: int
) -> Any:
    """[B, *S] -> [B, *S], twice"""
    outs = aten.fake_quantize_per_tensor_affine_cachemask(x, scale, zero_point, low, high)
    return tuple(outs), (in_dims[0], in_dims[0])


@batching_rule(aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default)
def fake_quantize_per_tensor_tensor_qparams(
    info: Any, in_dims: Any, x: Any, scale: Any, zero_point: Any, enabled: Any, low: int, high: int
) -> Any:
    """[B, *S], [B, 1], [B, 1], [B, 1] -> [B, *S], twice"""
    x_bdim, *others = in_dims[:4]
    op = aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
    if others == [None, None, None]:
        outs = op(x, scale, zero_point, enabled, low, high)
        return tuple(outs), (x_bdim, x_bdim)
    size, rank = info.batch_size, logical_rank(x, x_bdim)
    scale, zero_point, enabled = (
        ensure_batched(value, bdim, size).reshape(size, *[1] * rank)
        for value, bdim in zip((scale, zero_point, enabled), others, strict=True)
    )
    x = pad_rank(x, x_bdim, rank)
    out, kept = _fake(x, scale, zero_point, low, high)
    on = enabled > 0
    return (torch.where(on, out, x), kept | ~on), (0, 0)


# -- with a scale and a zero point that are learned ------------------------------------------------


def _over(value: Any, x: Any, axis: int | None) -> Any:
    """The one number in [1], or [C] in the place of the channels of `x`."""
    if axis is None:
        return value[0]
    shape = [1] * x.dim()
    shape[axis] = -1
    return value.reshape(shape)


def _learned(x: Any, scale: Any, zero_point: Any, axis: int | None, low: int, high: int) -> Any:
    zero = _over(zero_point, x, axis).round().clamp(low, high)
    return _fake(x, _over(scale, x, axis), zero, low, high)[0]


def _learned_backward(
    ct: Any, x: Any, scale: Any, zero_point: Any, axis: int | None, limits: Any, factor: float = 1.0
) -> tuple[Any, Any, Any]:
    """Of x where it was in range; of the scale and the zero point what each element adds, summed.

    Source: Esser et al., Learned Step Size Quantization, 2020. The kernels round halves otherwise
    than on the way forward: here the zero point is added first, and that of one tensor rounds up.
    """
    step, zero = _over(scale, x, axis), _over(zero_point, x, axis)
    zero = zero.round().clamp(*limits) if axis is not None else (zero + 0.5).clamp(*limits).trunc()
    steps = (x * (1.0 / step) + zero).round()
    out, inside = _in_range(steps, step, zero, *limits)
    out = out.to(x.dtype)
    by_scale = ct * (torch.where(inside, out - x, out) / step) * factor
    by_zero = ct * torch.where(inside, 0.0, -step) * factor
    sums = (_gathered(term, axis).to(x.dtype) for term in (by_scale, by_zero))
    return ct * inside, *sums


def _gathered(term: Any, axis: int | None) -> Any:
    """The transpose of `_over`."""
    if axis is None:
        return term.sum().unsqueeze(0)
    others = [dim for dim in range(term.dim()) if dim != normalize(axis, term.dim())]
    return term.sum(others) if others else term


@decomposition(aten._fake_quantize_learnable_per_channel_affine.default)
def learned_per_channel(
    x: Any, scale: Any, zero_point: Any, axis: int, low: int, high: int, factor: float = 1.0
) -> Any:
    """[*S], [C], [C] -> [*S]"""
    return _learned(x, scale, zero_point, axis, low, high)


@decomposition(aten._fake_quantize_learnable_per_channel_affine_backward.default)
def learned_per_channel_backward(ct: Any, x: Any, scale: Any, zero_point: Any, *rest: Any) -> Any:
    """[*S], [*S], [C], [C] -> [*S], [C], [C]"""
    axis, low, high, *factor = rest
    return _learned_backward(ct, x, scale, zero_point, axis, (low, high), *factor)


@decomposition(aten._fake_quantize_learnable_per_tensor_affine.default)
def learned_per_tensor(
    x: Any, scale: Any, zero_point: Any, low: int, high: int, factor: float = 1.0
) -> Any:
    """[*S], [1], [1] -> [*S]"""
    return _learned(x, scale, zero_point, None, low, high)


@decomposition(aten._fake_quantize_learnable_per_tensor_affine_backward.default)
def learned_per_tensor_backward(ct: Any, x: Any, scale: Any, zero_point: Any, *rest: Any) -> Any:
    """[*S], [*S], [1], [1] -> [*S], [1], [1]"""
    low, high, *factor = rest
    return _learned_backward(ct, x, scale, zero_point, None, (low, high), *factor)
