"""Batching rules of normalisation layers.

The batch dim joins the dims that are normalised one by one: the leading dims of layer norm, N of
group norm, the channels of batch norm. A batched affine part is applied behind the normalisation.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lamina.batching.dims import (
    batch_first,
    ensure_batched,
    fold,
    leading_dims,
    logical_rank,
    logical_shape,
    pad_rank,
    unfold,
)
from lamina.batching.table import batching_rule, decomposition
from lamina_core.overloads import aten

# -- batch norm ------------------------------------------------------------------------------------


@decomposition(aten._batch_norm_impl_index.default)
def _batch_norm_impl_index(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any
) -> Any:
    """Batch norm as below, with the backend's reserve and index, which are not used here."""
    momentum, eps = rest[:2]
    outs = native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return *outs, x.new_empty([0], dtype=torch.uint8), 0


@decomposition(aten.batch_norm.default)
def batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any
) -> Any:
    """Writes to the running statistics, which its schema does not say."""
    if not x.numel():  # then PyTorch asks for no channels, and takes no statistics
        out = x.clone() if weight is None else x * weight[0]
        return out if bias is None else out + bias[0]
    momentum, eps = rest[:2]
    return native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]


@decomposition(aten.native_batch_norm.default)
def native_batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Writes to the running statistics, which its schema does not say; another op's schema does."""
    affine = (weight, bias)
    if not training and mean is not None:
        return aten._native_batch_norm_legit_no_training(x, *affine, mean, var, momentum, eps)
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(x, *affine, training, momentum, eps)
    return aten._native_batch_norm_legit(x, *affine, mean, var, training, momentum, eps)


