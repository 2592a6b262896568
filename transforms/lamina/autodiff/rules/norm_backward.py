"""Second derivatives of layer and group norm: the rules of their `*_backward` ops.

With `xhat = (x - mean) * rstd` and `dy = ct * weight` a pullback gives
`x_ct = rstd * (dy - mean(dy) - xhat * mean(dy * xhat))`, `weight_ct = sum(ct * xhat)` and
`bias_ct = sum(ct)`. See NOTE [Statistics are operands] for mean and rstd.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import jvp_rule, unbroadcast, vjp_rule
from lamina.autodiff.outside import whole
from lamina.autodiff.rules.norm import _as, _Groups, _last, _plus, _shaped
from lamina_core.dispatch import followed
from lamina_core.overloads import aten


def _second(given: Any, needs: Any, cts: Any, dims: Any, live: bool) -> tuple[Any, ...]:
    """Cotangents of (ct, x, mean, rstd, weight) for the pullback of an affine normalisation.

    All tensors come in shapes that broadcast: the statistics with size 1 in `dims`, the weight
    with size 1 in the dims that it is shared over. Where the statistics are not `live`, x_ct is
    `rstd * dy`.
    """
    ct, x, mean, rstd, weight = given
    x_cc, weight_cc, bias_cc = cts
    of_xhat = needs[1] or needs[2] or needs[3]  # if not, the map is linear, and ct is not read
    centred = x - mean
    xhat = centred * rstd
    ct_ct = xhat_ct = rstd_ct = weight_ct = None
    if x_cc is not None:
        through = x_cc  # the projection is symmetric: it serves both directions
        if live:
            a = (x_cc * xhat).mean(dims, keepdim=True)
            through = x_cc - x_cc.mean(dims, keepdim=True) - xhat * a
        through = through * rstd
        ct_ct = through if weight is None else through * weight
        if needs[4]:
            weight_ct = unbroadcast(through * ct, weight.shape)
        if of_xhat:
            inner = dy = ct if weight is None else ct * weight
            if live:
                b = (dy * xhat).mean(dims, keepdim=True)
                inner = dy - dy.mean(dims, keepdim=True) - xhat * b
                xhat_ct = -rstd * (x_cc * b + dy * a)
            rstd_ct = unbroadcast(x_cc * inner, rstd.shape)
    if weight_cc is not None:
        ct_ct = _plus(ct_ct, weight_cc * xhat)
        if of_xhat:
            xhat_ct = _plus(xhat_ct, weight_cc * ct)
    if bias_cc is not None:
        ct_ct = _plus(ct_ct, bias_cc.expand(x.shape))
    x_ct = mean_ct = None
    if xhat_ct is not None:
        x_ct = xhat_ct * rstd
        mean_ct = -unbroadcast(x_ct, mean.shape)
        rstd_ct = _plus(rstd_ct, unbroadcast(xhat_ct * centred, rstd.shape))
    return ct_ct, x_ct, mean_ct, rstd_ct, weight_ct


def _second_t(
    given: Any, tangents: Any, x_ct: Any, mask: Any, affine: Any, dims: Any
) -> tuple[Any, ...]:
    """Tangents of the cotangents of x, weight and bias, with live statistics.

    Args:
        given: (ct, x, mean, rstd, weight), in shapes that broadcast, as for `_second`.
        tangents: Their tangents likewise.
        x_ct: The cotangent of x.
        mask: Which of the three are wanted.
        affine: The shape of weight and bias.
        dims: Those that the statistics are taken over.
    """
    ct, x, mean, rstd, weight = given
    ct_t, x_t, mean_t, rstd_t, weight_t = tangents
    centred = x - mean
    xhat = centred * rstd
    dy = ct if weight is None else ct * weight
    dy_t = ct_t if weight is None or ct_t is None else ct_t * weight
    if weight_t is not None:
        dy_t = _plus(dy_t, ct * weight_t)
    xhat_t = None if x_t is None else x_t * rstd
    if mean_t is not None:
        xhat_t = _plus(xhat_t, -mean_t * rstd)
    if rstd_t is not None:
        xhat_t = _plus(xhat_t, centred * rstd_t)
    x_ct_t = weight_ct_t = bias_ct_t = None
    if mask[0]:
        if dy_t is not None:
            x_ct_t = dy_t - dy_t.mean(dims, keepdim=True)
            x_ct_t = x_ct_t - xhat * (dy_t * xhat).mean(dims, keepdim=True)
        if xhat_t is not None:
            term = xhat_t * -(dy * xhat).mean(dims, keepdim=True)
            term = term - xhat * (dy * xhat_t).mean(dims, keepdim=True)
            x_ct_t = _plus(x_ct_t, term)
        if x_ct_t is not None:
            x_ct_t = x_ct_t * rstd
        if rstd_t is not None:
            x_ct_t = _plus(x_ct_t, x_ct * (rstd_t / rstd))
    if mask[1]:
        total = None if ct_t is None else ct_t * xhat
        if xhat_t is not None:
            total = _plus(total, ct * xhat_t)
        weight_ct_t = None if total is None else unbroadcast(total, affine)
    if mask[2] and ct_t is not None:
        bias_ct_t = unbroadcast(ct_t, affine)
    return x_ct_t, weight_ct_t, bias_ct_t


def _each_as(found: Any, given: Any) -> list[Any]:
    return [
        None if f is None else _as(f, g).reshape(g.shape) for f, g in zip(found, given, strict=True)
    ]


def _like(tangents: Any, outs: Any) -> tuple[Any, ...]:
    return tuple(
        None if t is None else _as(t, out).reshape(out.shape)
        for t, out in zip(tangents, outs, strict=True)
    )


# -- layer norm ------------------------------------------------------------------------------------


@whole(aten.native_layer_norm_backward.default)
@vjp_rule(aten.native_layer_norm_backward.default)
def native_layer_norm_backward_rule(
    needs: Any,
    ct: Any,
    x: Any,
    normalized_shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    bias: Any,
    output_mask: Any,
) -> Any:
    """ct, x, mean, rstd, weight, bias -> x_ct, weight_ct, bias_ct."""
    out = followed(
        aten.native_layer_norm_backward.default,
        *(ct, x, normalized_shape, mean, rstd, weight, bias, output_mask),
    )
    residuals = (ct, x, mean, rstd, weight, _last(x, normalized_shape))
    return out, residuals, _native_layer_norm_backward_pullback


def _native_layer_norm_backward_pullback(residuals: Any, needs: Any, *cts: Any) -> Any:
    *given, dims = residuals
    found = _second(given, needs, cts, dims, live=True)
    return (*_each_as(found, given), None)


@jvp_rule(aten.native_layer_norm_backward.default)
def native_layer_norm_backward_jvp(
    tangents: Any,
    ct: Any,
    x: Any,
    normalized_shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    bias: Any,
    output_mask: Any,
) -> Any:
    """ct, x, mean, rstd, weight, bias -> x_ct, weight_ct, bias_ct."""
    outs = followed(
        aten.native_layer_norm_backward.default,
        *(ct, x, normalized_shape, mean, rstd, weight, bias, output_mask),
    )
    given = (ct, x, mean, rstd, weight)
    dims = _last(x, normalized_shape)
    affine = torch.Size(normalized_shape)
    found = _second_t(given, tangents[:5], outs[0], output_mask, affine, dims)
    return outs, _like(found, outs)


# -- group norm ------------------------------------------------------------------------------------


@vjp_rule(aten.native_group_norm_backward.default)
def native_group_norm_backward_rule(
    needs: Any,
    ct: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    N: Any,
    C: Any,
    HxW: Any,
    group: int,
    output_mask: Any,
) -> Any:
    """ct, x, mean, rstd, weight -> x_ct, weight_ct, bias_ct."""
    sizes = (N, C, HxW, group)
    out = aten.native_group_norm_backward.default(ct, x, mean, rstd, weight, *sizes, output_mask)
    return out, (ct, x, mean, rstd, weight, sizes), _native_group_norm_backward_pullback


def _native_group_norm_backward_pullback(
    residuals: Any, needs: Any, x_cc: Any, weight_cc: Any, bias_cc: Any
) -> Any:
    *given, sizes = residuals
    shapes = _Groups(*sizes)
    cts = (
        _shaped(x_cc, shapes.full),
        _shaped(weight_cc, shapes.channels),
        _shaped(bias_cc, shapes.channels),
    )
    found = _second(shapes.given(*given), needs, cts, [2, 3], live=True)
    return _each_as(found, given)


@jvp_rule(aten.native_group_norm_backward.default)
def native_group_norm_backward_jvp(
    tangents: Any,
    ct: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    N: Any,
    C: Any,
    HxW: Any,
    group: int,
    output_mask: Any,
) -> Any:
    """ct, x, mean, rstd, weight -> x_ct, weight_ct, bias_ct."""
    sizes = (N, C, HxW, group)
    outs = aten.native_group_norm_backward.default(ct, x, mean, rstd, weight, *sizes, output_mask)
    shapes = _Groups(*sizes)
    given = shapes.given(ct, x, mean, rstd, weight)
    x_ct = _shaped(outs[0], shapes.full) if output_mask[0] else None
    affine = torch.Size(shapes.channels)
    found = _second_t(given, shapes.given(*tangents), x_ct, output_mask, affine, [2, 3])
    return outs, _like(found, outs)
