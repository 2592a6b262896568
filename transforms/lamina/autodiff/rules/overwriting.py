"""Derivatives of ops that overwrite a region or a mask, and of those that select by value.

The regions are the ones that views look at; in-place writes through views end here.
"""

from __future__ import annotations

import torch

from lamina.autodiff.declare import jvp_rule, unbroadcast, vjp_rule
from lamina.autodiff.outside import whole
from lamina.autodiff.shapes import in_dtype
from lamina_core.dispatch import copied, followed
from lamina_core.overloads import aten

where = torch.where


# -- regions ---------------------------------------------------------------------------------------


def _is_complex(args):
    """Whether PyTorch refuses to differentiate: of complex values it has not been asked for all."""
    return any(arg.is_complex() for arg in args[:2])


def _register_region(op, view):
    """Rules of `op(x, src, *where)`, which overwrites what `view(x, *where)` looks at."""

    @whole(op, when=_is_complex)
    @vjp_rule(op)
    def region_vjp(needs, x, src, *args, **kwargs):
        """[*S], [*view of S] -> [*S]"""
        out = followed(op, x, src, *args, **kwargs)
        return out, (op, view, src.dtype, args, kwargs), _region_pullback

    @jvp_rule(op)
    def region_jvp(tangents, x, src, *args, **kwargs):
        """[*S], [*view of S] -> [*S]"""
        x_t, src_t = tangents
        x_t = torch.zeros_like(x) if x_t is None else x_t
        src_t = torch.zeros_like(src) if src_t is None else src_t
        out = followed(op, x, src, *args, **kwargs)
        return out, followed(op, x_t, src_t, *args, **kwargs)


def _region_pullback(residuals, needs, ct):
    op, view, dtype, args, kwargs = residuals
    if ct is None:
        return None, None
    region = view(ct, *args, **kwargs)
    x_ct = None
    if needs[0]:
        x_ct = followed(op, ct, torch.zeros_like(region), *args, **kwargs)
    return x_ct, in_dtype(region, dtype) if needs[1] else None


_register_region(aten.diagonal_scatter.default, aten.diagonal.default)
_register_region(aten.select_scatter.default, aten.select.int)
_register_region(aten.slice_scatter.default, aten.slice.Tensor)


@vjp_rule(aten.copy.default)
def copy_vjp(needs, x, src, non_blocking=False):
    """[*S], [broadcast to S] -> [*S]; x gives the shape, dtype and device only."""
    out = copied(x, src, non_blocking)
    if not needs[1]:
        return out, (), None
    return out, (src.shape, src.dtype, src.device), _copy_pullback


def _copy_pullback(residuals, needs, ct):
    shape, dtype, device = residuals
    if ct is None:
        return None, None
    ct = in_dtype(unbroadcast(ct, shape), dtype)
    return None, ct if ct.device == device else ct.to(device)


@jvp_rule(aten.copy.default)
def copy_jvp(tangents, x, src, non_blocking=False):
    """[*S], [broadcast to S] -> [*S]"""
    out = copied(x, src, non_blocking)
    if tangents[1] is None:
        return out, None
    return out, copied(x, tangents[1], non_blocking)


@vjp_rule(aten.fill.Tensor)
def fill_vjp(needs, x, value):
    """[*S], [] -> [*S]; x gives the shape and dtype only."""
    out = aten.fill.Tensor(x, value)
    return (out, (value.dtype,), _fill_pullback) if needs[1] else (out, (), None)


def _fill_pullback(residuals, needs, ct):
    (dtype,) = residuals
    return None, None if ct is None else in_dtype(ct.sum(), dtype)


@jvp_rule(aten.fill.Tensor)
def fill_jvp(tangents, x, value):
    """[*S], [] -> [*S]"""
    out = aten.fill.Tensor(x, value)
    return out, None if tangents[1] is None else aten.fill.Tensor(x, tangents[1])


# -- masks -----------------------------------------------------------------------------------------


@vjp_rule(aten.masked_scatter.default)
def masked_scatter_vjp(needs, x, mask, source):
    """[*S], [*S], [at least as many as the mask chooses] -> [*S]"""
    out = aten.masked_scatter.default(x, mask, source)
    return out, (x.shape, mask, source.shape), _masked_scatter_pullback


