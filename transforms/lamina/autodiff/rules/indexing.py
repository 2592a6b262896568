"""Derivatives of ops that read or overwrite parts chosen by indices or masks.

Reading is linear and its transpose adds into zeros. Overwriting cuts the cotangent of what was
overwritten and reads that of the new values. Operands come in the order tensors, then lists of
tensors: `index_put` has (self, values, *indices).
"""

from __future__ import annotations

import torch

from lamina.autodiff.declare import jvp_rule, linear, unbroadcast, vjp_rule
from lamina_core.overloads import aten

where = torch.where


def _joint(op):
    """A forward rule for an op linear in two operands jointly: an absent tangent is zeros."""

    def joint_jvp(tangents, *args, **kwargs):
        places = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        swapped = list(args)
        for place, tangent in zip(places, tangents, strict=False):
            if args[place].is_floating_point() or args[place].is_complex():
                swapped[place] = torch.zeros_like(args[place]) if tangent is None else tangent
        return op(*args, **kwargs), op(*swapped, **kwargs)

    jvp_rule(op)(joint_jvp)


def _no_cts(needs):
    return [None] * len(needs)


# -- reading ---------------------------------------------------------------------------------------

linear(
    aten.gather.default,
    lambda ct, x_shape, dim, index: ct.new_zeros(x_shape).scatter_add(dim, index, ct),
)
linear(
    aten.index_select.default,
    lambda ct, x_shape, dim, index: ct.new_zeros(x_shape).index_add(dim, index, ct),
)
linear(
    aten.masked_select.default,
    lambda ct, x_shape, mask: unbroadcast(
        ct.new_zeros(torch.broadcast_shapes(x_shape, mask.shape)).masked_scatter(mask, ct), x_shape
    ),
)
linear(
    aten.take.default,
    lambda ct, x_shape, index: ct.new_zeros(x_shape).put(index, ct, accumulate=True),
)


def _index_vjp(op):
    def index_vjp(needs, x, indices):
        """[*S] -> [*S with the indexed dims replaced by those of the indices]"""
        return op(x, indices), (x.shape, *indices), _index_pullback

    return index_vjp


def _index_pullback(residuals, needs, ct):
    """A mask chooses an element once, so only whole numbers have to add up."""
    shape, *indices = residuals
    if ct is None:
        return _no_cts(needs)
    repeats = any(i is not None and i.dtype not in (torch.bool, torch.uint8) for i in indices)
    x_ct = aten.index_put.default(ct.new_zeros(shape), indices, ct, repeats)
    return [x_ct, *[None] * len(indices)]


def _index_jvp(op):
    def index_jvp(tangents, x, indices):
        """[*S] -> [*S with the indexed dims replaced by those of the indices]"""
        return op(x, indices), op(tangents[0], indices)

    return index_jvp


for _op in (aten.index.Tensor, aten._unsafe_index.Tensor):
    vjp_rule(_op)(_index_vjp(_op))
    jvp_rule(_op)(_index_jvp(_op))


# -- writing by index ------------------------------------------------------------------------------


def _index_put_vjp(op):
    def index_put_vjp(needs, x, indices, values, accumulate=False, *rest):
        """[*S], values -> [*S]"""
        out = op(x, indices, values, accumulate, *rest)
        return out, (accumulate, values.shape, values.dtype, *indices), _index_put_pullback

    return index_put_vjp


def _index_put_pullback(residuals, needs, ct):
    accumulate, shape, dtype, *indices = residuals
    if ct is None:
        return _no_cts(needs)
    x_ct = values_ct = None
    if needs[0]:
        x_ct = ct if accumulate else aten.index_put.default(ct, indices, ct.new_zeros(()))
    if needs[1]:
        values_ct = unbroadcast(aten.index.Tensor(ct, indices), shape).to(dtype)
    return [x_ct, values_ct, *[None] * len(indices)]


def _index_put_jvp(op):
    def index_put_jvp(tangents, x, indices, values, accumulate=False, *rest):
        """[*S], values -> [*S]"""
        x_t = torch.zeros_like(x) if tangents[0] is None else tangents[0]
        values_t = torch.zeros_like(values) if tangents[1] is None else tangents[1]
        out = op(x, indices, values, accumulate, *rest)
        return out, op(x_t, indices, values_t, accumulate, *rest)

    return index_put_jvp


for _op in (
    aten.index_put.default,
    aten._index_put_impl.default,
    aten._unsafe_index_put.default,
):
    vjp_rule(_op)(_index_put_vjp(_op))
    jvp_rule(_op)(_index_put_jvp(_op))


@vjp_rule(aten.index_add.default)
def index_add_vjp(needs, x, dim, index, source, *, alpha=1):
    """[.., n, ..], [k], [.., k, ..] -> [.., n, ..]"""
    out = aten.index_add.default(x, dim, index, source, alpha=alpha)
    return out, (dim, index if needs[2] else None, source.shape, alpha), _index_add_pullback


def _index_add_pullback(residuals, needs, ct):
    dim, index, shape, alpha = residuals
    if ct is None:
        return _no_cts(needs)
    source_ct = None
    if needs[2]:
        source_ct = ct.index_select(dim, index.reshape(-1)).reshape(shape)
        source_ct = source_ct if alpha == 1 else source_ct * _conj(alpha)
    return [ct if needs[0] else None, None, source_ct]


def _conj(number):
    return number.conjugate() if isinstance(number, complex) else number


_joint(aten.index_add.default)


