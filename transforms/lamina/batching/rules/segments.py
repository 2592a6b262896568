"""Batching rules of reductions over segments of a dim, which ATen batches over leading dims."""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import behind_batch, ensure_batched
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten

__all__: list[str] = []


def _segments(info: Any, options: dict[str, Any], rank: int, axis: int) -> dict[str, Any]:
    """The options with lengths or offsets [B, *, segments], for an axis behind the batch dim."""
    for name in ("lengths", "offsets"):
        if options.get(name) is not None:
            bdim = info.kwarg_dims.get(name)
            batched = ensure_batched(options[name], bdim, info.batch_size)
            options[name] = batched.contiguous()
    return {**options, "axis": behind_batch(axis, rank)}


@batching_rule(aten.segment_reduce.default)
def segment_reduce(
    info: Any, in_dims: Any, x: Any, reduce: str, *, axis: int = 0, **options: Any
) -> Any:
    """[B, *S], [B, *S before axis, segments] -> [B, *S with segments at axis]"""
    x = ensure_batched(x, in_dims[0], info.batch_size).contiguous()
    options = _segments(info, options, x.dim() - 1, axis)
    if not info.batch_size:  # the kernel looks for the smallest length
        by_offsets = options.get("lengths") is None
        bounds = options["offsets" if by_offsets else "lengths"]
        shape = list(x.shape)
        shape[options["axis"]] = bounds.shape[-1] - by_offsets
        return x.new_empty(shape), 0
    return aten.segment_reduce(x, reduce, **options), 0


@batching_rule(aten._segment_reduce_backward.default)
def segment_reduce_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    out: Any,
    x: Any,
    reduce: str,
    *,
    axis: int = 0,
    **options: Any,
) -> Any:
    """[B, *S with segments at axis], twice, [B, *S] -> [B, *S]"""
    ct, out, x = (
        ensure_batched(v, d, info.batch_size).contiguous()
        for v, d in zip((ct, out, x), in_dims[:3], strict=True)
    )
    if not info.batch_size:
        return torch.zeros_like(x), 0
    options = _segments(info, options, x.dim() - 1, axis)
    return aten._segment_reduce_backward(ct, out, x, reduce, **options), 0
