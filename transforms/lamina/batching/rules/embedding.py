"""Batching rules of embeddings.

Tables of their own per example become one long table, into which the indices of example b are moved
by b times the length of one. An index that is padding gets no gradient wherever it lands; one that
is out of range would land in the table of another example, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.bounds import require, require_all
from lamina.batching.dims import (
    batch_first,
    ensure_batched,
    fold,
    from_end,
    logical_shape,
    unfold,
)
from lamina.batching.table import batching_rule, decomposition
from lamina_core.overloads import aten


def _moved(index: Any, rows: int) -> Any:
    """[B, *I] indices into tables of `rows` rows -> indices into the one long table."""
    require(index, 0, rows)
    start = torch.arange(index.shape[0], device=index.device, dtype=index.dtype) * rows
    return index + start.reshape(-1, *[1] * (index.dim() - 1))


@batching_rule(aten.embedding.default)
def embedding(
    info: Any,
    in_dims: Any,
    weight: Any,
    index: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """[B, V, D], [B, *I] -> [B, *I, D]"""
    w_bdim, i_bdim = in_dims[:2]
    size = info.batch_size
    options = (padding_idx, scale_grad_by_freq, sparse)
    if w_bdim is None:
        return aten.embedding(weight, index, *options), i_bdim
    if i_bdim is None:  # one table with wider rows
        out = aten.embedding(fold(weight, w_bdim, 1, size), index, *options)
        last = from_end(out, 1)
        return unfold(out, last, size), last
    rows = logical_shape(weight, w_bdim)[0]
    index = batch_first(index, i_bdim)
    long = fold(weight, w_bdim, 0, size)
    out = aten.embedding(long, _moved(index, rows), -1, scale_grad_by_freq, sparse)
    if padding_idx < 0:
        return out, 0
    # The padding row of each example, looked up in a way that stops its gradient.
    at = index.new_full([1], padding_idx)
    row = aten.embedding(fold(weight, w_bdim, 1, size), at, padding_idx)
    row = row.reshape(size, *[1] * (index.dim() - 1), -1)
    return torch.where((index == padding_idx).unsqueeze(-1), row, out), 0


@batching_rule(aten.embedding_dense_backward.default)
def embedding_dense_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    index: Any,
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Any:
    """[B, *I, D], [B, *I] -> [B, V, D]"""
    ct_bdim, i_bdim = in_dims[:2]
    size = info.batch_size
    if i_bdim is None:
        ct = fold(ct, ct_bdim, index.dim(), size)
        out = aten.embedding_dense_backward(ct, index, num_weights, padding_idx, scale_grad_by_freq)
        return unfold(out, 1, size), 1
    index = batch_first(index, i_bdim)
    ct = ensure_batched(ct, ct_bdim, size)
    moved = _moved(index, num_weights)
    total = size * num_weights
    if padding_idx >= 0:  # all padding lands in one more row
        moved = torch.where(index == padding_idx, torch.full_like(moved, total), moved)
        out = aten.embedding_dense_backward(ct, moved, total + 1, total, scale_grad_by_freq)
        return unfold(out.narrow(0, 0, total), 0, size), 0
    out = aten.embedding_dense_backward(ct, moved, total, -1, scale_grad_by_freq)
    return unfold(out, 0, size), 0


@batching_rule(aten.embedding_renorm.default)
def embedding_renorm(
    info: Any, in_dims: Any, weight: Any, index: Any, max_norm: float, norm_type: float
) -> Any:
    """[B, V, D], [B, *I] -> [B, V, D]: only the rows that are looked up are shortened."""
    size = info.batch_size
    weight = batch_first(weight, in_dims[0])
    index = ensure_batched(index, in_dims[1], size)
    index = index.reshape(size, torch.Size(index.shape[1:]).numel())
    norms = torch.linalg.vector_norm(weight, norm_type, -1)
    marks = torch.zeros_like(norms, dtype=torch.bool).expand(size, norms.shape[-1])
    met = marks.scatter(1, index, True)
    scale = torch.where(met & (norms > max_norm), max_norm / (norms + 1e-7), 1.0)
    return weight * scale.to(weight.dtype).unsqueeze(-1), 0


# -- bags: made of embeddings and of reductions over the entries of each bag -----------------------

SUM, MEAN, MAX = 0, 1, 2


def _check_offsets(offsets: Any, count: int, last_is_end: bool) -> None:
    """Refuse bags that do not divide `count` entries among them."""
    if not offsets.numel():
        return
    require(offsets, 0, count + 1, "offset")
    require_all(offsets[0] == 0, "offsets[0] has to be 0: the first bag starts with entry 0")
    if last_is_end:
        text = f"offsets[-1] has to be {count}, the number of entries, with include_last_offset"
        require_all(offsets[-1] == count, text)


@decomposition(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def _embedding_bag(
    weight: Any,
    index: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """[V, D], [n], [bags] -> [bags, D], the bag of each index, the bag sizes, the argmaxes."""
    _check_offsets(offsets, index.shape[0], include_last_offset and mode != MAX)
    if include_last_offset:
        offsets = offsets[:-1]
    bags, columns = offsets.shape[0], weight.shape[1]
    place = torch.arange(index.shape[0], device=index.device, dtype=offsets.dtype)
    bag = torch.searchsorted(offsets, place, right=True) - 1
    bag = bag.to(index.dtype)
    entries = aten.embedding(weight, index, padding_idx, scale_grad_by_freq, False)
    counts = (index != padding_idx) if padding_idx >= 0 else torch.ones_like(index) > 0
    size = index.new_zeros([bags]).index_add(0, bag, counts.to(index.dtype))
    if per_sample_weights is not None:
        entries = entries * per_sample_weights.unsqueeze(-1)
    if mode == MAX:
        where = bag.unsqueeze(-1).expand_as(entries)
        shown = counts.unsqueeze(-1) & ~entries.isnan()  # a NaN is larger than nothing
        low = torch.where(shown, entries, torch.full_like(entries, -torch.inf))
        best = torch.full_like(entries[:1], -torch.inf).expand(bags, columns)
        best = best.scatter_reduce(0, where, low, "amax")
        hit = (low == best.index_select(0, bag)) & shown
        first = torch.full_like(where[:1], index.shape[0]).expand(bags, columns)
        numbers = place.to(index.dtype).unsqueeze(-1).expand_as(where)
        beyond = torch.full_like(numbers, index.shape[0])
        # The first entry of a bag is taken as it is, and nothing is larger than a NaN either.
        opening = first.scatter_reduce(
            0, where, torch.where(counts.unsqueeze(-1), numbers, beyond), "amin"
        )
        opens = (numbers == opening.index_select(0, bag)) & entries.isnan()
        stuck = torch.zeros_like(first).index_add(0, bag, opens.to(first.dtype)) > 0
        first = first.scatter_reduce(0, where, torch.where(hit, numbers, beyond), "amin")
        first = torch.where(stuck, opening, first)
        found = first < index.shape[0]
        chosen = torch.where(found, first, torch.zeros_like(first))
        argmax = index.index_select(0, chosen.flatten()).reshape(first.shape)
        out = torch.where(found, entries.gather(0, chosen), torch.zeros_like(best))
        return out, bag, size, torch.where(found, argmax, torch.zeros_like(argmax))
    entries = torch.where(counts.unsqueeze(-1), entries, torch.zeros_like(entries))
    out = entries.new_zeros([bags, columns]).index_add(0, bag, entries)
    if mode == MEAN:
        out = out / size.clamp(min=1).unsqueeze(-1)
    return out, bag, size, torch.zeros_like(size)


@decomposition(aten._embedding_bag_dense_backward.default)
def _embedding_bag_dense_backward(
    ct: Any,
    index: Any,
    bag: Any,
    size: Any,
    argmax: Any,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    per_sample_weights: Any,
    padding_idx: int = -1,
) -> Any:
    """[bags, D] -> [V, D]"""
    if mode == MAX:
        kept = torch.where((size > 0).unsqueeze(-1), ct, torch.zeros_like(ct))
        zeros = ct.new_zeros([num_weights, ct.shape[1]])
        return zeros.scatter_add(0, argmax, kept)
    entries = ct.index_select(0, bag)
    if mode == MEAN:
        entries = entries / size.clamp(min=1).index_select(0, bag).unsqueeze(-1)
    if per_sample_weights is not None:
        entries = entries * per_sample_weights.unsqueeze(-1)
    return aten.embedding_dense_backward(
        entries, index, num_weights, padding_idx, scale_grad_by_freq
    )


@decomposition(aten._embedding_bag_per_sample_weights_backward.default)
def _embedding_bag_per_sample_weights_backward(
    ct: Any, weight: Any, index: Any, offsets: Any, bag: Any, mode: int, padding_idx: int = -1
) -> Any:
    """[bags, D], [V, D] -> [n]"""
    products = (ct.index_select(0, bag) * weight.index_select(0, index)).sum(-1)
    if padding_idx < 0:
        return products
    return torch.where(index == padding_idx, torch.zeros_like(products), products)


@decomposition(aten._embedding_bag_backward.default)
def _embedding_bag_backward(
    ct: Any,
    index: Any,
    offsets: Any,
    bag: Any,
    size: Any,
    argmax: Any,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Any,
    padding_idx: int = -1,
) -> Any:
    """[bags, D] -> [V, D], which is dense: examples cannot share the indices of a sparse one."""
    return _embedding_bag_dense_backward(
        ct,
        index,
        bag,
        size,
        argmax,
        num_weights,
        scale_grad_by_freq,
        mode,
        per_sample_weights,
        padding_idx,
    )
