"""Derivatives of ops that put tensors together, repeat, shift or pad them."""

from __future__ import annotations

import torch

from lamina.autodiff.declare import jvp_rule, linear, vjp_rule
from lamina.autodiff.shapes import in_dtype
from lamina_core.overloads import aten


def _repeat_ct(ct, x_shape, repeats):
    """[r0 * s0, r1 * s1, ..] -> [s0, s1, ..]: the copies are added."""
    shape, dims = [], []
    extra = len(repeats) - len(x_shape)
    for position, times in enumerate(repeats):
        if position < extra or times != 1:
            dims.append(len(shape))
            shape.append(times)
        if position >= extra:
            shape.append(x_shape[position - extra])
    return ct.reshape(shape).sum(dims) if dims else ct


linear(aten.diag_embed.default, lambda ct, offset, dim1, dim2: ct.diagonal(offset, dim1, dim2))
linear(aten.flip.default, lambda ct, dims: ct.flip(dims))
linear(aten.repeat.default, _repeat_ct)
linear(aten.roll.default, lambda ct, shifts, dims: ct.roll([-s for s in shifts], dims))
linear(aten.tril.default, lambda ct, diagonal: ct.tril(diagonal))
linear(aten.triu.default, lambda ct, diagonal: ct.triu(diagonal))


def _filled(tangents, tensors, dtype):
    """Tangents in one dtype, zeros in place of None."""
    return [
        torch.zeros_like(x, dtype=dtype) if t is None else t.to(dtype)
        for t, x in zip(tangents, tensors, strict=True)
    ]


@vjp_rule(aten.cat.default)
def cat_vjp(needs, tensors, dim=0):
    """[.., n, ..], [.., m, ..] -> [.., n + m, ..]; of any rank, [0] stands for an absent tensor."""
    out = aten.cat.default(tensors, dim)
    rank = out.dim()
    sizes = [x.shape[dim] if x.dim() == rank else 0 for x in tensors]
    return out, (dim, sizes, [(x.shape, x.dtype) for x in tensors]), _cat_pullback


def _cat_pullback(residuals, needs, ct):
    dim, sizes, kinds = residuals
    if ct is None:
        return [None] * len(sizes)
    found, start = [], 0
    for size, (shape, dtype), needed in zip(sizes, kinds, needs, strict=True):
        piece = None
        if needed:
            piece = ct.narrow(dim, start, size)
            piece = in_dtype(piece if piece.dim() == len(shape) else piece.reshape(shape), dtype)
        found.append(piece)
        start = start + size
    return found


@jvp_rule(aten.cat.default)
def cat_jvp(tangents, tensors, dim=0):
    """[.., n, ..], [.., m, ..] -> [.., n + m, ..]"""
    out = aten.cat.default(tensors, dim)
    return out, aten.cat.default(_filled(tangents, tensors, out.dtype), dim)


@vjp_rule(aten.stack.default)
def stack_vjp(needs, tensors, dim=0):
    """N times [*S] -> [.., n, ..]"""
    out = aten.stack.default(tensors, dim)
    return out, (dim, [x.dtype for x in tensors]), _stack_pullback


def _stack_pullback(residuals, needs, ct):
    dim, dtypes = residuals
    if ct is None:
        return [None] * len(dtypes)
    return [
        in_dtype(ct.select(dim, i), dtype) if needed else None
        for i, (dtype, needed) in enumerate(zip(dtypes, needs, strict=True))
    ]


@jvp_rule(aten.stack.default)
def stack_jvp(tangents, tensors, dim=0):
    """N times [*S] -> [.., n, ..]"""
    out = aten.stack.default(tensors, dim)
    return out, aten.stack.default(_filled(tangents, tensors, out.dtype), dim)


@vjp_rule(aten.constant_pad_nd.default)
def constant_pad_vjp(needs, x, pad, value=0):
    """[.., n] -> [.., n + pad[0] + pad[1]]; padding by a negative number crops."""
    return aten.constant_pad_nd.default(x, pad, value), ([-p for p in pad],), _constant_pad_pullback


def _constant_pad_pullback(residuals, needs, ct):
    (pad,) = residuals
    return (None if ct is None else aten.constant_pad_nd.default(ct, pad, 0),)


@jvp_rule(aten.constant_pad_nd.default)
def constant_pad_jvp(tangents, x, pad, value=0):
    """[.., n] -> [.., n + pad[0] + pad[1]]; the tangent of the padding is 0."""
    call = aten.constant_pad_nd.default
    return call(x, pad, value), call(tangents[0], pad, 0)
