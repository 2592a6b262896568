"""Batching rules of losses.

A loss that averages or sums over its own N is computed without reduction, and then reduced per
example of the batch.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import (
    at_least_1d,
    batch_first,
    ensure_batched,
    fold,
    logical_rank,
    pad_rank,
    unfold,
)
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten

NONE, MEAN, SUM = 0, 1, 2


def _reduce(out: Any, reduction: int) -> Any:
    """[B, *S] -> [B], unless nothing is reduced."""
    if reduction == NONE or out.dim() == 1:
        return out
    out = out.flatten(1)
    return out.mean(1) if reduction == MEAN else out.sum(1)


def _unreduce(ct: Any, ct_bdim: Any, reduction: int, rank: int, count: int) -> Any:
    """The cotangent of the unreduced loss: [B] or [] -> [B, 1...], divided by the count."""
    ct = batch_first(ct, ct_bdim)
    if reduction == NONE:
        return ct
    if reduction == MEAN:
        ct = ct / count
    return ct.reshape((*ct.shape, *[1] * rank))


# -- elementwise losses ----------------------------------------------------------------------------

# One op a line: forward and backward.
_ELEMENTWISE = [
    (aten.huber_loss.default, aten.huber_loss_backward.default),
    (aten.mse_loss.default, aten.mse_loss_backward.default),
    (aten.smooth_l1_loss.default, aten.smooth_l1_loss_backward.default),
    (aten.soft_margin_loss.default, aten.soft_margin_loss_backward.default),
]


def _register_elementwise(op: Any, op_backward: Any) -> None:
    @batching_rule(op, state="family")
    def elementwise_loss(
        info: Any, in_dims: Any, x: Any, target: Any, reduction: int = MEAN, *rest: Any
    ) -> Any:
        """[B, *S], [B, *S] -> [B]"""
        x, target, _ = _pair(x, target, in_dims)
        if x.shape != target.shape:
            x, target = torch.broadcast_tensors(x, target)  # not all kernels do
        return _reduce(op(x, target, NONE, *rest), reduction), 0

    @batching_rule(op_backward, state="family")
    def elementwise_loss_backward(
        info: Any, in_dims: Any, ct: Any, x: Any, target: Any, reduction: int, *rest: Any
    ) -> Any:
        """[B], [B, *S], [B, *S] -> [B, *S]"""
        x, target, rank = _pair(x, target, in_dims[1:])
        count = _count(x, in_dims[1])
        ct = _unreduce(ct, in_dims[0], reduction, rank, count)
        size = info.batch_size
        x = ensure_batched(x, None if in_dims[1] is None else 0, size)
        target = target.expand_as(x)
        return op_backward(ct.expand_as(x), x, target, NONE, *rest), 0


def _pair(x: Any, target: Any, in_dims: Any) -> Any:
    rank = max(logical_rank(x, in_dims[0]), logical_rank(target, in_dims[1]))
    return pad_rank(x, in_dims[0], rank), pad_rank(target, in_dims[1], rank), rank


def _count(x: Any, x_bdim: Any) -> int:
    """How many elements one example has; `x` has its batch dim first."""
    shape = x.shape if x_bdim is None else x.shape[1:]
    return int(shape.numel())


for _op, _op_backward in _ELEMENTWISE:
    _register_elementwise(_op, _op_backward)


@batching_rule(aten.binary_cross_entropy.default)
def binary_cross_entropy(
    info: Any, in_dims: Any, x: Any, target: Any, weight: Any = None, reduction: int = MEAN
) -> Any:
    """[B, *S], [B, *S], [B, *S] -> [B]"""
    x, target, rank = _pair(x, target, in_dims)
    x, target = torch.broadcast_tensors(x, target)
    out = aten.binary_cross_entropy(x, target, None, NONE)
    if weight is not None:
        out = out * pad_rank(weight, in_dims[2], rank)
    out = ensure_batched(out, 0 if out.dim() > rank else None, info.batch_size)
    return _reduce(out, reduction), 0


@batching_rule(aten.binary_cross_entropy_backward.default)
def binary_cross_entropy_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    x: Any,
    target: Any,
    weight: Any = None,
    reduction: int = MEAN,
) -> Any:
    """[B], [B, *S], [B, *S], [B, *S] -> [B, *S]"""
    count = _count(*((x, None) if in_dims[1] is None else (batch_first(x, in_dims[1]), 0)))
    x, target, rank = _pair(x, target, in_dims[1:])
    ct = _unreduce(ct, in_dims[0], reduction, rank, count)
    if weight is not None:
        ct = ct * pad_rank(weight, in_dims[3], rank)
    x, target, ct = torch.broadcast_tensors(x, target, ct)
    return aten.binary_cross_entropy_backward(ct, x, target, None, NONE), 0


@batching_rule(aten.binary_cross_entropy_with_logits.default)
def binary_cross_entropy_with_logits(
    info: Any,
    in_dims: Any,
    x: Any,
    target: Any,
    weight: Any = None,
    pos_weight: Any = None,
    reduction: int = MEAN,
) -> Any:
    """[B, *S] four times -> [B]. All operands broadcast."""
    pairs = list(zip((x, target, weight, pos_weight), (*in_dims, None, None)[:4], strict=True))
    rank = max(logical_rank(v, d) for v, d in pairs if v is not None)
    x, target, *weights = (None if v is None else pad_rank(v, d, rank) for v, d in pairs)
    if in_dims[0] is None or x.shape != target.shape:  # the kernel adds up in the memory of a term
        given = [weight for weight in weights if weight is not None]
        x, target, *_ = torch.broadcast_tensors(x, target, *given)
    return _reduce(aten.binary_cross_entropy_with_logits(x, target, *weights, NONE), reduction), 0


# -- classification losses -------------------------------------------------------------------------


def _with_n(info: Any, value: Any, bdim: Any, rank: int) -> Any:
    """[B, N, *S] -> [B * N, *S]; without N (less than `rank` logical dims) the batch dim is N."""
    if logical_rank(value, bdim) < rank:
        return ensure_batched(value, bdim, info.batch_size).contiguous()
    return fold(value, bdim, 0, info.batch_size)


def _class_weights(
    info: Any, weight: Any, w_bdim: Any, target: Any, t_bdim: Any, ignore_index: int
) -> Any:
    """The weight of each target, 0 where it is ignored: [B, *T]; without weights a mask."""
    target = ensure_batched(target, t_bdim, info.batch_size)
    kept = target != ignore_index
    if weight is None:
        return kept
    safe = torch.where(kept, target, torch.zeros_like(target))
    weight = ensure_batched(weight, w_bdim, info.batch_size)
    picked = weight.gather(1, safe.flatten(1) if safe.dim() > 1 else safe.unsqueeze(1))
    picked = picked.reshape(safe.shape)
    return torch.where(kept, picked, torch.zeros_like(picked))


def _register_nll(op: Any, op_backward: Any, rank: int) -> None:
    @batching_rule(op, state="family")
    def nll_loss(
        info: Any,
        in_dims: Any,
        x: Any,
        target: Any,
        weight: Any,
        reduction: int,
        ignore_index: int,
    ) -> Any:
        """[B, N, C, *S], [B, N, *S], [B, C] -> [B], [B]. The mean divides by the weights met."""
        x_bdim, t_bdim, w_bdim = in_dims[:3]
        has_n = logical_rank(x, x_bdim) == rank
        flat = _with_n(info, x, x_bdim, rank)
        labels = _with_n(info, target, t_bdim, logical_rank(target, t_bdim) if has_n else 1)
        out = op(flat, labels, None, NONE, ignore_index)[0]
        out = unfold(out, 0, info.batch_size) if has_n else out
        met = _class_weights(info, weight, w_bdim, target, t_bdim, ignore_index)
        if weight is not None:
            out = out * met
        if reduction == NONE:
            return (out, x.new_zeros([])), (0, None)
        total = _reduce(met.to(x.dtype), SUM)
        out = _reduce(out, SUM)
        return (out / total if reduction == MEAN else out, total), (0, 0)

    @batching_rule(op_backward, state="family")
    def nll_loss_backward(
        info: Any,
        in_dims: Any,
        ct: Any,
        x: Any,
        target: Any,
        weight: Any,
        reduction: int,
        ignore_index: int,
        total_weight: Any,
    ) -> Any:
        """[B], [B, N, C, *S], [B, N, *S], [B, C], [B] -> [B, N, C, *S]"""
        ct_bdim, x_bdim, t_bdim, w_bdim = in_dims[:4]
        has_n = logical_rank(x, x_bdim) == rank
        t_rank = logical_rank(target, t_bdim)
        ct = ensure_batched(ct, ct_bdim, info.batch_size)
        if reduction == MEAN:
            ct = ct / ensure_batched(total_weight, in_dims[6], info.batch_size)
        if reduction != NONE:
            ct = ct.reshape(-1, *[1] * t_rank)
        met = _class_weights(info, weight, w_bdim, target, t_bdim, ignore_index)
        if weight is not None:
            ct = ct * met
        ct = ct.expand_as(met)
        flat = _with_n(info, x, x_bdim, rank)
        labels = _with_n(info, target, t_bdim, t_rank if has_n else 1)
        ct = ct.flatten(0, 1) if has_n else ct
        nothing = x.new_zeros([])
        out = op_backward(ct.contiguous(), flat, labels, None, NONE, ignore_index, nothing)
        return unfold(out, 0, info.batch_size) if has_n else out, 0


_register_nll(aten.nll_loss_forward.default, aten.nll_loss_backward.default, 2)
_register_nll(aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default, 4)


@batching_rule(aten.cross_entropy_loss.default)
def cross_entropy_loss(
    info: Any,
    in_dims: Any,
    x: Any,
    target: Any,
    weight: Any = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """[B, N, C, *S], [B, N, *S] -> [B]. Weights, and targets that are no labels, are decomposed."""
    x_bdim, t_bdim = in_dims[:2]
    rank = logical_rank(x, x_bdim)
    labels = logical_rank(target, t_bdim) == rank - 1 and not target.is_floating_point()
    if rank < 2 or not labels or weight is not None or label_smoothing:
        return NotImplemented
    size = info.batch_size
    target = fold(target, t_bdim, 0, size)
    out = aten.cross_entropy_loss(fold(x, x_bdim, 0, size), target, None, NONE, ignore_index)
    out = unfold(out, 0, size)
    if reduction == MEAN:  # over the labels that are not ignored
        kept = unfold(target != ignore_index, 0, size)
        return _reduce(out, SUM) / _reduce(kept, SUM), 0
    return _reduce(out, reduction), 0


@batching_rule(aten.multi_margin_loss.default)
def multi_margin_loss(
    info: Any,
    in_dims: Any,
    x: Any,
    target: Any,
    p: Any = 1,
    margin: Any = 1,
    weight: Any = None,
    reduction: int = MEAN,
) -> Any:
    """[B, N, C], [B, N], [B, C] -> [B]"""
    w_bdim = in_dims[4] if len(in_dims) > 4 else None
    has_n = logical_rank(x, in_dims[0]) == 2
    flat, labels = _rows(info, x, target, in_dims[:2])
    out = aten.multi_margin_loss(flat, labels, p, margin, None, NONE)
    out = unfold(out, 0, info.batch_size) if has_n else out
    if weight is not None:
        out = out * _class_weights(info, weight, w_bdim, *_labels(target, in_dims[1], out), -1)
    return _reduce(out, reduction), 0


@batching_rule(aten.multi_margin_loss_backward.default)
def multi_margin_loss_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    x: Any,
    target: Any,
    p: Any,
    margin: Any,
    weight: Any = None,
    reduction: int = MEAN,
) -> Any:
    """[B], [B, N, C], [B, N], [B, C] -> [B, N, C]"""
    w_bdim = in_dims[5] if len(in_dims) > 5 else None
    has_n = logical_rank(x, in_dims[1]) == 2
    flat, labels = _rows(info, x, target, in_dims[1:3])
    n = flat.shape[0] // max(info.batch_size, 1) if has_n else 1
    ct = ensure_batched(ct, in_dims[0], info.batch_size)
    if reduction != NONE:
        ct = (ct / n if reduction == MEAN else ct).reshape(-1, *[1] * has_n)
    ct = ct.expand(info.batch_size, n) if has_n else ct
    if weight is not None:
        ct = ct * _class_weights(info, weight, w_bdim, *_labels(target, in_dims[2], ct), -1)
    ct = ct.flatten()
    out = aten.multi_margin_loss_backward(ct, flat, labels, p, margin, None, NONE)
    if logical_rank(x, in_dims[1]) == 0:
        return out.squeeze(-1), 0
    return unfold(out, 0, info.batch_size) if has_n else out, 0


def _rows(info: Any, x: Any, target: Any, in_dims: Any) -> Any:
    """[B, N, C] and [B, N], or without N, as [rows, C] and [rows]."""
    x = at_least_1d(x, in_dims[0])
    flat = _with_n(info, x, in_dims[0], 2)
    return flat, ensure_batched(target, in_dims[1], info.batch_size).flatten()


def _labels(target: Any, t_bdim: Any, like: Any) -> Any:
    """Targets without N may have shape [1]: shaped like the unreduced loss [B, *N]."""
    if logical_rank(target, t_bdim) == logical_rank(like, 0):
        return target, t_bdim
    return batch_first(target, t_bdim).squeeze(-1), None if t_bdim is None else 0


@batching_rule(aten.multilabel_margin_loss_forward.default)
def multilabel_margin_loss_forward(
    info: Any, in_dims: Any, x: Any, target: Any, reduction: int
) -> Any:
    """[B, N, C], [B, N, C] -> [B], [B, N, C]"""
    has_n = logical_rank(x, in_dims[0]) == 2
    pairs = zip((x, target), in_dims[:2], strict=True)
    flat, labels = (_with_n(info, at_least_1d(v, d), d, 2) for v, d in pairs)
    out, is_target = aten.multilabel_margin_loss_forward(flat, labels, NONE)
    if has_n:
        out, is_target = unfold(out, 0, info.batch_size), unfold(is_target, 0, info.batch_size)
    if logical_rank(target, in_dims[1]) == 0:
        is_target = is_target.squeeze(-1)
    return (_reduce(out, reduction), is_target), (0, 0)


@batching_rule(aten.multilabel_margin_loss_backward.default)
def multilabel_margin_loss_backward(
    info: Any, in_dims: Any, ct: Any, x: Any, target: Any, reduction: int, is_target: Any
) -> Any:
    """[B], [B, N, C], [B, N, C], [B, N, C] -> [B, N, C]"""
    dims = (in_dims[1], in_dims[2], in_dims[4])
    has_n = logical_rank(x, in_dims[1]) == 2
    flat, labels, marks = (
        _with_n(info, at_least_1d(v, d), d, 2)
        for v, d in zip((x, target, is_target), dims, strict=True)
    )
    n = flat.shape[0] // max(info.batch_size, 1) if has_n else 1
    ct = ensure_batched(ct, in_dims[0], info.batch_size)
    if reduction != NONE:
        ct = (ct / n if reduction == MEAN else ct).reshape(-1, *[1] * has_n)
    ct = (ct.expand(info.batch_size, n) if has_n else ct).flatten()
    out = aten.multilabel_margin_loss_backward(ct, flat, labels, NONE, marks)
    if logical_rank(x, in_dims[1]) == 0:
        return out.squeeze(-1), 0
    return unfold(out, 0, info.batch_size) if has_n else out, 0


# -- ctc -------------------------------------------------------------------------------------------


def _ctc(info: Any, x: Any, targets: Any, lengths: Any, in_dims: Any) -> Any:
    """Log-probabilities [B, T, N, C], targets [B, N, S] or [B, sum] and lengths, with B in N."""
    size = info.batch_size
    x = fold(x, in_dims[0], 1, size)
    targets = fold(targets, in_dims[1], 0, size)
    lengths = [_fold_lengths(v, d, size) for v, d in zip(lengths, in_dims[2:4], strict=True)]
    return x, targets, *lengths


def _fold_lengths(lengths: Any, bdim: int | None, size: int) -> Any:
    """A list or [B, N]; [B] where the logical batch is one example whose length is a scalar."""
    if isinstance(lengths, (list, tuple)):
        return list(lengths) * size
    if logical_rank(lengths, bdim) == 0:
        lengths = lengths.unsqueeze(-1)
    return fold(lengths, bdim, 0, size)


@batching_rule(aten._ctc_loss.default, aten._ctc_loss.Tensor)
def _ctc_loss(
    info: Any,
    in_dims: Any,
    x: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
) -> Any:
    """[B, T, N, C], [B, N, S] -> [B, N], [B, N, T, 2 S + 1]"""
    folded = _ctc(info, x, targets, (input_lengths, target_lengths), in_dims[:4])
    outs = aten._ctc_loss(*folded, blank, zero_infinity)
    return tuple(unfold(out, 0, info.batch_size) for out in outs), 0


@batching_rule(aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor)
def _ctc_loss_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    x: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    loss: Any,
    log_alpha: Any,
    blank: int,
    zero_infinity: bool = False,
) -> Any:
    """[B, N], [B, T, N, C], [B, N, S] -> [B, T, N, C]"""
    size = info.batch_size
    folded = _ctc(info, x, targets, (input_lengths, target_lengths), in_dims[1:5])
    ct, loss, log_alpha = (
        fold(v, d, 0, size)
        for v, d in zip((ct, loss, log_alpha), (in_dims[0], *in_dims[5:7]), strict=True)
    )
    out = aten._ctc_loss_backward(ct, *folded, loss, log_alpha, blank, zero_infinity)
    return unfold(out, 1, size), 1
