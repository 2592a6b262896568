"""Derivatives of embedding: linear in the table, and its pullback linear in the cotangent.

The pullback of `embedding_bag` is PyTorch's fused op, which is taken apart for its own derivative.

The cotangent of a table is dense, also where `sparse=True` asks PyTorch for a sparse one.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import decomposition, linear, vjp_rule
from lamina_core.overloads import aten


def _spread(ct: Any, x_shape: Any, indices: Any, padding_idx: Any, scale_grad_by_freq: bool) -> Any:
    """[*I, D], indices [*I] -> [N, D]."""
    return aten.embedding_dense_backward.default(
        ct, indices, x_shape[0], padding_idx, scale_grad_by_freq
    )


def _looked_up(
    ct: Any, indices: Any, num_weights: Any, padding_idx: Any, scale_grad_by_freq: bool
) -> Any:
    """[N, D], indices [*I] -> [*I, D]. Rows of the padding index have no part in the gradient."""
    out = aten.embedding.default(ct, indices)
    if padding_idx >= 0:
        out = out.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    if scale_grad_by_freq:
        flat = indices.flatten()
        counts = (flat.unsqueeze(0) == flat.unsqueeze(1)).sum(0).reshape(indices.shape)
        out = out / counts.unsqueeze(-1)
    return out


linear(aten.embedding.default, _spread)
linear(aten.embedding_dense_backward.default, _looked_up)


# -- bags ------------------------------------------------------------------------------------------

_MEAN, _MAX = 1, 2  # the numbers that ATen gives the modes; 0 is the sum


@vjp_rule(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def embedding_bag_rule(
    needs: Any,
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """[N, D], indices [I], starts [B], weights [I] -> [B, D], and three facts of the bags."""
    # C++ picks the op that keeps no facts where no tensor requires grad, as no wrapper does.
    outs = aten._embedding_bag.default(
        weight,
        indices,
        offsets,
        scale_grad_by_freq,
        mode,
        sparse,
        per_sample_weights,
        include_last_offset,
        padding_idx,
    )
    table = weight if needs[3] else None
    places = (indices, offsets, *outs[1:])
    options = (scale_grad_by_freq, mode, per_sample_weights, padding_idx)
    return outs, (table, weight.shape[0], places, options), _embedding_bag_pullback


def _embedding_bag_pullback(residuals: Any, needs: Any, ct: Any, *others: Any) -> Any:
    table, rows, places, (scale_grad_by_freq, mode, weights, padding_idx) = residuals
    if ct is None:
        return (None,) * 4
    table_ct = weights_ct = None
    if needs[0]:
        # The fused op counts some indices by the occurrences of others.
        op = aten._embedding_bag_backward.default
        backward = embedding_bag_backward if scale_grad_by_freq else op
        table_ct = backward(
            ct, *places, rows, scale_grad_by_freq, mode, False, weights, padding_idx
        )
    if needs[3]:
        weights_ct = aten._embedding_bag_per_sample_weights_backward.default(
            ct, table, *places[:3], mode, padding_idx
        )
    return table_ct, None, None, weights_ct


def _bags(indices: Any, offsets: Any) -> Any:
    """The bag of each index: [I], starts [B] -> [I]."""
    places = torch.arange(indices.shape[0], device=indices.device)
    return torch.bucketize(places, offsets, right=True) - 1


@decomposition(aten._embedding_bag_backward.default)
def embedding_bag_backward(
    grad: Any,
    indices: Any,
    offsets: Any,
    offset2bag: Any,
    bag_size: Any,
    maximum_indices: Any,
    num_weights: Any,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Any = None,
    padding_idx: int = -1,
) -> Any:
    """[B, D], indices [I], starts [B] -> [N, D]"""
    table = torch.zeros((num_weights, grad.shape[1]), dtype=grad.dtype, device=grad.device)
    bags, kept = _bags(indices, offsets), indices != padding_idx
    sizes = torch.zeros_like(grad[:, 0]).index_add(0, bags, kept.to(grad.dtype)).unsqueeze(1)
    if mode == _MAX:
        grad = grad.masked_fill(sizes == 0, 0)  # an empty bag has no largest entry
        return table.scatter_add(0, maximum_indices.clamp_min(0), grad)
    if mode == _MEAN:
        grad = grad / sizes.clamp_min(1)
    pulled = grad.index_select(0, bags)
    if per_sample_weights is not None:
        pulled = pulled * per_sample_weights.unsqueeze(1)
    if scale_grad_by_freq:
        counts = torch.zeros_like(table[:, 0]).index_add(0, indices, torch.ones_like(pulled[:, 0]))
        pulled = pulled / counts.index_select(0, indices).unsqueeze(1)
    return table.index_add(0, indices, pulled.masked_fill(kept.logical_not().unsqueeze(1), 0))


@decomposition(aten._embedding_bag_per_sample_weights_backward.default)
def embedding_bag_per_sample_weights_backward(
    grad: Any,
    weight: Any,
    indices: Any,
    offsets: Any,
    offset2bag: Any,
    mode: int,
    padding_idx: int = -1,
) -> Any:
    """[B, D], [N, D], indices [I], starts [B] -> [I]; of a sum, the only mode with weights."""
    pulled = grad.index_select(0, _bags(indices, offsets)) * weight.index_select(0, indices)
    return pulled.sum(1).masked_fill(indices == padding_idx, 0)
