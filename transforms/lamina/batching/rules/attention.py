"""Batching rules of scaled dot product attention, and of its kernel for CPUs.

The fused kernels want [N, heads, L, E]: the batch dim joins N, or becomes it, so that a fused
kernel stays one. Those of GPUs are in `attention_kernels.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import (
    EmptyBatchError,
    ensure_batched,
    fold,
    from_end,
    logical_rank,
    logical_shape,
    pad_rank,
    unfold,
)
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten


@batching_rule(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    info: Any,
    in_dims: Any,
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """[B, *N, L, E], [B, *N, S, E], [B, *N, S, E'], mask [B, *N, L, S] -> [B, *N, L, E']"""
    if not (q.numel() and k.numel() and v.numel()):
        raise EmptyBatchError  # the fused kernel of some versions divides by a size of 0
    dims = in_dims[:3]
    ranks = {logical_rank(x, d) for x, d in zip((q, k, v), dims, strict=True)}
    if dropout_p > 0 or len(ranks) > 1:
        return NotImplemented
    rank = ranks.pop()
    heads = [logical_shape(x, d)[:-2] for x, d in zip((q, k, v), dims, strict=True)]
    grouped = options.get("enable_gqa", False)
    if len({lead[:-1] if grouped else lead for lead in heads}) > 1:
        return NotImplemented  # leading dims that broadcast
    if attn_mask is None and not is_causal and dims[1] is None and dims[2] is None:
        return _shared_keys(q, dims[0], k, v, options)
    size = info.batch_size
    mask_bdim = in_dims[3] if attn_mask is not None and len(in_dims) > 3 else None
    lead = heads[0]
    four = [
        _into_four(ensure_batched(x, d, size), rank) for x, d in zip((q, k, v), dims, strict=True)
    ]
    mask = None
    if attn_mask is not None:
        mask = _mask(attn_mask, mask_bdim, rank, size, lead)
    out = torch.nn.functional.scaled_dot_product_attention(
        *four, attn_mask=mask, is_causal=is_causal, **options
    )
    return out.reshape(size, *lead, *out.shape[-2:]), 0


def _into_four(x: Any, rank: int) -> Any:
    """[B, *N, L, E] of logical `rank` -> [N', heads, L, E]"""
    if rank == 2:
        return x.unsqueeze(1)
    return x.flatten(0, rank - 3) if rank > 3 else x


def _mask(mask: Any, mask_bdim: Any, rank: int, size: int, lead: Any) -> Any:
    """A mask as [N', heads, L, S], with 1s where the kernel may broadcast."""
    if mask_bdim is None:
        outer = mask.shape[: max(mask.dim() - 3, 0)]
        if all(n == 1 for n in outer):
            return mask.reshape(mask.shape[len(outer) :])
        mask = mask.unsqueeze(0)
    mask = pad_rank(mask, 0 if mask_bdim is None else mask_bdim, rank)
    if rank > 3:
        mask = mask.expand(size, *lead[:-1], *mask.shape[-3:])
    return _into_four(mask, rank)


def _shared_keys(q: Any, q_bdim: int, k: Any, v: Any, options: Any) -> Any:
    """Only the queries are batched and nothing tells them apart: more queries to the same keys."""
    q = q.movedim(q_bdim, -3)
    many = q.flatten(-3, -2)
    out = torch.nn.functional.scaled_dot_product_attention(many, k, v, **options)
    return out.unflatten(-2, q.shape[-3:-1]), from_end(out, 2)


def _folded(info: Any, values: Any, dims: Any) -> Any:
    return [
        None if x is None else _even(fold(x, d, 0, info.batch_size))
        for x, d in zip(values, dims, strict=True)
    ]


def _even(x: Any) -> Any:
    """The kernels read rows of elements that lie side by side, and do not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _folded_mask(info: Any, mask: Any, mask_bdim: Any, n: int) -> Any:
    """A mask of the 4-d kernels: [L, S] or [N, heads, L, S], the latter with 1s or not."""
    if mask is None or (mask_bdim is None and (mask.dim() < 4 or mask.shape[0] == 1)):
        return mask
    mask = mask.unsqueeze(0) if mask_bdim is None else mask
    mask = pad_rank(mask, mask_bdim or 0, 4)
    return mask.expand(info.batch_size, n, *mask.shape[2:]).flatten(0, 1)


@batching_rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _scaled_dot_product_flash_attention_for_cpu(
    info: Any,
    in_dims: Any,
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: Any = None,
) -> Any:
    """[B, N, heads, L, E] three times -> [B, N, heads, L, E], [B, N, heads, L]"""
    n = logical_shape(q, in_dims[0])[0]
    mask = _folded_mask(info, attn_mask, info.kwarg_dims.get("attn_mask"), n)
    outs = aten._scaled_dot_product_flash_attention_for_cpu(
        *_folded(info, (q, k, v), in_dims[:3]),
        dropout_p,
        is_causal,
        attn_mask=mask,
        scale=scale,
    )
    return tuple(unfold(out, 0, info.batch_size) for out in outs), 0


@batching_rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def _scaled_dot_product_flash_attention_for_cpu_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    logsumexp: Any,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Any = None,
    scale: Any = None,
) -> Any:
    """[B, N, heads, L, E] five times and [B, N, heads, L] -> [B, N, heads, L, E] three times."""
    n = logical_shape(q, in_dims[1])[0]
    mask = _folded_mask(info, attn_mask, info.kwarg_dims.get("attn_mask"), n)
    outs = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_folded(info, (ct, q, k, v, out, logsumexp), in_dims[:6]),
        dropout_p,
        is_causal,
        attn_mask=mask,
        scale=scale,
    )
    return tuple(unfold(x, 0, info.batch_size) for x in outs), 0
