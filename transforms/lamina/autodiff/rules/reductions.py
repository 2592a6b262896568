"""Derivatives of reductions.

A reduction that chooses elements and names no index (amax, max of all) shares a cotangent evenly
among ties; those that return an index (max over a dim, sort) are in `overwriting`.
"""

from __future__ import annotations

import math

import torch

from lamina.autodiff.declare import jvp_rule, linear, vjp_rule
from lamina.autodiff.rules.scans import applied, times
from lamina.autodiff.shapes import count_of, dims_of, in_dtype, keep_dims, restored
from lamina_core.overloads import aten

where = torch.where


def _mean_ct(ct, x_shape, dim, keepdim):
    return restored(ct / count_of(x_shape, dim), x_shape, dim, keepdim)


linear(aten.mean.default, lambda ct, x_shape: (ct / count_of(x_shape, None)).expand(x_shape))
linear(aten.mean.dim, _mean_ct)
linear(aten.sum.default, lambda ct, x_shape: ct.expand(x_shape))
linear(aten.sum.dim_IntList, restored)
linear(
    aten.trace.default,
    lambda ct, x_shape: aten.diagonal_backward(ct.expand(min(x_shape)), x_shape, 0, 0, 1),
)


# -- nansum, prod ----------------------------------------------------------------------------------


@vjp_rule(aten.nansum.default)
def nansum_vjp(needs, x, dim=None, keepdim=False, *, dtype=None):
    """[*S] -> [*S without dim]"""
    out = aten.nansum.default(x, dim, keepdim, dtype=dtype)
    return out, (x.isnan(), x.dtype, dim, keepdim), _nansum_pullback


def _nansum_pullback(residuals, needs, ct):
    skipped, dtype, dim, keepdim = residuals
    if ct is None:
        return (None,)
    return (in_dtype(restored(ct, skipped.shape, dim, keepdim).masked_fill(skipped, 0.0), dtype),)


@jvp_rule(aten.nansum.default)
def nansum_jvp(tangents, x, dim=None, keepdim=False, *, dtype=None):
    """[*S] -> [*S without dim]"""
    call = aten.nansum.default
    t = tangents[0].masked_fill(x.isnan(), 0.0)
    return call(x, dim, keepdim, dtype=dtype), t.sum(dim, keepdim, dtype=dtype)


def _without_each(x, dim):
    """The product of all others along dim, for each element: no quotient, so right at zeros."""
    if x.dim() == 0:
        return torch.ones_like(x)
    count = x.shape[dim]
    ones = torch.ones_like(x.narrow(dim, 0, min(count, 1)))
    if count < 2:
        return ones
    before = torch.cat([ones, x.narrow(dim, 0, count - 1)], dim).cumprod(dim)
    after = torch.cat([ones, x.flip(dim).narrow(dim, 0, count - 1)], dim).cumprod(dim)
    return times(before, after.flip(dim))


@vjp_rule(aten.prod.default)
def prod_vjp(needs, x, *, dtype=None):
    """[*S] -> []"""
    return aten.prod.default(x, dtype=dtype), (x,), _prod_pullback


def _prod_pullback(residuals, needs, ct):
    (x,) = residuals
    if ct is None:
        return (None,)
    rest = _without_each(x.to(ct.dtype).reshape(-1), 0).reshape(x.shape)
    return (in_dtype(ct * rest.conj(), x.dtype),)


@jvp_rule(aten.prod.default)
def prod_jvp(tangents, x, *, dtype=None):
    """[*S] -> []"""
    out = aten.prod.default(x, dtype=dtype)
    rest = _without_each(x.to(out.dtype).reshape(-1), 0)
    return out, applied(rest, tangents[0].reshape(-1)).sum().to(out.dtype)


@vjp_rule(aten.prod.dim_int)
def prod_dim_vjp(needs, x, dim, keepdim=False, *, dtype=None):
    """[*S] -> [*S without dim]"""
    out = aten.prod.dim_int(x, dim, keepdim, dtype=dtype)
    return out, (x, dim, keepdim), _prod_dim_pullback


def _prod_dim_pullback(residuals, needs, ct):
    x, dim, keepdim = residuals
    if ct is None:
        return (None,)
    rest = _without_each(x.to(ct.dtype), dim)
    return (in_dtype(keep_dims(ct, x.dim(), dim, keepdim) * rest.conj(), x.dtype),)


