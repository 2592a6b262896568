"""Derivatives of scans along a dim.

Those of cumprod and logcumsumexp are linear recurrences `r[i] = b[i] + a[i] r[i - 1]`. They are
solved by doubling, in log(n) steps of products and sums: no quotient, so right where a factor is 0,
and differentiable again.

# NOTE [Zero times overflow]
A product of many factors is split into two in a formula, and one part may overflow where the whole
does not: 0 times 1e200 times 1e200 is 0. `times` and `applied` multiply parts so that 0 is what
comes out. A formula may look at factors, but not at a tangent or cotangent, in which it is linear.
"""

from __future__ import annotations

import math

import torch

from lamina.autodiff.declare import jvp_rule, linear, vjp_rule
from lamina.autodiff.shapes import in_dtype
from lamina_core.overloads import aten

where = torch.where


def _delayed(x, dim, by, fill):
    """[.., n, ..] -> [.., n, ..]: x[i - by], with `fill` in front."""
    count = x.shape[dim]
    front = torch.full_like(x.narrow(dim, 0, min(by, count)), fill)
    return torch.cat([front, x.narrow(dim, 0, max(count - by, 0))], dim)


def times(x, y):
    """[*S], [*S] -> [*S]: x * y, and 0 of a 0 and a finite product that has overflowed."""
    if x.is_complex() or y.is_complex():
        return x * y
    most = torch.finfo(x.dtype).max
    return where(y == 0, x.clamp(-most, most), x) * where(x == 0, y.clamp(-most, most), y)


def applied(x, t):
    """[*S], [*S] -> [*S]: x * t, linear in t; infinite x are applied in two steps, 0 to a 0."""
    if x.is_complex() or t.is_complex():
        return x * t
    most = torch.finfo(x.dtype).max
    return x.clamp(-most, most) * t * torch.ones_like(x).masked_fill(x.isinf(), most)


def _held(x):
    """With room for a cotangent below the largest number."""
    most = torch.finfo(x.dtype).max * 1e-20 if not x.is_complex() else None
    return x if most is None else x.clamp(-most, most)


def _held_times(x, y):
    return _held(times(x, y))


def _solved(a, b, dim, product=torch.mul, apply=torch.mul):
    """The r with r[i] = b[i] + a[i] r[i - 1] and r[-1] = 0."""
    count, step = a.shape[dim], 1
    while step < count:
        b = b + apply(a, _delayed(b, dim, step, 0))
        a = product(a, _delayed(a, dim, step, 0))
        step *= 2
    return b


def _solved_backwards(a, b, dim, product=torch.mul, apply=torch.mul):
    """The r with r[i] = b[i] + a[i] r[i + 1] and r[n] = 0."""
    return _solved(a.flip(dim), b.flip(dim), dim, product, apply).flip(dim)


linear(aten.cumsum.default, lambda ct, dim: ct.flip(dim).cumsum(dim).flip(dim) if ct.dim() else ct)


# -- cumprod ---------------------------------------------------------------------------------------


@vjp_rule(aten.cumprod.default)
def cumprod_vjp(needs, x, dim, *, dtype=None):
    """[.., n, ..] -> [.., n, ..]"""
    return aten.cumprod.default(x, dim, dtype=dtype), (x, dim), _cumprod_pullback


def _cumprod_pullback(residuals, needs, ct):
    """The product of those before, times a recurrence over the factors behind."""
    x, dim = residuals
    if ct is None or x.dim() == 0 or x.numel() == 0:
        return (None if ct is None else in_dtype(ct, x.dtype),)
    wide = x.to(ct.dtype).conj()
    before = _delayed(wide, dim, 1, 1).cumprod(dim)
    behind = _delayed(wide.flip(dim), dim, 1, 0).flip(dim)
    found = _solved_backwards(behind, ct, dim, times, applied)
    # Where it is multiplied with 0 it must not overflow.
    held = _solved_backwards(_held(behind), ct, dim, _held_times)
    return (in_dtype(before * where(before == 0, held, found), x.dtype),)


@jvp_rule(aten.cumprod.default)
def cumprod_jvp(tangents, x, dim, *, dtype=None):
    """[.., n, ..] -> [.., n, ..]"""
    out = aten.cumprod.default(x, dim, dtype=dtype)
    t = tangents[0].to(out.dtype)
    if x.dim() == 0 or x.numel() == 0:
        return out, t
    return out, _solved(x.to(out.dtype), t * _delayed(out, dim, 1, 1), dim, times, applied)


# -- logcumsumexp ----------------------------------------------------------------------------------


def _ratios(x, out, dim):
    """exp(x[i] - out[i]) and exp(out[i - 1] - out[i]), neither above 1; 0 where all is -inf.

    Behind an infinity the sum does not change.
    """
    nothing = out.real == -math.inf if out.is_complex() else out == -math.inf
    own = (x - out).exp().masked_fill(nothing, 0.0)
    before = _delayed(out, dim, 1, -math.inf)
    gap = (before - out).masked_fill((before == out) & out.isinf(), 0.0)
    earlier = gap.exp().masked_fill(nothing, 0.0)
    return own, earlier


@vjp_rule(aten.logcumsumexp.default)
def logcumsumexp_vjp(needs, x, dim):
    """[.., n, ..] -> [.., n, ..]"""
    out = aten.logcumsumexp.default(x, dim)
    return out, (x, out, dim), _logcumsumexp_pullback


def _logcumsumexp_pullback(residuals, needs, ct):
    x, out, dim = residuals
    if ct is None or x.dim() == 0 or x.numel() == 0:
        return (ct,)
    own, earlier = _ratios(x, out, dim)
    later = _delayed(earlier.conj().flip(dim), dim, 1, 0).flip(dim)
    return (own.conj() * _solved_backwards(later, ct, dim),)


@jvp_rule(aten.logcumsumexp.default)
def logcumsumexp_jvp(tangents, x, dim):
    """[.., n, ..] -> [.., n, ..]"""
    out = aten.logcumsumexp.default(x, dim)
    if x.dim() == 0 or x.numel() == 0:
        return out, tangents[0]
    own, earlier = _ratios(x, out, dim)
    return out, _solved(earlier, tangents[0] * own, dim)
