"""Derivatives of the reductions by index: `scatter_reduce`, `index_reduce`, `segment_reduce`.

An element of the result reduces a group: the element of `x` at its place and the elements of `src`
that are sent there. Without `include_self` a place that anything is sent to starts from the
identity of the reduction. Segments borrow PyTorch's formula, and its backward is taken apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from lamina.autodiff.declare import decomposition, vjp_rule
from lamina_core.overloads import aten

where = torch.where


@vjp_rule(aten.index_reduce.default)
def index_reduce_vjp(
    needs: Any, x: Any, dim: int, index: Any, source: Any, reduce: str, *, include_self: bool = True
) -> Any:
    """[.., n, ..], index [k], source [.., k, ..] -> [.., n, ..]"""
    out = aten.index_reduce.default(x, dim, index, source, reduce, include_self=include_self)
    shape = [1] * source.dim()
    if shape:
        shape[dim] = -1
    places = index.reshape(shape).expand(source.shape)
    residuals = (out, x, dim, places, source, reduce, include_self)
    return out, residuals, _by_index_pullback


@vjp_rule(aten.scatter_reduce.two)
def scatter_reduce_vjp(
    needs: Any, x: Any, dim: int, index: Any, src: Any, reduce: str, *, include_self: bool = True
) -> Any:
    """[.., n, ..], index [.., k, ..] -> [.., n, ..]; src is at least as large as the index."""
    out = aten.scatter_reduce.two(x, dim, index, src, reduce, include_self=include_self)
    residuals = (out, x, dim, index, src, reduce, include_self)
    return out, residuals, _by_index_pullback


def _by_index_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    out, x, dim, index, src, reduce, include_self = residuals
    if ct is None:
        return None, None, None
    shape = src.shape
    if src.dim() != index.dim():  # what has no dims is a vector of one element
        src, index = src.reshape(shape or (1,)), index.reshape(index.shape or (1,))
    whole = src.shape
    for d, size in enumerate(index.shape):
        src = src.narrow(d, 0, size)
    x_ct, src_ct = _PULLBACKS[reduce](ct, out, x, dim, index, src, include_self)
    if not include_self:
        x_ct = x_ct.scatter(dim, index, 0)
    if src_ct.shape != whole:
        rest = [whole[d] - index.shape[d] for d in reversed(range(len(whole)))]
        src_ct = pad(src_ct, [n for size in rest for n in (0, size)])
    return x_ct if needs[0] else None, None, src_ct.reshape(shape) if needs[2] else None


def _sum_pullback(
    ct: Any, out: Any, x: Any, dim: int, index: Any, src: Any, include_self: bool
) -> Any:
    return ct, ct.gather(dim, index)


def _mean_pullback(
    ct: Any, out: Any, x: Any, dim: int, index: Any, src: Any, include_self: bool
) -> Any:
    count = torch.ones_like(ct)
    if not include_self:
        count = count.scatter(dim, index, 0)
    count = count.scatter_add(dim, index, torch.ones_like(src)).clamp(min=1)
    ct = ct / count
    return ct, ct.gather(dim, index)


def _extremum_pullback(
    ct: Any, out: Any, x: Any, dim: int, index: Any, src: Any, include_self: bool
) -> Any:
    """Equal elements share the cotangent."""
    x_hit = (x == out).to(ct.dtype)
    if not include_self:
        x_hit = x_hit.scatter(dim, index, 0)
    src_hit = (src == out.gather(dim, index)).to(ct.dtype)
    count = x_hit.scatter_add(dim, index, src_hit)
    # The initial value of a segment may be what none of its elements is; where it is NaN, so is ct.
    share = ct / count.masked_fill((count == 0) & (out == out), 1)
    return x_hit * share, src_hit * share.gather(dim, index)


def _product_pullback(
    ct: Any, out: Any, x: Any, dim: int, index: Any, src: Any, include_self: bool
) -> Any:
    """Each element gets the product of the others in its group.

    Zeros cannot be divided out: one alone in its group gets the product of the rest, one of two
    the rest times the other. With that the second derivative is right as well.
    """
    start = x if include_self else x.scatter(dim, index, 1)
    x_zero, src_zero = start == 0, src == 0
    zeros = x_zero.to(index.dtype).scatter_add(dim, index, src_zero.to(index.dtype))
    total = where(x_zero, start, 0).scatter_add(dim, index, where(src_zero, src, 0))
    rest = aten.scatter_reduce.two(
        where(x_zero, 1, start), dim, index, where(src_zero, 1, src), "prod"
    )

    def others(t: Any, zero: Any, take: Any) -> Any:
        count = take(zeros)
        of_two = where(count == 2, take(rest) * (take(total) - t), 0)
        of_zero = where(count == 1, take(rest), of_two)
        product = where(zero, of_zero, take(out) / where(zero, 1, t))
        return product.conj() if product.is_complex() else product

    def gathered(t: Any) -> Any:
        return t.gather(dim, index)

    x_ct = ct * others(start, x_zero, lambda t: t)
    return x_ct, gathered(ct) * others(src, src_zero, gathered)


_PULLBACKS = {
    "amax": _extremum_pullback,
    "amin": _extremum_pullback,
    "mean": _mean_pullback,
    "prod": _product_pullback,
    "sum": _sum_pullback,
}


# -- segments --------------------------------------------------------------------------------------


@decomposition(aten._segment_reduce_backward.default)
def segment_reduce_backward(
    grad: Any,
    output: Any,
    data: Any,
    reduce: str,
    *,
    lengths: Any = None,
    offsets: Any = None,
    axis: int = 0,
    initial: Any = None,
) -> Any:
    """Twice [*B, S, *R], [*B, n, *R], lengths [*B, S] or offsets [*B, S + 1] -> [*B, n, *R]"""
    edges = pad(lengths.cumsum(-1), (1, 0)) if offsets is None else offsets
    count = output.shape[axis]
    places = torch.arange(data.shape[axis], device=data.device).unsqueeze(-1)
    index = (places >= edges.unsqueeze(-2)).sum(-1) - 1
    # What is in no segment goes to one more, which is given no cotangent.
    index = where(index < 0, count, index)
    rest = [1] * (data.dim() - index.dim())
    index = index.reshape((*index.shape, *rest)).expand(data.shape)
    room = [0, 0] * len(rest) + [0, 1]
    ct, out = pad(grad, room), pad(output, room)
    start = torch.full_like(out, 1 if initial is None else initial)
    # Only of a product is the start a factor of the derivative.
    with_start = reduce == "prod"
    return _PULLBACKS[_AS_SCATTER.get(reduce, reduce)](
        ct, out, start, axis, index, data, with_start
    )[1]


_AS_SCATTER = {"max": "amax", "min": "amin"}