@vjp_rule(aten.index_copy.default)
def index_copy_vjp(needs, x, dim, index, source):
    """[.., n, ..], [k], [.., k, ..] -> [.., n, ..]"""
    return aten.index_copy.default(x, dim, index, source), (dim, index, source.shape), _copy_pull


def _copy_pull(residuals, needs, ct):
    dim, index, shape = residuals
    if ct is None:
        return _no_cts(needs)
    source_ct = None
    if needs[2]:
        source_ct = ct.index_select(dim, index.reshape(-1)).reshape(shape)
    return [ct.index_fill(dim, index, 0) if needs[0] else None, None, source_ct]


_joint(aten.index_copy.default)


@vjp_rule(aten.index_fill.int_Scalar)
def index_fill_vjp(needs, x, dim, index, value):
    """[.., n, ..], [k] -> [.., n, ..]"""
    return aten.index_fill.int_Scalar(x, dim, index, value), (dim, index), _index_fill_pullback


def _index_fill_pullback(residuals, needs, ct):
    dim, index = residuals
    return [None if ct is None else ct.index_fill(dim, index, 0), None]


@jvp_rule(aten.index_fill.int_Scalar)
def index_fill_jvp(tangents, x, dim, index, value):
    """[.., n, ..], [k] -> [.., n, ..]"""
    call = aten.index_fill.int_Scalar
    return call(x, dim, index, value), call(tangents[0], dim, index, 0)


@vjp_rule(aten.index_fill.int_Tensor)
def index_fill_tensor_vjp(needs, x, dim, index, value):
    """[.., n, ..], [k], [] -> [.., n, ..]"""
    out = aten.index_fill.int_Tensor(x, dim, index, value)
    return out, (dim, index), _index_fill_tensor_pullback


def _index_fill_tensor_pullback(residuals, needs, ct):
    """A position that the index names twice is filled once."""
    dim, index = residuals
    if ct is None:
        return _no_cts(needs)
    rest = ct.index_fill(dim, index, 0)
    value_ct = None
    if needs[2]:
        filled = torch.zeros_like(ct, dtype=torch.bool).index_fill(dim, index, True)
        value_ct = where(filled, ct, 0.0).sum()
    return [rest if needs[0] else None, None, value_ct]


_joint(aten.index_fill.int_Tensor)


@vjp_rule(aten.put.default)
def put_vjp(needs, x, index, source, accumulate=False):
    """[*S], [*I], [*I] -> [*S], the index counting through the flat x."""
    out = aten.put.default(x, index, source, accumulate)
    return out, (index, source.shape, accumulate), _put_pullback


def _put_pullback(residuals, needs, ct):
    index, shape, accumulate = residuals
    if ct is None:
        return _no_cts(needs)
    x_ct = None
    if needs[0]:
        nothing = torch.zeros_like(index, dtype=ct.dtype)
        x_ct = ct if accumulate else ct.put(index, nothing)
    return [x_ct, None, ct.take(index).reshape(shape) if needs[2] else None]


_joint(aten.put.default)


# -- scatter ---------------------------------------------------------------------------------------


def _gathered(ct, dim, index, shape):
    """The cotangent of a source, of which only the corner of the shape of the index was read."""
    found = ct.gather(dim, index)
    if found.shape == shape:
        return found
    pad = []
    # What has no dims is written as a vector of one element.
    for size, full in zip(reversed(found.shape or (1,)), reversed(shape or (1,)), strict=True):
        pad += [0, full - size]
    found = found if found.dim() else found.reshape(1)
    return torch.nn.functional.pad(found, pad).reshape(shape)


@vjp_rule(aten.scatter.src)
def scatter_vjp(needs, x, dim, index, src):
    """[*S], [*I], [*I or larger] -> [*S]"""
    return aten.scatter.src(x, dim, index, src), (dim, index, src.shape), _scatter_pullback


def _scatter_pullback(residuals, needs, ct):
    dim, index, shape = residuals
    if ct is None:
        return _no_cts(needs)
    return [
        ct.scatter(dim, index, 0) if needs[0] else None,
        None,
        _gathered(ct, dim, index, shape) if needs[2] else None,
    ]


_joint(aten.scatter.src)


@vjp_rule(aten.scatter.value)
def scatter_value_vjp(needs, x, dim, index, value):
    """[*S], [*I] -> [*S]"""
    return aten.scatter.value(x, dim, index, value), (dim, index), _scatter_value_pullback


def _scatter_value_pullback(residuals, needs, ct):
    dim, index = residuals
    return [None if ct is None else ct.scatter(dim, index, 0), None]


@jvp_rule(aten.scatter.value)
def scatter_value_jvp(tangents, x, dim, index, value):
    """[*S], [*I] -> [*S]"""
    call = aten.scatter.value
    return call(x, dim, index, value), call(tangents[0], dim, index, 0)


@vjp_rule(aten.scatter_add.default)
def scatter_add_vjp(needs, x, dim, index, src):
    """[*S], [*I], [*I or larger] -> [*S]"""
    kept = index if needs[2] else None
    out = aten.scatter_add.default(x, dim, index, src)
    return out, (dim, kept, src.shape), _scatter_add_pullback


def _scatter_add_pullback(residuals, needs, ct):
    dim, index, shape = residuals
    if ct is None:
        return _no_cts(needs)
    return [
        ct if needs[0] else None,
        None,
        _gathered(ct, dim, index, shape) if needs[2] else None,
    ]


_joint(aten.scatter_add.default)