@batching_rule(aten._native_batch_norm_legit.no_stats)
def batch_norm_no_stats(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """[B, N, C, *S] -> [B, N, C, *S], [B, C], [B, C]"""
    dims = (*in_dims[:3], None, None)
    return _batch_norm(info, dims, x, weight, bias, None, None, training, momentum, eps)


@batching_rule(aten._native_batch_norm_legit_functional.default)
def batch_norm_functional(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """[B, N, C, *S] -> [B, N, C, *S], [B, C], twice, and the new running statistics."""
    if not training:
        outs, dims = _batch_norm(info, in_dims, x, weight, bias, mean, var, False, momentum, eps)
        return (*outs, mean, var), (*dims, *in_dims[3:5])
    dims = (*in_dims[:3], None, None)
    outs, dims = _batch_norm(info, dims, x, weight, bias, None, None, True, momentum, eps)
    # The statistics are taken from the saved ones: the op itself would write to what it is given.
    shape = logical_shape(x, in_dims[0])
    count = math.prod(shape) // max(shape[1], 1)
    batch_mean, batch_var = outs[1], (outs[2].pow(-2) - eps).clamp(min=0)
    batch_var = batch_var * (count / max(count - 1, 1))
    new = [
        _lerp(old, bdim, seen, dims[1], momentum)
        for old, bdim, seen in zip((mean, var), in_dims[3:5], (batch_mean, batch_var), strict=True)
    ]
    places = [None if dims[1] is None and d is None else 0 for d in in_dims[3:5]]
    return (*outs, *new), (*dims, *places)


def _lerp(old: Any, old_bdim: Any, new: Any, new_bdim: Any, momentum: float) -> Any:
    old, new = batch_first(old, old_bdim), batch_first(new, new_bdim)
    return old * (1 - momentum) + new.to(old.dtype) * momentum


@batching_rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm_no_training(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    momentum: float,
    eps: float,
) -> Any:
    """[B, N, C, *S] -> [B, N, C, *S], and two empty tensors."""
    return _batch_norm(info, in_dims, x, weight, bias, mean, var, False, momentum, eps)


def _batch_norm(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Normalise with given statistics or with those of the input, without writing to any."""
    size = info.batch_size
    x_bdim = in_dims[0]
    rest = (training, momentum, eps)
    parameters = list(zip((weight, bias, mean, var), in_dims[1:5], strict=True))
    if all(d is None for _, d in parameters) and not training:
        outs = aten.native_batch_norm(fold(x, x_bdim, 0, size), weight, bias, mean, var, *rest)
        return (unfold(outs[0], 0, size), *outs[1:]), (0, None, None)
    if x_bdim is None and all(d is None for _, d in parameters[2:]):
        out, *saved = aten.native_batch_norm(x, None, None, mean, var, *rest)
        out, out_bdim = _affine(out, None, *parameters[:2])
        return (out, *saved), (out_bdim, None, None)
    folded = [None if v is None else fold(v, d, 0, size) for v, d in parameters]
    outs = aten.native_batch_norm(fold(x, x_bdim, 1, size), *folded, *rest)
    if not training:
        return (unfold(outs[0], 1, size), *outs[1:]), (1, None, None)
    return tuple(unfold(out, at, size) for out, at in zip(outs, (1, 0, 0), strict=True)), (1, 0, 0)


@batching_rule(aten.native_batch_norm_backward.default)
def native_batch_norm_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    x: Any,
    weight: Any,
    mean: Any,
    var: Any,
    save_mean: Any,
    save_rstd: Any,
    train: bool,
    eps: float,
    output_mask: Any,
) -> Any:
    """[B, N, C, *S], [B, N, C, *S] -> [B, N, C, *S], [B, C], [B, C]"""
    size = info.batch_size
    ct, x = (fold(v, d, 1, size) for v, d in zip((ct, x), in_dims[:2], strict=True))
    stats = zip((weight, mean, var, save_mean, save_rstd), in_dims[2:7], strict=True)
    folded = [None if v is None else fold(v, d, 0, size) for v, d in stats]
    outs = aten.native_batch_norm_backward(ct, x, *folded, train, eps, output_mask)
    kept = [out if wanted else None for out, wanted in zip(outs, output_mask, strict=True)]
    return tuple(
        None if out is None else unfold(out, at, size)
        for out, at in zip(kept, (1, 0, 0), strict=True)
    ), (1, 0, 0)


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
    affine = (None, None) if late else (weight, bias)
    if x_bdim is None:
        out, *stats = aten.native_group_norm(x.contiguous(), *affine, N, C, HxW, group, eps)
        out_bdim: Any = None
    else:
        x = fold(x, x_bdim, 0, size).contiguous()
        outs = aten.native_group_norm(x, *affine, size * N, C, HxW, group, eps)
        out, *stats = (unfold(o, 0, size) for o in outs)
        out_bdim = 0
    if late:
        out, to = _affine(out, out_bdim, (weight, w_bdim), (bias, b_bdim))
        return (out, *stats), (to, out_bdim, out_bdim)
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
    if output_mask[0]:
        scaled, w_bdim = ct, in_dims[4]
        if w_bdim is not None:
            scaled, _ = _affine(ct, 0, (weight, w_bdim), (None, None))
            weight = None
        folded = [fold(v, 0, 0, size).contiguous() for v in (scaled, x, mean, rstd)]
        mask = [True, False, False]
        x_ct = aten.native_group_norm_backward(*folded, weight, size * N, C, HxW, group, mask)[0]
        x_ct = unfold(x_ct, 0, size)
    if output_mask[1]:
        # The normalised input is (x - mean) * rstd: sum over S first, where mean is constant.
        shape = (size, N, group, C // group)
        flat = (size, N, C, HxW)
        products = (ct * x).reshape(flat).sum(-1).reshape(shape)
        sums = ct.reshape(flat).sum(-1).reshape(shape)
        w_ct = ((products - sums * mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).sum(1).flatten(1)
        w_ct = w_ct.to(ct.dtype)
    if output_mask[2]:
        b_ct = ct.reshape(size, N, C, HxW).sum((1, 3))
    return (x_ct, w_ct, b_ct), (0, 0, 0)


def _affine(out: Any, out_bdim: Any, weight: Any, bias: Any) -> Any:
    """Apply weight and bias, (value, batch dim) each, along the channels, logical dim 1."""
    trailing = [1] * (logical_rank(out, out_bdim) - 2)
    columns = []
    for value, bdim in (weight, bias):
        if value is not None:
            value = batch_first(value, bdim)
            value = value.reshape((*value.shape, *trailing))
        columns.append((value, None if bdim is None else 0))
    return _scale(out, out_bdim, *columns)


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
    out, rstd = aten._fused_rms_norm(x, normalized_shape, None, eps)
    out, to = _scale(out, x_bdim, (weight, w_bdim), (None, None))
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
    out = torch.nn.functional.layer_norm(x, normalized_shape, None, None, eps)
    return _scale(out, x_bdim, (weight, w_bdim), (bias, b_bdim))


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
        return aten.native_layer_norm(x, normalized_shape, weight, bias, eps), (x_bdim,) * 3
    out, *stats = aten.native_layer_norm(x, normalized_shape, None, None, eps)
    out, to = _scale(out, x_bdim, (weight, w_bdim), (bias, b_bdim))
    return (out, *stats), (to, x_bdim, x_bdim)


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
    if output_mask[0]:
        scaled = ct if w_bdim is None else _scale(ct, 0, (weight, w_bdim), (None, None))[0]
        inner = weight if w_bdim is None else None
        x_ct = aten.native_layer_norm_backward(
            scaled, x, normalized_shape, mean, rstd, inner, None, [True, False, False]
        )[0]
    leading = list(range(1, x.dim() - count))
    if output_mask[1] and weight is not None:
        product = ct * ((x - mean) * rstd)
        w_ct = (product.sum(leading) if leading else product).to(weight.dtype)
    if output_mask[2] and bias is not None:
        b_ct = ct.sum(leading) if leading else ct
    return (x_ct, w_ct, b_ct), (0, 0, 0)


def _scale(out: Any, out_bdim: Any, weight: Any, bias: Any) -> Any:
    """Apply weight and bias, (value, batch dim) each, over the last dims."""
    rank = logical_rank(out, out_bdim)
    dtype = out.dtype
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