@jvp_rule(aten.prod.dim_int)
def prod_dim_jvp(tangents, x, dim, keepdim=False, *, dtype=None):
    """[*S] -> [*S without dim]"""
    out = aten.prod.dim_int(x, dim, keepdim, dtype=dtype)
    rest = _without_each(x.to(out.dtype), dim)
    return out, applied(rest, tangents[0]).sum(dim, keepdim).to(out.dtype)


# -- extrema ---------------------------------------------------------------------------------------


def _hits(x, out, dim, keepdim):
    """Which elements are the extremum, and how many. None is NaN, which torch divides by."""
    hit = x == keep_dims(out, x.dim(), dim, keepdim)
    return hit, hit.sum(dim, keepdim=True)


def _register_extremum(op, whole):
    """Rules of `op(x, dim, keepdim)`, or of `op(x)` where it is always over the whole tensor."""
    pullback = _whole_extremum_pullback if whole else _extremum_pullback

    @vjp_rule(op)
    def extremum_vjp(needs, x, dim=None, keepdim=False):
        """[*S] -> [*S without dim]; ties share evenly."""
        out = op(x) if whole else op(x, dim or [], keepdim)
        return out, (x, out, dims_of(x.dim(), dim), keepdim), pullback

    @jvp_rule(op)
    def extremum_jvp(tangents, x, dim=None, keepdim=False):
        """[*S] -> [*S without dim]; the mean of the tangents of ties."""
        out = op(x) if whole else op(x, dim or [], keepdim)
        dim = dims_of(x.dim(), dim)
        hit, count = _hits(x, out, dim, keepdim)
        return out, (where(hit, tangents[0], 0.0) / count).sum(dim, keepdim)


def _extremum_pullback(residuals, needs, ct):
    x, out, dim, keepdim = residuals
    if ct is None:
        return (None,)
    hit, count = _hits(x, out, dim, keepdim)
    return (keep_dims(ct, x.dim(), dim, keepdim) / count * hit,)


def _whole_extremum_pullback(residuals, needs, ct):
    """Here NaNs share the cotangent of a NaN, and the others get 0 of an infinite one."""
    x, out, _, _ = residuals
    if ct is None:
        return (None,)
    hit = (x == out) | (x.isnan() & out.isnan())
    return (where(hit, ct / hit.sum(), 0.0),)


for _op in (aten.amax.default, aten.amin.default):
    _register_extremum(_op, whole=False)
for _op in (aten.max.default, aten.median.default, aten.min.default, aten.nanmedian.default):
    _register_extremum(_op, whole=True)


# -- moments ---------------------------------------------------------------------------------------


def _deviation(x, dim, correction):
    """2 (x - mean) / (count - correction): the derivative of the variance."""
    dims = dims_of(x.dim(), dim)
    centred = x - x.mean(dims, keepdim=True)
    degrees = count_of(x.shape, dims) - (1 if correction is None else correction)
    if degrees > 0:
        return centred * (2.0 / degrees)
    return where(centred == 0, math.nan, math.inf).to(x.dtype)


def _variance_t(x, t, dim, correction, keepdim):
    slope = _deviation(x, dim, correction)
    term = (slope.conj() * t).real if x.is_complex() else slope * t
    return term.sum(dims_of(x.dim(), dim), keepdim)


def _variance_ct(ct, x, dim, correction, keepdim):
    return keep_dims(ct, x.dim(), dim, keepdim) * _deviation(x, dim, correction)


def _from_std(ct, out):
    """The cotangent of the variance; 0 where all values are equal, as its derivatives are."""
    flat = out == 0
    return (ct / (2 * out.masked_fill(flat, 1))).masked_fill(flat, 0.0)


@vjp_rule(aten.var.correction)
def var_vjp(needs, x, dim=None, *, correction=None, keepdim=False):
    """[*S] -> [*S without dim]; real for complex x."""
    out = aten.var.correction(x, dim, correction=correction, keepdim=keepdim)
    return out, (x, dim, correction, keepdim), _var_pullback


def _var_pullback(residuals, needs, ct):
    return (None if ct is None else _variance_ct(ct, *residuals),)


@jvp_rule(aten.var.correction)
def var_jvp(tangents, x, dim=None, *, correction=None, keepdim=False):
    """[*S] -> [*S without dim]"""
    out = aten.var.correction(x, dim, correction=correction, keepdim=keepdim)
    return out, _variance_t(x, tangents[0], dim, correction, keepdim)


