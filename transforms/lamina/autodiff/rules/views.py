"""Derivatives of ops that only rearrange: views, and the ops that are their transposes.

All are linear; the transpose of a view puts the cotangent where the view looked. The machinery
knows which tensor is a view of which, so nothing here speaks of writes. Views that are sometimes
copies (contiguous, to) have no declaration: PyTorch decides by the strides which of the two they
are, and decomposes them.
"""

from __future__ import annotations

import torch

from lamina.autodiff.declare import jvp_rule, linear, unbroadcast, vjp_rule
from lamina_core.overloads import aten
from lamina_core.schema import resolved


def _permute_ct(ct, dims):
    rank = len(dims)
    inverse = [0] * rank
    for position, dim in enumerate(dims):
        inverse[dim % rank] = position
    return ct.permute(inverse)


def _narrow_ct(ct, x_shape, dim, start, length):
    places = (start + torch.arange(length, device=start.device)) % max(x_shape[dim], 1)
    return ct.new_zeros(x_shape).index_copy(dim, places, ct)


def _reshape_ct(ct, x_shape):
    return ct.reshape(x_shape)


def _slice_ct(ct, x_shape, dim, start, end, step):
    end = x_shape[dim] if end is None else end
    return aten.slice_backward.default(ct, x_shape, dim, 0 if start is None else start, end, step)


def _squeeze_dim_ct(ct, x_shape, dim):
    return ct.unsqueeze(dim) if x_shape and x_shape[dim] == 1 else ct


# -- shapes ----------------------------------------------------------------------------------------

linear(aten._reshape_alias.default, _reshape_ct)
linear(aten._unsafe_view.default, _reshape_ct)
linear(aten.alias.default, lambda ct: ct)
linear(aten.expand.default, lambda ct, x_shape: unbroadcast(ct, x_shape))
linear(aten.expand_as.default, lambda ct, x_shape: unbroadcast(ct, x_shape))
linear(aten.flatten.using_ints, _reshape_ct)
linear(aten.squeeze.default, _reshape_ct)
linear(aten.squeeze.dim, _squeeze_dim_ct)
linear(aten.squeeze.dims, _reshape_ct)
linear(aten.unflatten.int, _reshape_ct)
linear(aten.unsqueeze.default, lambda ct, dim: ct.squeeze(dim))
linear(aten.reshape.default, _reshape_ct)
linear(aten.view.default, _reshape_ct)
linear(aten.view_as.default, _reshape_ct)

# -- order of the dims -----------------------------------------------------------------------------

linear(aten.mT.default, lambda ct: ct.mT)
linear(aten.movedim.int, lambda ct, source, destination: ct.movedim(destination, source))
linear(aten.movedim.intlist, lambda ct, source, destination: ct.movedim(destination, source))
linear(aten.numpy_T.default, lambda ct: ct.permute(tuple(range(ct.dim()))[::-1]))
linear(aten.permute.default, _permute_ct)
linear(aten.t.default, lambda ct: ct.t())
linear(aten.transpose.int, lambda ct, dim0, dim1: ct.transpose(dim0, dim1))

# -- parts, and their transposes -------------------------------------------------------------------

linear(
    aten.diagonal.default,
    lambda ct, x_shape, offset, dim1, dim2: aten.diagonal_backward.default(
        ct, x_shape, offset, dim1, dim2
    ),
)
linear(
    aten.diagonal_backward.default,
    lambda ct, offset, dim1, dim2: ct.diagonal(offset, dim1, dim2),
)
linear(aten.narrow.Tensor, _narrow_ct)
linear(
    aten.select.int,
    lambda ct, x_shape, dim, index: aten.select_backward.default(ct, x_shape, dim, index),
)
linear(aten.select_backward.default, lambda ct, dim, index: ct.select(dim, index))
linear(aten.slice.Tensor, _slice_ct)
linear(
    aten.slice_backward.default,
    lambda ct, dim, start, end, step: aten.slice.Tensor(ct, dim, start, end, step),
)
linear(
    aten.unfold.default,
    lambda ct, x_shape, dimension, size, step: aten.unfold_backward.default(
        ct, x_shape, dimension, size, step
    ),
)
linear(
    aten.unfold_backward.default,  # its operand broadcasts
    lambda ct, x_shape, dim, size, step: unbroadcast(ct.unfold(dim, size, step), x_shape),
)

# -- complex numbers and their parts ---------------------------------------------------------------

linear(aten._conj.default, lambda ct: ct.conj())
linear(aten._conj_physical.default, lambda ct: ct.conj())
linear(aten._neg_view.default, lambda ct: -ct)
linear(aten.conj.default, lambda ct: ct.conj())
linear(aten.imag.default, lambda ct: ct * 1j)
linear(aten.real.default, lambda ct: ct)  # the machinery makes it complex again
linear(aten.view_as_complex.default, lambda ct: torch.view_as_real(resolved(ct)))
linear(aten.view_as_real.default, lambda ct: torch.view_as_complex(ct.contiguous()))


# -- several views at once -------------------------------------------------------------------------


def _or_zeros(cts, shapes):
    """The cotangents, zeros in place of None; None if all are zero."""
    like = next((ct for ct in cts if ct is not None), None)
    if like is None:
        return None
    return [like.new_zeros(s) if ct is None else ct for ct, s in zip(cts, shapes, strict=True)]


def _pieces_pullback(residuals, needs, *cts):
    """The pieces side by side again."""
    dim, shapes = residuals
    filled = _or_zeros(cts, shapes)
    return (None if filled is None else torch.cat(filled, dim),)


def _unbind_pullback(residuals, needs, *cts):
    dim, shape = residuals
    filled = _or_zeros(cts, [shape] * len(cts))
    return (None if filled is None else torch.stack(filled, dim),)


@vjp_rule(aten.split.Tensor, aten.unsafe_split.Tensor)
def split_vjp(needs, x, split_size, dim=0):
    """[.., n, ..] -> [.., size, ..], ..."""
    out = aten.split.Tensor(x, split_size, dim)
    return out, (dim, [piece.shape for piece in out]), _pieces_pullback


@jvp_rule(aten.split.Tensor, aten.unsafe_split.Tensor)
def split_jvp(tangents, x, split_size, dim=0):
    """[.., n, ..] -> [.., size, ..], ..."""
    call = aten.split.Tensor
    return call(x, split_size, dim), call(tangents[0], split_size, dim)


@vjp_rule(aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default)
def split_with_sizes_vjp(needs, x, split_sizes, dim=0):
    """[.., n, ..] -> [.., size, ..], ..."""
    out = aten.split_with_sizes.default(x, split_sizes, dim)
    return out, (dim, [piece.shape for piece in out]), _pieces_pullback


@jvp_rule(aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default)
def split_with_sizes_jvp(tangents, x, split_sizes, dim=0):
    """[.., n, ..] -> [.., size, ..], ..."""
    call = aten.split_with_sizes.default
    return call(x, split_sizes, dim), call(tangents[0], split_sizes, dim)


@vjp_rule(aten.unbind.int)
def unbind_vjp(needs, x, dim=0):
    """[.., n, ..] -> n times [.., ..]"""
    out = aten.unbind.int(x, dim)
    shape = out[0].shape if out else ()
    return out, (dim, shape), _unbind_pullback


@jvp_rule(aten.unbind.int)
def unbind_jvp(tangents, x, dim=0):
    """[.., n, ..] -> n times [.., ..]"""
    return aten.unbind.int(x, dim), aten.unbind.int(tangents[0], dim)
