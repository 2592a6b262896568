"""Derivatives of the p-norms of vectors, and of what is scaled to a norm.

The subgradient at the zero vector is 0.
"""

from __future__ import annotations

import math

import torch

from lamina.autodiff.declare import decomposition, jvp_rule, vjp_rule
from lamina.autodiff.shapes import dims_of, in_dtype, keep_dims
from lamina_core.overloads import aten

where = torch.where


def _slope(x, out, p, dim):
    """d|x|_p / dx with `out` = |x|_p, both with all dims, in the dtype of x."""
    if p == 1:
        return x.sgn()
    zero = out == 0
    if p == 2:  # masked on both sides: where the quotient is not read, it has to be finite
        return (x / out.masked_fill(zero, 1)).masked_fill(zero, 0)
    size = x.abs()
    if math.isinf(p):
        hit = ((size == out) | (size.isnan() & out.isnan())).to(size.dtype)
        return x.sgn() * (hit / hit.sum(dim, keepdim=True) if x.dim() else hit)
    if p < 1:  # with p below 0 one element of 0 is enough for a norm of 0, which is flat
        size = size.masked_fill(size == 0, 1)
        share = size.masked_fill(zero, 1) / out.masked_fill(zero, 1)
        return (x.sgn() * share.pow(p - 1)).masked_fill(zero, 0)
    # sgn is 0 where what it is multiplied with is masked.
    share = size.masked_fill(zero, 1) / out.masked_fill(zero, 1)
    return x.sgn() * share.pow(p - 1)


def _pull(ct, x, out, p, dim, keepdim):
    if p == 0:
        return torch.zeros_like(x)  # also of an infinite cotangent
    rank, dims = x.dim(), dims_of(x.dim(), dim)
    full = keep_dims(out, rank, dims, keepdim)
    wide = x if x.dtype.itemsize >= full.dtype.itemsize else x.to(full.to(x.dtype).dtype)
    ct = keep_dims(ct, rank, dims, keepdim)
    if p > 1 and p != 2 and not math.isinf(p):
        ct = ct.masked_fill(full == 0, 0)  # then also an infinite one is 0, as in torch
    return in_dtype(ct * _slope(wide, full, p, dims), x.dtype)


def _push(t, x, out, p, dim, keepdim):
    if p == 0:
        return torch.zeros_like(out)
    dims = dims_of(x.dim(), dim)
    slope = _slope(x, keep_dims(out, x.dim(), dims, keepdim), p, dims)
    term = (slope.conj() * t).real if x.is_complex() else slope * t
    return term.sum(dims, keepdim).to(out.dtype)


def _norm_pullback(residuals, needs, ct):
    return (None if ct is None else _pull(ct, *residuals),)


@vjp_rule(aten.linalg_vector_norm.default)
def vector_norm_vjp(needs, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    """[*S] -> [*S without dim]; real for complex x."""
    out = aten.linalg_vector_norm.default(x, ord, dim, keepdim, dtype=dtype)
    return out, (x, out, ord, dim, keepdim), _norm_pullback


@jvp_rule(aten.linalg_vector_norm.default)
def vector_norm_jvp(tangents, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    """[*S] -> [*S without dim]"""
    out = aten.linalg_vector_norm.default(x, ord, dim, keepdim, dtype=dtype)
    return out, _push(tangents[0], x, out, ord, dim, keepdim)


@vjp_rule(aten.norm.Scalar)
def norm_vjp(needs, x, p=2):
    """[*S] -> []"""
    out = aten.norm.Scalar(x, p)
    return out, (x, out, p, None, False), _norm_pullback


@jvp_rule(aten.norm.Scalar)
def norm_jvp(tangents, x, p=2):
    """[*S] -> []"""
    out = aten.norm.Scalar(x, p)
    return out, _push(tangents[0], x, out, p, None, False)


@vjp_rule(aten.norm.ScalarOpt_dim)
def norm_dim_vjp(needs, x, p, dim, keepdim=False):
    """[*S] -> [*S without dim]"""
    out = aten.norm.ScalarOpt_dim(x, p, dim, keepdim)
    return out, (x, out, 2 if p is None else p, dim, keepdim), _norm_pullback


@jvp_rule(aten.norm.ScalarOpt_dim)
def norm_dim_jvp(tangents, x, p, dim, keepdim=False):
    """[*S] -> [*S without dim]"""
    out = aten.norm.ScalarOpt_dim(x, p, dim, keepdim)
    return out, _push(tangents[0], x, out, 2 if p is None else p, dim, keepdim)


@decomposition(aten.dist.default)
def dist(self, other, p=2):
    """Two tensors that broadcast -> []"""
    return torch.linalg.vector_norm(self - other, p)


@decomposition(aten.renorm.default)
def renorm(self, p, dim, maxnorm):
    """[*S] -> [*S], each slice along dim scaled down to a norm; PyTorch's factor, with its 1e-7."""
    if maxnorm == 0:
        return self * 0
    others = [d for d in range(self.dim()) if d != dim % self.dim()]
    wide = torch.float32 if self.dtype.itemsize < 4 else None

    def norms(x):
        return torch.linalg.vector_norm(x, p, others, keepdim=True, dtype=wide)

    large = norms(self.detach()) > maxnorm
    # A slice that stays may have a norm without derivative, or a NaN: nothing of it may come near.
    safe = where(large, self, 1.0)
    return where(large, safe * (maxnorm / (norms(safe) + 1e-7)).to(self.dtype), self)


@decomposition(aten._weight_norm_interface.default)
def weight_norm(v, g, dim=0):
    """[*S], g [1 but for S[dim]] -> [*S], norms like g; PyTorch is wrong at second order."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    norms = torch.linalg.vector_norm(v, 2, others, keepdim=True)
    return v * (g / norms).to(v.dtype), norms.to(g.dtype)