@vjp_rule(aten.std.correction)
def std_vjp(needs, x, dim=None, *, correction=None, keepdim=False):
    """[*S] -> [*S without dim]; flat where all values are equal."""
    out = aten.std.correction(x, dim, correction=correction, keepdim=keepdim)
    return out, (x, out, dim, correction, keepdim), _std_pullback


def _std_pullback(residuals, needs, ct):
    x, out, dim, correction, keepdim = residuals
    if ct is None:
        return (None,)
    return (_variance_ct(_from_std(ct, out), x, dim, correction, keepdim),)


@jvp_rule(aten.std.correction)
def std_jvp(tangents, x, dim=None, *, correction=None, keepdim=False):
    """[*S] -> [*S without dim]"""
    out = aten.std.correction(x, dim, correction=correction, keepdim=keepdim)
    return out, _from_std(_variance_t(x, tangents[0], dim, correction, keepdim), out)


@vjp_rule(aten.var_mean.correction)
def var_mean_vjp(needs, x, dim=None, *, correction=None, keepdim=False):
    """[*S] -> ([*S without dim], [*S without dim])"""
    out = aten.var_mean.correction(x, dim, correction=correction, keepdim=keepdim)
    return out, (x, dim, correction, keepdim), _var_mean_pullback


def _var_mean_pullback(residuals, needs, var_ct, mean_ct):
    x, dim, _, keepdim = residuals
    x_ct = None if var_ct is None else _variance_ct(var_ct, *residuals)
    if mean_ct is not None:
        term = _mean_ct(mean_ct, x.shape, dim, keepdim)
        x_ct = term if x_ct is None else x_ct + term
    return (x_ct,)


@jvp_rule(aten.var_mean.correction)
def var_mean_jvp(tangents, x, dim=None, *, correction=None, keepdim=False):
    """[*S] -> ([*S without dim], [*S without dim])"""
    out = aten.var_mean.correction(x, dim, correction=correction, keepdim=keepdim)
    (t,) = tangents
    mean_t = t.mean(dims_of(x.dim(), dim), keepdim)
    return out, (_variance_t(x, t, dim, correction, keepdim), mean_t)


@vjp_rule(aten.std_mean.correction)
def std_mean_vjp(needs, x, dim=None, *, correction=None, keepdim=False):
    """[*S] -> ([*S without dim], [*S without dim])"""
    out = aten.std_mean.correction(x, dim, correction=correction, keepdim=keepdim)
    return out, (x, out[0], dim, correction, keepdim), _std_mean_pullback


def _std_mean_pullback(residuals, needs, std_ct, mean_ct):
    x, std, *options = residuals
    var_ct = None if std_ct is None else _from_std(std_ct, std)
    return _var_mean_pullback((x, *options), needs, var_ct, mean_ct)


@jvp_rule(aten.std_mean.correction)
def std_mean_jvp(tangents, x, dim=None, *, correction=None, keepdim=False):
    """[*S] -> ([*S without dim], [*S without dim])"""
    out = aten.std_mean.correction(x, dim, correction=correction, keepdim=keepdim)
    (t,) = tangents
    mean_t = t.mean(dims_of(x.dim(), dim), keepdim)
    return out, (_from_std(_variance_t(x, t, dim, correction, keepdim), out[0]), mean_t)


# -- logsumexp -------------------------------------------------------------------------------------


def _weights(x, out, dim, keepdim):
    return (x - keep_dims(out, x.dim(), dim, keepdim)).exp()


@vjp_rule(aten.logsumexp.default)
def logsumexp_vjp(needs, x, dim, keepdim=False):
    """[*S] -> [*S without dim]"""
    out = aten.logsumexp.default(x, dim, keepdim)
    return out, (x, out, dim, keepdim), _logsumexp_pullback


def _logsumexp_pullback(residuals, needs, ct):
    x, out, dim, keepdim = residuals
    if ct is None:
        return (None,)
    weights = _weights(x, out, dim, keepdim).conj()
    return (in_dtype(keep_dims(ct, x.dim(), dim, keepdim) * weights, x.dtype),)


@jvp_rule(aten.logsumexp.default)
def logsumexp_jvp(tangents, x, dim, keepdim=False):
    """[*S] -> [*S without dim]"""
    out = aten.logsumexp.default(x, dim, keepdim)
    term = tangents[0] * _weights(x, out, dim, keepdim)
    return out, term.sum(dims_of(x.dim(), dim), keepdim)
