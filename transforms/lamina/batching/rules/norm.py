"""Batching rules of layer norm, its kin and group norm; batch norm has a file of its own.

The batch dim joins the dims that are normalised one by one: the leading dims of layer norm, N of
group norm. A batched affine part is applied behind the normalisation.

# NOTE [Half precision]
Kernels compute in float32 what they are given in half precision, and round once. What is done here
in more than one op is done in float32 as well. The affine part may be in float32 where the operand
is not: then so are the statistics, on a CPU, and the gradients of the affine part.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import (
    batch_first,
    ensure_batched,
    fold,
    leading_dims,
    logical_rank,
    pad_rank,
    unfold,
)
from lamina.batching.table import batching_rule, decomposition
from lamina_core.dispatch import followed
from lamina_core.half import HALF, widened
from lamina_core.overloads import aten


def statistics_dtype(x: Any, *parameters: Any) -> Any:
    """The dtype in which the kernels of one device keep the mean and the deviation of x."""
    if x.dtype not in HALF:
        return x.dtype
    if x.device.type != "cpu":
        return torch.float32
    return next((p.dtype for p in parameters if p is not None), x.dtype)


# -- group norm ------------------------------------------------------------------------------------


@batching_rule(aten.group_norm.default)
def group_norm(
    info: Any,
    in_dims: Any,
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    *rest: Any,
) -> Any:
    """[B, N, C, *S], [C], [C] -> [B, N, C, *S]. An affine part for each example is decomposed."""
    if any(d is not None for d in in_dims[1:]) or logical_rank(x, in_dims[0]) < 2:
        return NotImplemented
    x = fold(x, in_dims[0], 0, info.batch_size)
    return unfold(aten.group_norm(x, num_groups, weight, bias, *rest), 0, info.batch_size), 0


@batching_rule(aten.instance_norm.default)
def instance_norm(
    info: Any, in_dims: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any
) -> Any:
    """[B, N, C, *S], [C], [C] -> [B, N, C, *S]. Running statistics are written to: decomposed."""
    if (
        any(d is not None for d in in_dims[1:])
        or mean is not None
        or logical_rank(x, in_dims[0]) < 2
    ):
        return NotImplemented
    x = fold(x, in_dims[0], 0, info.batch_size)
    return unfold(aten.instance_norm(x, weight, bias, mean, var, *rest), 0, info.batch_size), 0


@batching_rule(aten.native_group_norm.default)
def native_group_norm(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> Any:
    """[B, N, C, *S], [B, C], [B, C] -> [B, N, C, *S], [B, N, groups], [B, N, groups]"""
    size = info.batch_size
    x_bdim, w_bdim, b_bdim = in_dims[:3]
    late = w_bdim is not None or b_bdim is not None
    given, wide = ((None, None), widened(x)) if late else ((weight, bias), x)
    if x_bdim is None:
        out, *stats = aten.native_group_norm(wide.contiguous(), *given, N, C, HxW, group, eps)
        out_bdim: Any = None
    else:
        wide = fold(wide, x_bdim, 0, size).contiguous()
        outs = aten.native_group_norm(wide, *given, size * N, C, HxW, group, eps)
        out, *stats = (unfold(o, 0, size) for o in outs)
        out_bdim = 0
    if late:
        out, to = affine(out, out_bdim, (weight, w_bdim), (bias, b_bdim), x.dtype)
        dtype = statistics_dtype(x, weight, bias)
        return (out, *[stat.to(dtype) for stat in stats]), (to, out_bdim, out_bdim)
    return (out, *stats), (out_bdim,) * 3


@batching_rule(aten.native_group_norm_backward.default)
def native_group_norm_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    N: int,
    C: int,
    HxW: int,
    group: int,
    output_mask: Any,
) -> Any:
    """[B, N, C, *S], twice, [B, N, groups], twice, [B, C] -> [B, N, C, *S], [B, C], [B, C]"""
    size = info.batch_size
    ct, x, mean, rstd = (
        ensure_batched(v, d, size) for v, d in zip((ct, x, mean, rstd), in_dims[:4], strict=True)
    )
    x_ct = w_ct = b_ct = None
    dtype = ct.dtype if weight is None else weight.dtype
    if output_mask[0]:
        given, inner = (ct, x, mean, rstd), weight
        if in_dims[4] is not None:
            given, inner = tuple(map(widened, given)), None
            scaled, _ = affine(given[0], 0, (weight, in_dims[4]), (None, None))
            given = (scaled, *given[1:])
        folded = [fold(v, 0, 0, size).contiguous() for v in given]
        mask = [True, False, False]
        x_ct = aten.native_group_norm_backward(*folded, inner, size * N, C, HxW, group, mask)[0]
        x_ct = unfold(x_ct, 0, size).to(x.dtype)
    if output_mask[1]:
        # The normalised input is (x - mean) * rstd: sum over S first, where mean is constant.
        shape = (size, N, group, C // group)
        flat = (size, N, C, HxW)
        ct, x, mean, rstd = map(widened, (ct, x, mean, rstd))
        products = (ct * x).reshape(flat).sum(-1).reshape(shape)
        sums = ct.reshape(flat).sum(-1).reshape(shape)
        w_ct = ((products - sums * mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).sum(1).flatten(1)
        w_ct = w_ct.to(dtype)
    if output_mask[2]:
        b_ct = ct.reshape(size, N, C, HxW).sum((1, 3), dtype=dtype)
    return (x_ct, w_ct, b_ct), (0, 0, 0)


def affine(out: Any, out_bdim: Any, weight: Any, bias: Any, dtype: Any = None) -> Any:
    """Apply weight and bias, (value, batch dim) each, along the channels, logical dim 1."""
    trailing = [1] * (logical_rank(out, out_bdim) - 2)
    columns = []
    for value, bdim in (weight, bias):
        if value is not None:
            value = batch_first(value, bdim)
            value = value.reshape((*value.shape, *trailing))
        columns.append((value, None if bdim is None else 0))
    return _scale(out, out_bdim, *columns, dtype)


# -- layer norm ------------------------------------------------------------------------------------


@batching_rule(aten._fused_rms_norm.default)
def _fused_rms_norm(
    info: Any, in_dims: Any, x: Any, normalized_shape: Any, weight: Any, eps: Any
) -> Any:
    """[B, *L, *S], [B, *S] -> [B, *L, *S], [B, *L, 1...]"""
    w_bdim = in_dims[2]
    x, x_bdim = leading_dims(x, in_dims[0], len(normalized_shape))
    if w_bdim is None:
        return aten._fused_rms_norm(x, normalized_shape, weight, eps), (x_bdim, x_bdim)
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    out, rstd = aten._fused_rms_norm(widened(x), normalized_shape, None, eps)
    out, to = _scale(out, x_bdim, (weight, w_bdim), (None, None), x.dtype)
    return (out, rstd), (to, x_bdim)


@batching_rule(aten.layer_norm.default)
def layer_norm(
    info: Any,
    in_dims: Any,
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """[B, *L, *S], [B, *S], [B, *S] -> [B, *L, *S]"""
    w_bdim, b_bdim = (*in_dims, None, None)[2:4]
    x, x_bdim = leading_dims(x, in_dims[0], len(normalized_shape))
    if w_bdim is None and b_bdim is None:
        return torch.nn.functional.layer_norm(x, normalized_shape, weight, bias, eps), x_bdim
    out = torch.nn.functional.layer_norm(widened(x), normalized_shape, None, None, eps)
    return _scale(out, x_bdim, (weight, w_bdim), (bias, b_bdim), x.dtype)


@batching_rule(aten.rms_norm.default)
def rms_norm(
    info: Any, in_dims: Any, x: Any, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Any:
    """[B, *L, *S], [*S] -> [B, *L, *S]. A weight for each example is decomposed."""
    if any(d is not None for d in in_dims[1:]):
        return NotImplemented
    x, x_bdim = leading_dims(x, in_dims[0], len(normalized_shape))
    return aten.rms_norm(x, normalized_shape, weight, eps), x_bdim


@batching_rule(aten.native_layer_norm.default)
def native_layer_norm(
    info: Any, in_dims: Any, x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float
) -> Any:
    """[B, *L, *S], [B, *S], [B, *S] -> [B, *L, *S], [B, *L, 1...], [B, *L, 1...]"""
    w_bdim, b_bdim = in_dims[2:4]
    x, x_bdim = leading_dims(x, in_dims[0], len(normalized_shape))
    if w_bdim is None and b_bdim is None:
        outs = followed(aten.native_layer_norm.default, x, normalized_shape, weight, bias, eps)
        return outs, (x_bdim,) * 3
    given = (widened(x), normalized_shape, None, None, eps)
    out, *stats = followed(aten.native_layer_norm.default, *given)
    out, to = _scale(out, x_bdim, (weight, w_bdim), (bias, b_bdim), x.dtype)
    dtype = statistics_dtype(x, weight, bias)
    return (out, *[stat.to(dtype) for stat in stats]), (to, x_bdim, x_bdim)


@batching_rule(aten.native_layer_norm_backward.default)
def native_layer_norm_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    x: Any,
    normalized_shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    bias: Any,
    output_mask: Any,
) -> Any:
    """[B, *L, *S], twice, [B, *L, 1...], twice -> [B, *L, *S], [B, *S], [B, *S]"""
    size, count = info.batch_size, len(normalized_shape)
    dims = (in_dims[0], in_dims[1], in_dims[3], in_dims[4])
    ct, x, mean, rstd = (
        ensure_batched(v, d, size) for v, d in zip((ct, x, mean, rstd), dims, strict=True)
    )
    # The kernel reads the memory of the statistics, whatever their strides.
    mean, rstd = mean.contiguous(), rstd.contiguous()
    w_bdim = in_dims[5]
    x_ct = w_ct = b_ct = None
    wide = tuple(map(widened, (ct, x, mean, rstd)))
    if output_mask[0]:
        given, inner = (ct, x, mean, rstd), weight
        if w_bdim is not None:
            given, inner = wide, None
            given = (_scale(given[0], 0, (weight, w_bdim), (None, None))[0], *given[1:])
        x_ct = followed(
            aten.native_layer_norm_backward.default,
            *(*given[:2], normalized_shape, *given[2:], inner, None, [True, False, False]),
        )[0].to(x.dtype)
    leading = list(range(1, x.dim() - count))
    if output_mask[1] and weight is not None:
        product = wide[0] * ((wide[1] - wide[2]) * wide[3])
        w_ct = (product.sum(leading) if leading else product).to(weight.dtype)
    if output_mask[2] and bias is not None:
        b_ct = ct.sum(leading, dtype=bias.dtype) if leading else ct.to(bias.dtype)
    return (x_ct, w_ct, b_ct), (0, 0, 0)


def _scale(out: Any, out_bdim: Any, weight: Any, bias: Any, dtype: Any = None) -> Any:
    """Apply weight and bias, (value, batch dim) each, over the last dims; give it in a dtype."""
    rank = logical_rank(out, out_bdim)
    dtype = out.dtype if dtype is None else dtype
    out = batch_first(out, out_bdim)
    for (value, bdim), apply in zip((weight, bias), (torch.mul, torch.add), strict=True):
        if value is not None:
            out = apply(out, pad_rank(value, bdim, rank))
    unbatched = out_bdim is None and weight[1] is None and bias[1] is None
    return out.to(dtype), None if unbatched else 0


# -- weight norm -----------------------------------------------------------------------------------


@decomposition(aten._weight_norm_interface_backward.default)
def _weight_norm_interface_backward(ct: Any, v: Any, g: Any, norms: Any, dim: int) -> Any:
    """The fused kernel as the ops that PyTorch takes when it has to be differentiated."""
    return aten._weight_norm_differentiable_backward(ct, v, g, norms.to(g.dtype), dim)