def _masked_scatter_pullback(residuals, needs, ct):
    """The n-th element chosen got the n-th of the source: a running count says which."""
    x_shape, mask, shape = residuals
    if ct is None:
        return None, None, None
    x_ct = unbroadcast(ct.masked_fill(mask, 0.0), x_shape) if needs[0] else None
    source_ct = None
    if needs[2]:
        flat = mask.expand(ct.shape).reshape(-1)
        taken = where(flat, ct.reshape(-1), 0.0)
        place = (flat.cumsum(0) - 1).clamp(min=0)
        # The source may be shorter than the mask is long.
        source_ct = ct.new_zeros(max(shape.numel(), 1)).index_add(0, place, taken)
        source_ct = source_ct.narrow(0, 0, shape.numel()).reshape(shape)
    return x_ct, None, source_ct


@jvp_rule(aten.masked_scatter.default)
def masked_scatter_jvp(tangents, x, mask, source):
    """[*S], [*S], [at least as many as the mask chooses] -> [*S]"""
    out = aten.masked_scatter.default(x, mask, source)
    x_t = torch.zeros_like(x) if tangents[0] is None else tangents[0]
    source_t = torch.zeros_like(source) if tangents[2] is None else tangents[2]
    return out, aten.masked_scatter.default(x_t, mask, source_t)


# -- values with their indices ---------------------------------------------------------------------


def _read(t, indices, dim, keepdim):
    """What a reduction that returned `indices` chose."""
    if keepdim or t.dim() == 0:
        return t.gather(dim, indices)
    return t.gather(dim, indices.unsqueeze(dim)).squeeze(dim)


def _selection_pullback(residuals, needs, values_ct, indices_ct=None):
    indices, shape, dim, keepdim = residuals
    if values_ct is None:
        return (None,)
    if not keepdim and len(shape):
        values_ct, indices = values_ct.unsqueeze(dim), indices.unsqueeze(dim)
    return (values_ct.new_zeros(shape).scatter_add(dim, indices, values_ct),)


def _register_reduction(op, dim_at):
    """Rules of a reduction over one dim that returns (values, indices)."""

    def place(args, kwargs):
        dim = args[dim_at] if len(args) > dim_at else kwargs.get("dim", -1)
        keepdim = args[dim_at + 1] if len(args) > dim_at + 1 else kwargs.get("keepdim", False)
        return dim, keepdim

    @vjp_rule(op)
    def reduction_vjp(needs, x, *args, **kwargs):
        """[.., n, ..] -> ([.., ..], [.., ..])"""
        out = op(x, *args, **kwargs)
        return out, (out[1], x.shape, *place(args, kwargs)), _selection_pullback

    @jvp_rule(op)
    def reduction_jvp(tangents, x, *args, **kwargs):
        """[.., n, ..] -> ([.., ..], [.., ..])"""
        out = op(x, *args, **kwargs)
        return out, (_read(tangents[0], out[1], *place(args, kwargs)), None)


_register_reduction(aten.kthvalue.default, 1)
_register_reduction(aten.max.dim, 0)
_register_reduction(aten.median.dim, 0)
_register_reduction(aten.min.dim, 0)
_register_reduction(aten.mode.default, 0)
_register_reduction(aten.nanmedian.dim, 0)


def _register_ordering(op, dim_at):
    """Rules of an op that puts elements along one dim in an order: (values, indices)."""

    def place(args, kwargs):
        return args[dim_at] if len(args) > dim_at else kwargs.get("dim", -1)

    @vjp_rule(op)
    def ordering_vjp(needs, x, *args, **kwargs):
        """[.., n, ..] -> ([.., k, ..], [.., k, ..])"""
        out = op(x, *args, **kwargs)
        return out, (out[1], x.shape, place(args, kwargs), True), _selection_pullback

    @jvp_rule(op)
    def ordering_jvp(tangents, x, *args, **kwargs):
        """[.., n, ..] -> ([.., k, ..], [.., k, ..])"""
        out = op(x, *args, **kwargs)
        return out, (tangents[0].gather(place(args, kwargs), out[1]), None)


_register_ordering(aten.cummax.default, 0)
_register_ordering(aten.cummin.default, 0)
_register_ordering(aten.sort.default, 0)
_register_ordering(aten.sort.stable, 0)  # its dim is a keyword
_register_ordering(aten.topk.default, 1)
