"""Batching rules of convolutions.

Three ways to hide a batch dim in a convolution: in N (only the input is batched), in the channels
of the output (only the weight is), in the groups (both are). The gradients are more convolutions,
each with its own best way; where only the shape of an operand is read, memory that is never touched
stands for it. (An expanded number would not do: PyTorch makes a whole copy of it.)
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import (
    batch_first,
    fold,
    fold_behind,
    logical_dims,
    logical_rank,
    logical_shape,
    pad_rank,
    unfold,
    unfold_behind,
    without,
)
from lamina.batching.rules.conv_weights import cheapest, correlation, run
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten


@batching_rule(aten.conv_tbc.default)
def conv_tbc(info: Any, in_dims: Any, x: Any, weight: Any, bias: Any, pad: int = 0) -> Any:
    """[B, T, N, C], [B, K, C, O], [B, O] -> [B, T, N, O]: a conv1d, its dims reordered."""
    x, weight, bias = (
        batch_first(v, d) for v, d in zip((x, weight, bias), in_dims[:3], strict=True)
    )
    x, weight = x.movedim(-3, -1), weight.movedim(-3, -1).transpose(-3, -2)
    dims = [None if d is None else 0 for d in in_dims[:3]]
    out, bdim = convolution(info, dims, x, weight, bias, [1], [pad], [1], False, [0], 1)
    return batch_first(out, bdim).movedim(-1, -3), 0


# One op a line: (x, weight, bias, stride, padding, ...), and the number of spatial dims.
_COMPOSITES = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


def _register_composite(op: Any, spatial: int) -> None:
    direct = op in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)

    @batching_rule(op, state="family")
    def composite(
        info: Any, in_dims: Any, x: Any, weight: Any, bias: Any = None, *rest: Any
    ) -> Any:
        """[B, *N, C, *S] -> [B, *N, O, *S']: B joins N, or is N. Else it is a `convolution`."""
        front = logical_rank(x, in_dims[0]) - spatial
        if any(d is not None for d in in_dims[1:]):
            if front != 2 or not direct or x.is_complex():
                return NotImplemented
            dims = (*in_dims, None)[:3]
            return convolution(info, dims, x, weight, bias, *_in_full(spatial, *rest))
        if front == 1:
            return op(batch_first(x, in_dims[0]), weight, bias, *rest), 0
        if front != 2:
            return NotImplemented
        out = op(fold(x, in_dims[0], 0, info.batch_size), weight, bias, *rest)
        return unfold(out, 0, info.batch_size), 0


def _in_full(
    spatial: int, stride: Any = (1,), padding: Any = (0,), dilation: Any = (1,), groups: int = 1
) -> tuple[Any, ...]:
    """The arguments of `convolution` behind the bias, each with an entry for every spatial dim."""
    lists = [
        list(entry) * spatial if len(entry) == 1 else list(entry)
        for entry in (stride, padding, dilation)
    ]
    return (*lists, False, [0] * spatial, groups)


for _op, _spatial in _COMPOSITES.items():
    _register_composite(_op, _spatial)


@batching_rule(aten.convolution.default)
def convolution(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    """[B, N, C, *S], [B, O, C / groups, *K], [B, O] -> [B, N, O, *S']"""
    x_bdim, w_bdim, b_bdim = in_dims[:3]
    size = info.batch_size
    rest = (stride, padding, dilation, transposed, output_padding)
    pointwise = x_bdim is not None and w_bdim is not None and _is_pointwise(weight, w_bdim, rest)
    if x_bdim is not None and w_bdim is not None and not pointwise:
        operands = fold(x, x_bdim, 1, size), fold(weight, w_bdim, 0, size)
        many = None if bias is None else fold(bias, b_bdim, 0, size)
        out = aten.convolution(*operands, many, *rest, groups * size)
        return unfold(out, 1, size), 1
    if w_bdim is None and b_bdim is None:
        out = aten.convolution(fold(x, x_bdim, 0, size), weight, bias, *rest, groups)
        return unfold(out, 0, size), 0
    if pointwise:
        weight = batch_first(weight, w_bdim).flatten(2)
        out, bdim = _product(weight, batch_first(x, x_bdim), groups), 0
    elif w_bdim is not None:
        out, bdim = _of_weights(x, weight, w_bdim, size, rest, groups)
    elif x_bdim is not None:
        out = aten.convolution(fold(x, x_bdim, 0, size), weight, None, *rest, groups)
        out, bdim = unfold(out, 0, size), 0
    else:
        out, bdim = aten.convolution(x, weight, None, *rest, groups).unsqueeze(0), 0
    if bias is None:
        return out, bdim
    out = batch_first(out, bdim)
    bias = batch_first(bias, b_bdim)
    bias = bias.reshape(*bias.shape, *[1] * (out.dim() - 3))
    return out + pad_rank(bias, None if b_bdim is None else 0, logical_rank(out, 0)), 0


def _is_pointwise(weight: Any, w_bdim: Any, rest: Any) -> bool:
    """Whether a batched weight is one matrix for every place: a product, which a CPU does faster.

    Measured in benchmarks/conv_weights.py. In other convolutions the groups are as good.
    """
    stride, padding, _, transposed, _ = rest
    if weight.device.type != "cpu" or transposed or max(stride) > 1 or max(padding) > 0:
        return False
    return all(entry == 1 for entry in logical_shape(weight, w_bdim)[2:]) and 0 not in weight.shape


def _product(weight: Any, x: Any, groups: int) -> Any:
    """[B, O, C / groups], [B, N, C, *S] -> [B, N, O, *S]"""
    size, out, _ = weight.shape
    matrices = weight.unflatten(1, (groups, out // groups)).unsqueeze(1)
    places = x.flatten(3).unflatten(2, (groups, x.shape[2] // groups))
    return torch.matmul(matrices, places).reshape(size, x.shape[1], out, *x.shape[3:])


def _of_weights(x: Any, weight: Any, w_bdim: int, size: int, rest: Any, groups: int) -> Any:
    """Only the weight is batched: its batch dim joins the output channels of each group."""
    if rest[3]:  # transposed: [B, C, O / groups, *K]
        many = fold(weight, w_bdim, 1, size)
    else:
        many = fold_behind(weight, w_bdim, 0, groups, size)
    out = aten.convolution(x, many, None, *rest, groups)
    return unfold_behind(out, 1, groups, size)


@batching_rule(aten.convolution_backward.default)
def convolution_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    x: Any,
    weight: Any,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
) -> Any:
    """[B, N, O, *S'], [B, N, C, *S], [B, O, C / groups, *K] -> those of x, of weight, and [B, O]"""
    size = info.batch_size
    ct_bdim, x_bdim, w_bdim = in_dims[:3]
    rest = (stride, padding, dilation, transposed, output_padding)
    x_ct = w_ct = b_ct = None
    x_to = w_to = b_to = None
    if output_mask[0]:
        x_ct, x_to = _input_ct(ct, ct_bdim, x, x_bdim, weight, w_bdim, size, rest, groups)
    if output_mask[1]:
        shape = logical_shape(weight, w_bdim)
        w_ct, w_to = _weight_ct(ct, ct_bdim, x, x_bdim, shape, size, rest, groups)
    if output_mask[2]:
        channel = logical_dims(ct, ct_bdim)[1]
        others = [dim for dim in logical_dims(ct, ct_bdim) if dim != channel]
        b_ct = ct.sum(others)
        b_to = None if ct_bdim is None else without(ct_bdim, *others)
    return (x_ct, w_ct, b_ct), (x_to, w_to, b_to)


def _input_ct(
    ct: Any,
    ct_bdim: Any,
    x: Any,
    x_bdim: Any,
    weight: Any,
    w_bdim: Any,
    size: int,
    rest: Any,
    groups: int,
) -> Any:
    mask = [True, False, False]
    shape = logical_shape(x, x_bdim)
    n, c = shape[:2]
    if ct_bdim is None and w_bdim is None:
        x = x if x_bdim is None else x.select(x_bdim, 0)
        return aten.convolution_backward(ct, x, weight, None, *rest, groups, mask)[0], None
    if w_bdim is None:
        x = ct.new_empty((size * n, *shape[1:])) if x_bdim is None else fold(x, x_bdim, 0, size)
        ct = fold(ct, ct_bdim, 0, size)
        x_ct = aten.convolution_backward(ct, x, weight, None, *rest, groups, mask)[0]
        return unfold(x_ct, 0, size), 0
    if ct_bdim is not None and _is_pointwise(weight, w_bdim, rest):
        weight = batch_first(weight, w_bdim).flatten(2).unflatten(1, (groups, -1))
        return _product(weight.mT.flatten(1, 2), batch_first(ct, ct_bdim), groups), 0
    x = ct.new_empty((n, size * c, *shape[2:]))
    ct, weight = fold(ct, ct_bdim, 1, size), fold(weight, w_bdim, 0, size)
    x_ct = aten.convolution_backward(ct, x, weight, None, *rest, groups * size, mask)[0]
    return unfold(x_ct, 1, size), 1


def _weight_ct(
    ct: Any, ct_bdim: Any, x: Any, x_bdim: Any, shape: Any, size: int, rest: Any, groups: int
) -> Any:
    mask = [False, True, False]
    transposed = rest[3]
    if ct_bdim is None and x_bdim is None:
        weight = ct.new_empty(shape)
        return aten.convolution_backward(ct, x, weight, None, *rest, groups, mask)[1], None
    if groups == 1 and (ct_bdim is None or x_bdim is None):
        # One of the two is shared: the other's batch dim counts as channels, without groups.
        at = int((ct_bdim is None) != transposed)  # the dim of the weight that has these channels
        many = list(shape)
        many[at] *= size
        ct = ct if ct_bdim is None else fold(ct, ct_bdim, 1, size)
        x = x if x_bdim is None else fold(x, x_bdim, 1, size)
        weight = ct.new_empty(many)
        w_ct = aten.convolution_backward(ct, x, weight, None, *rest, 1, mask)[1]
        return unfold(w_ct, at, size), at
    if ct_bdim is not None and x_bdim is not None:
        ct, x, ct_bdim, x_bdim = batch_first(ct, ct_bdim), batch_first(x, x_bdim), 0, 0
        still, moving = (x, ct) if transposed else (ct, x)
        sizes = correlation(still, moving, shape, rest, groups)
        plan = cheapest(sizes, ct, size)
        if plan is not None:
            return run(plan, sizes, still, moving), 0
    ct, x = fold(ct, ct_bdim, 1, size), fold(x, x_bdim, 1, size)
    weight = ct.new_empty((size * shape[0], *shape[1:]))
    w_ct = aten.convolution_backward(ct, x, weight, None, *rest, groups * size, mask)[1]
    return unfold(w_ct, 0, size), 0
