"""Batching rules of counting: histograms and `bincount`, each one scatter of ones into bins.

An element outside all bins, or nan, goes to one spare bin at the end, which is cut off. The last
bin has its right edge, the others have not.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lamina.batching.agreement import common_number
from lamina.batching.dims import ensure_batched, logical_shape
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten

__all__: list[str] = []


def _range(x: Any, lowest: Any, highest: Any, margin: float, name: str) -> Any:
    """The outer edges as given, or [B, 1] the extremes of each row of x [B, M]."""
    if lowest is not None:
        return (lowest, highest) if lowest != highest else (lowest - margin, highest + margin)
    if not x.shape[1]:
        return 0.0, 1.0
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    aten._assert_async.msg(
        (low.isfinite() & high.isfinite()).all(), f"{name}: the range of the data is not finite"
    )
    return torch.where(low == high, low - margin, low), torch.where(
        low == high, high + margin, high
    )


def _edges(x: Any, bins: int, lowest: Any, highest: Any) -> Any:
    """[B, bins + 1] equally spaced, from both ends to the middle as `torch.linspace` does it."""
    low, high = _range(x, lowest, highest, 0.5, "torch.histogram")
    if isinstance(low, float):
        return torch.linspace(low, high, bins + 1, dtype=x.dtype, device=x.device)
    step = (high - low) / bins
    number = torch.arange(bins + 1, dtype=x.dtype, device=x.device)
    return torch.where(number < (bins + 1) // 2, low + step * number, high - step * (bins - number))


def _count(size: int, places: list[Any], counts: list[int], weight: Any, dtype: Any) -> Any:
    """Places [B, M] in each dim, -1 if outside, and weights [B, M] -> [B, *counts]."""
    total = math.prod(counts)
    flat: Any = 0
    outside: Any = False
    for place, count in zip(places, counts, strict=True):
        flat = flat * count + place
        outside = outside | (place < 0)
    flat = torch.where(outside, torch.full_like(flat, total), flat)
    # Without weights the sum is one of integers: half precision cannot count beyond 2048.
    ones = torch.ones_like(flat) if weight is None else weight
    zeros = ones.new_zeros((size, total + 1))
    return zeros.scatter_add(1, flat, ones)[:, :total].reshape(size, *counts).to(dtype)


def _density(hist: Any, widths: list[Any]) -> Any:
    """[B, *counts] divided by its sum and by the widths [counts] or [B, counts] of each dim."""
    rank = hist.dim() - 1
    hist = hist / hist.flatten(1).sum(1).reshape(-1, *[1] * rank)
    for at, width in enumerate(widths):
        shape = [1] * rank
        shape[at] = width.shape[-1]
        hist = hist / width.reshape(*width.shape[:-1], *shape)
    return hist


def _into_edges(x: Any, edges: Any) -> Any:
    """Values [B, M] and edges [B, n + 1] or [n + 1] -> the bin of each [B, M], -1 if outside."""
    last = edges.shape[-1] - 1
    place = torch.searchsorted(edges.contiguous(), x.contiguous(), right=True) - 1
    inside = (x >= edges[..., :1]) & (x <= edges[..., last:])
    return torch.where(inside, place.clamp(max=last - 1), torch.full_like(place, -1))


def _histogram(size: int, x: Any, edges: list[Any], weight: Any, density: bool) -> Any:
    """Points [B, M, D], edges per dim and weights [B, M] -> [B, *bins]."""
    places = [_into_edges(x[..., at], edge) for at, edge in enumerate(edges)]
    counts = [edge.shape[-1] - 1 for edge in edges]
    hist = _count(size, places, counts, weight, x.dtype)
    return _density(hist, [edge.diff(dim=-1) for edge in edges]) if density else hist


def _points(info: Any, x: Any, x_bdim: Any, weight: Any, per_point: int | None) -> Any:
    """[B, *, D] -> [B, M, D] and weights [B, *] -> [B, M]; one number a point if D is None."""
    size = info.batch_size
    shape = logical_shape(x, x_bdim)
    last = per_point if per_point is not None else 1
    x = ensure_batched(x, x_bdim, size).reshape(size, math.prod(shape) // max(last, 1), last)
    if weight is not None:
        weight = ensure_batched(weight, info.kwarg_dims.get("weight"), size).reshape(x.shape[:2])
    return x, weight


def _sides(outer: Any, dims: int) -> list[tuple[Any, Any]]:
    """The outer edges of each dim from their flat list, or None for those of the data."""
    if outer is None:
        return [(None, None)] * dims
    return list(zip(outer[::2], outer[1::2], strict=True))


@batching_rule(aten.histc.default)
def histc(info: Any, in_dims: Any, x: Any, bins: int = 100, min: Any = 0, max: Any = 0) -> Any:
    """[B, *S] -> [B, bins]. A bin is found by division, so not always as an edge would say."""
    x, _ = _points(info, x, in_dims[0], None, None)
    x = x.squeeze(2)
    low, high = _range(x, *((None, None) if min == max else (min, max)), 1.0, "torch.histc")
    inside = (x >= low) & (x <= high)
    place = torch.where(inside, (x - low) * bins / (high - low), -1.0).to(torch.int64)
    return _count(info.batch_size, [place.clamp(max=bins - 1)], [bins], None, x.dtype), 0


@batching_rule(aten.histogram.bin_ct)
def histogram_bin_ct(
    info: Any,
    in_dims: Any,
    x: Any,
    bins: int = 100,
    *,
    range: Any = None,
    weight: Any = None,
    density: bool = False,
) -> Any:
    """[B, *S] -> [B, bins], [B, bins + 1]. With a range the edges are the same for all."""
    x, weight = _points(info, x, in_dims[0], weight, None)
    edges = _edges(x.squeeze(2), bins, *_sides(range, 1)[0])
    hist = _histogram(info.batch_size, x, [edges], weight, density)
    return (hist, edges), (0, 0 if edges.dim() == 2 else None)


@batching_rule(aten.histogram.bins_tensor)
def histogram_bins_tensor(
    info: Any, in_dims: Any, x: Any, bins: Any, *, weight: Any = None, density: bool = False
) -> Any:
    """[B, *S], edges [B, n + 1] -> [B, n], [B, n + 1]"""
    x, weight = _points(info, x, in_dims[0], weight, None)
    edges = bins if in_dims[1] is None else ensure_batched(bins, in_dims[1], info.batch_size)
    hist = _histogram(info.batch_size, x, [edges], weight, density)
    return (hist, edges.clone()), (0, None if in_dims[1] is None else 0)


@batching_rule(aten._histogramdd_bin_edges.default)
def histogramdd_bin_edges(
    info: Any,
    in_dims: Any,
    x: Any,
    bins: Any,
    *,
    range: Any = None,
    weight: Any = None,
    density: bool = False,
) -> Any:
    """[B, *, D] -> [B, bins + 1] for each of the D dims."""
    x, _ = _points(info, x, in_dims[0], None, len(bins))
    edges = _grid(x, bins, range)
    return edges, [0 if edge.dim() == 2 else None for edge in edges]


def _grid(x: Any, bins: Any, outer: Any) -> list[Any]:
    sides = _sides(outer, len(bins))
    return [
        _edges(x[..., at], count, *side)
        for at, (count, side) in enumerate(zip(bins, sides, strict=True))
    ]


@batching_rule(aten._histogramdd_from_bin_cts.default)
def histogramdd_from_bin_cts(
    info: Any,
    in_dims: Any,
    x: Any,
    bins: Any,
    *,
    range: Any = None,
    weight: Any = None,
    density: bool = False,
) -> Any:
    """[B, *, D] -> [B, *bins]"""
    x, weight = _points(info, x, in_dims[0], weight, len(bins))
    return _histogram(info.batch_size, x, _grid(x, bins, range), weight, density), 0


@batching_rule(aten._histogramdd_from_bin_tensors.default)
def histogramdd_from_bin_tensors(
    info: Any, in_dims: Any, x: Any, bins: Any, *, weight: Any = None, density: bool = False
) -> Any:
    """[B, *, D], D lists of edges [B, n + 1] -> [B, *n]"""
    size = info.batch_size
    x, weight = _points(info, x, in_dims[0], weight, len(bins))
    edges = [
        edge if bdim is None else ensure_batched(edge, bdim, size)
        for edge, bdim in zip(bins, in_dims[1], strict=True)
    ]
    return _histogram(size, x, edges, weight, density), 0


@batching_rule(aten.bincount.default)
def bincount(info: Any, in_dims: Any, x: Any, weights: Any = None, minlength: int = 0) -> Any:
    """[B, N], weights [B, N] -> [B, minlength], where no number of any example reaches minlength.

    Otherwise the largest number says how long the result is, and examples must agree on that.
    """
    size = info.batch_size
    x = ensure_batched(x, in_dims[0], size).to(torch.int64)
    if minlength and torch.equal(x.clamp(max=minlength - 1), x):
        length = minlength
    else:
        longest = (x.amax(1) + 1).clamp(min=minlength) if x.shape[1] else x.new_full([1], minlength)
        length = common_number(
            info,
            longest,
            "aten.bincount.default",
            "to fix: pass a minlength above every number, or use zeros(n).scatter_add(0, x, ones)",
        )
    dtype = torch.int64
    if weights is not None:
        weights = ensure_batched(weights, (*in_dims, None)[1], size)
        dtype = weights.dtype if weights.dtype is torch.float32 else torch.float64
        weights = weights.to(dtype)
    ones = torch.ones_like(x) if weights is None else weights
    return torch.zeros((size, length), dtype=dtype, device=x.device).scatter_add(1, x, ones), 0
