"""Grouped matrix products: one product per group of rows, as mixtures of experts use them.

Offsets say where each group ends, and under `vmap` each example has its own. Where every example
shares the weights, the rows of all examples are sorted by group, so that the weights are read once
and never copied; otherwise the groups of all examples stand one behind the other.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import batch_first, ensure_batched, logical_rank
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten

__all__: list[str] = []


@batching_rule(aten._grouped_mm.default)
def grouped_mm(
    info: Any,
    in_dims: Any,
    x: Any,
    y: Any,
    offs: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> Any:
    """The ragged dim is n: x [n, k], y [g, k, m]; x [g, n', k], y [k, n]; or x [k, n], y [n, m]"""
    dims: Any = (*in_dims, None)
    x_bdim, y_bdim, offs_bdim = dims[:3]
    ranks = logical_rank(x, x_bdim), logical_rank(y, y_bdim)
    size = info.batch_size
    if ranks == (3, 3):
        x, y = ensure_batched(x, x_bdim, size), ensure_batched(y, y_bdim, size)
        out = aten._grouped_mm.default(x.flatten(0, 1), y.flatten(0, 1), None, bias, out_dtype)
        return out.unflatten(0, (size, -1)), 0
    x, y = batch_first(x, x_bdim), batch_first(y, y_bdim)
    ends = ensure_batched(offs, offs_bdim, size)
    if ranks == (3, 2):  # the transpose of the first kind
        out = _ragged_rows(y.mT, y_bdim, x.mT, x_bdim, ends, size, bias, out_dtype)
        return out.mT, 0
    if ranks == (2, 3):
        return _ragged_rows(x, x_bdim, y, y_bdim, ends, size, bias, out_dtype), 0
    return _ragged_sums(x, x_bdim, y, y_bdim, ends, size, bias, out_dtype), 0


def _ragged_rows(
    x: Any, x_bdim: Any, y: Any, y_bdim: Any, ends: Any, size: int, bias: Any, out_dtype: Any
) -> Any:
    """[B, n, k], [B, g, k, m] -> [B, n, m]; rows behind the last group are undefined, as always"""
    x = ensure_batched(x, None, size) if x_bdim is None else x
    rows = x.shape[1]
    if y_bdim is not None:
        out = _product(
            x.flatten(0, 1), y.flatten(0, 1), _one_behind_the_other(ends, rows), bias, out_dtype
        )
        return out.unflatten(0, (size, rows))
    at = torch.arange(rows, device=ends.device, dtype=ends.dtype).expand(size, rows).contiguous()
    group = torch.searchsorted(ends.contiguous(), at, right=True).flatten()
    order = group.argsort(stable=True)
    out = _product(x.flatten(0, 1)[order], y, ends.sum(0, dtype=ends.dtype), bias, out_dtype)
    return out[order.argsort()].unflatten(0, (size, rows))


def _ragged_sums(
    x: Any, x_bdim: Any, y: Any, y_bdim: Any, ends: Any, size: int, bias: Any, out_dtype: Any
) -> Any:
    """[B, k, n], [B, n, m] -> [B, g, k, m]; what lies behind the last group counts as zero"""
    rows = x.shape[-1]
    inside = torch.arange(rows, device=ends.device) < ends[:, -1:]
    x = torch.where(inside.unsqueeze(1), x, 0)
    y = torch.where(inside.unsqueeze(2), y, 0)
    x, y = x.movedim(0, 1).flatten(1), y.flatten(0, 1)
    out = _product(x, y, _one_behind_the_other(ends, rows), bias, out_dtype)
    return out.unflatten(0, (size, -1))


def _one_behind_the_other(ends: Any, rows: int) -> Any:
    """[B, g] -> [B * g], where each example has `rows` rows"""
    starts = torch.arange(ends.shape[0], device=ends.device, dtype=ends.dtype) * rows
    return (ends + starts.unsqueeze(1)).flatten()


def _product(x: Any, y: Any, ends: Any, bias: Any, out_dtype: Any) -> Any:
    return aten._grouped_mm.default(x, y, ends, bias, out_dtype)
