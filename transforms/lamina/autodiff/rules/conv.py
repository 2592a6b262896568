"""Derivatives of convolutions, plain and transposed.

All of `conv1d` ... `conv_transpose3d` decompose to `aten.convolution`, whose pullback is one call
of `aten.convolution_backward`. That op is linear in the cotangent and in the factor that each of
its outputs uses: its own derivatives are convolutions and their pullbacks again, to every order.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import decomposition, jvp_rule, vjp_rule
from lamina_core.overloads import aten

_X, _WEIGHT = [True, False, False], [False, True, False]


def _unread(like: Any, shape: Any) -> Any:
    """An operand that only shows a shape, as its own gradient is not asked for.

    It has memory of its own, never touched: of an expanded number PyTorch makes a whole copy.
    """
    return like.new_empty(shape)


@decomposition(aten.conv_tbc.default)
def conv_tbc(x: Any, weight: Any, bias: Any, pad: int = 0) -> Any:
    """[T, N, C], [K, C, O], [O] -> [T', N, O]. The pullback in C++ writes to memory of its own."""
    x, weight = x.permute(1, 2, 0), weight.permute(2, 1, 0)
    return torch.conv1d(x, weight, bias, padding=pad).permute(2, 0, 1).contiguous()


@vjp_rule(aten.convolution.default)
def convolution_rule(needs: Any, x: Any, weight: Any, bias: Any, *settings: Any) -> Any:
    """[B, C, *S], [K, C/groups, *W], [K] -> [B, K, *T]. A frozen weight keeps x's shape only."""
    out = aten.convolution.default(x, weight, bias, *settings)
    sizes = None if bias is None else list(bias.shape)
    residuals = (x if needs[1] else None, weight, x.shape, sizes, settings)
    return out, residuals, _convolution_pullback


def _convolution_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    x, weight, shape, sizes, settings = residuals
    x = _unread(ct, shape) if x is None else x
    return aten.convolution_backward.default(ct, x, weight, sizes, *settings, list(needs))


@jvp_rule(aten.convolution.default)
def convolution_jvp(tangents: Any, x: Any, weight: Any, bias: Any, *settings: Any) -> Any:
    """[B, C, *S], [K, C/groups, *W], [K] -> [B, K, *T]; the bias tangent rides on a product."""
    x_t, weight_t, bias_t = tangents
    out = aten.convolution.default(x, weight, bias, *settings)
    total = None
    if x_t is not None:
        total = aten.convolution.default(x_t, weight, bias_t, *settings)
    if weight_t is not None:
        rider = bias_t if x_t is None else None
        term = aten.convolution.default(x, weight_t, rider, *settings)
        total = term if total is None else total + term
    if total is None:
        total = _over_channels(bias_t, out.shape)
    return out, total


def _over_channels(bias: Any, shape: Any) -> Any:
    return bias.reshape([-1] + [1] * (len(shape) - 2)).expand(shape)


@vjp_rule(aten.convolution_backward.default)
def convolution_backward_rule(
    needs: Any, ct: Any, x: Any, weight: Any, bias_sizes: Any, *settings: Any
) -> Any:
    """ct, x, weight -> x_ct, weight_ct, bias_ct (those the mask asks for, of one factor each)."""
    *plain, mask = settings
    out = aten.convolution_backward.default(ct, x, weight, bias_sizes, *settings)
    factors = (x if mask[1] else None, weight if mask[0] else None)
    shapes = (ct.shape, x.shape, weight.shape)
    residuals = (ct if needs[1] or needs[2] else None, *factors, shapes, plain)
    return out, residuals, _convolution_backward_pullback


def _convolution_backward_pullback(
    residuals: Any, needs: Any, x_cc: Any, weight_cc: Any, bias_cc: Any
) -> Any:
    """Cotangents of the cotangents, by <weight_cc, weight_ct> = <conv(x, weight_cc), ct>."""
    ct, x, weight, (ct_shape, x_shape, weight_shape), settings = residuals
    out_ct = out_x = out_weight = None
    if needs[0]:
        rider = bias_cc
        if x_cc is not None:
            out_ct = aten.convolution.default(x_cc, weight, rider, *settings)
            rider = None
        if weight_cc is not None:
            term = aten.convolution.default(x, weight_cc, rider, *settings)
            out_ct = term if out_ct is None else out_ct + term
        elif x_cc is None and bias_cc is not None:
            out_ct = _over_channels(bias_cc, ct_shape)
    if needs[1] and weight_cc is not None:
        shown = _unread(ct, x_shape)
        out_x = aten.convolution_backward.default(ct, shown, weight_cc, None, *settings, _X)[0]
    if needs[2] and x_cc is not None:
        shown = _unread(ct, weight_shape)
        out_weight = aten.convolution_backward.default(ct, x_cc, shown, None, *settings, _WEIGHT)[1]
    return out_ct, out_x, out_weight


@jvp_rule(aten.convolution_backward.default)
def convolution_backward_jvp(
    tangents: Any, ct: Any, x: Any, weight: Any, bias_sizes: Any, *settings: Any
) -> Any:
    """ct, x, weight -> x_ct, weight_ct, bias_ct; each is linear in ct and in one factor."""
    ct_t, x_t, weight_t = tangents
    *settings, mask = settings
    out = aten.convolution_backward.default(ct, x, weight, bias_sizes, *settings, mask)
    x_tt = weight_tt = bias_tt = None
    if ct_t is not None:
        x_tt, weight_tt, bias_tt = aten.convolution_backward.default(
            ct_t, x, weight, bias_sizes, *settings, mask
        )
    if weight_t is not None and mask[0]:
        term = aten.convolution_backward.default(ct, x, weight_t, None, *settings, _X)[0]
        x_tt = term if x_tt is None else x_tt + term
    if x_t is not None and mask[1]:
        term = aten.convolution_backward.default(ct, x_t, weight, None, *settings, _WEIGHT)[1]
        weight_tt = term if weight_tt is None else weight_tt + term
    return out, (x_tt, weight_tt, bias_tt)
