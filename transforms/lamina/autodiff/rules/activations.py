"""Derivatives of activation functions, and of the fused ops that compute those derivatives.

In the products of a `*_backward` op, `x` is the cotangent and `y` the operand (or the result). Each
of these ops is linear in its cotangent, so the first product is the op itself.
"""

from __future__ import annotations

import math

import torch

from lamina.autodiff.declare import jvp_rule, pointwise, vjp_rule
from lamina.autodiff.shapes import asked_outside
from lamina_core.overloads import aten

where = torch.where

elu_backward = aten.elu_backward.default
gelu_backward = aten.gelu_backward.default
hardshrink_backward = aten.hardshrink_backward.default
hardsigmoid_backward = aten.hardsigmoid_backward.default
hardswish_backward = aten.hardswish_backward.default
hardtanh_backward = aten.hardtanh_backward.default
leaky_relu_backward = aten.leaky_relu_backward.default
mish_backward = aten.mish_backward.default
sigmoid_backward = aten.sigmoid_backward.default
silu_backward = aten.silu_backward.default
softplus_backward = aten.softplus_backward.default
softshrink_backward = aten.softshrink_backward.default
tanh_backward = aten.tanh_backward.default
threshold_backward = aten.threshold_backward.default

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _elu_second(t, x, y, alpha, scale, input_scale, is_result):
    """Where y is below 0 the slope grows by input_scale times itself; else it is constant."""
    if is_result:
        return where(y < 0, t * x * input_scale, 0.0)
    slope = elu_backward(t * x * input_scale, alpha, scale, input_scale, False, y)
    return where(y < 0, slope, 0.0)


def _gelu_second(t, x, y, approximate):
    y = y.clamp(-100, 100)  # beyond, all is 0 in every dtype, but the powers overflow in some
    if approximate == "none":
        density = (y * y * -0.5).exp() * (1 / math.sqrt(2 * math.pi))
        return t * x * (density * (2 - y * y))
    y = y.clamp(-15, 15)
    square = y * y
    inner = (_SQRT_2_OVER_PI * y * (1 + _CUBIC * square)).tanh()
    slope = _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * square)
    bend = (3 * _SQRT_2_OVER_PI * _CUBIC) * square
    return t * x * ((1 - inner * inner) * (slope - y * inner * slope * slope + bend))


def _hardswish_second(t, x, y):
    return where((y > -3) & (y < 3), t * x / 3, 0.0)


def _hardsigmoid(t, x):
    """The kernel has a sixth in single precision for every dtype."""
    if x.dtype is torch.float64 or asked_outside(t, x):
        return where((x > -3) & (x < 3), t / 6, 0.0)
    return hardsigmoid_backward(t, x)


def _mish(t, x):
    if asked_outside(t, x):
        inner = torch.nn.functional.softplus(x).tanh()
        return t * (inner + x * (1 - inner * inner) * x.sigmoid())
    return mish_backward(t, x)


def _mish_second(t, x, y):
    inner = torch.nn.functional.softplus(y).tanh()
    gate = y.sigmoid()
    outer = (1 - inner * inner) * gate
    return t * x * (outer * (2 + y * (1 - gate) - 2 * y * inner * gate))


def _sigmoid(t, out):
    return t * ((1 - out) * out) if out.is_complex() else sigmoid_backward(t, out)


def _silu(t, x):
    if x.is_complex() or asked_outside(t, x):
        gate = x.sigmoid()
        return t * (gate * (1 + x * (1 - gate)))
    return silu_backward(t, x)


def _silu_second(t, x, y):
    gate = y.sigmoid()
    return t * x * (gate * (1 - gate) * (2 + y * (1 - 2 * gate)))


def _softplus_second(t, x, y, beta, threshold):
    gate = (y * beta).sigmoid()
    return where(y * beta > threshold, 0.0, t * x * (beta * gate * (1 - gate)))


def _tanh(t, out):
    return t * (1 - out * out) if out.is_complex() else tanh_backward(t, out)


# -- the functions ---------------------------------------------------------------------------------

pointwise(
    aten._prelu_kernel.default,
    lambda t, x, y: where(x > 0, t, y * t),
    lambda t, x: where(x > 0, 0.0, x * t),
    # At 0 forward mode takes the other side, as torch does.
    forward=(lambda t, x, y: where(x >= 0, t, y * t), lambda t, x: where(x >= 0, 0.0, x * t)),
)
pointwise(aten.celu.default, lambda t, x, alpha: elu_backward(t, alpha, 1.0, 1.0 / alpha, False, x))
pointwise(
    aten.elu.default,
    lambda t, x, alpha, scale, input_scale: elu_backward(t, alpha, scale, input_scale, False, x),
)
pointwise(aten.gelu.default, lambda t, x, approximate: gelu_backward(t, x, approximate=approximate))
pointwise(aten.hardshrink.default, lambda t, x, lambd: hardshrink_backward(t, x, lambd))
pointwise(aten.hardsigmoid.default, _hardsigmoid)
pointwise(aten.hardswish.default, lambda t, x: hardswish_backward(t, x))
pointwise(
    aten.hardtanh.default, lambda t, x, min_val, max_val: hardtanh_backward(t, x, min_val, max_val)
)
pointwise(
    aten.leaky_relu.default,
    lambda t, x, negative_slope: leaky_relu_backward(t, x, negative_slope, False),
)
pointwise(aten.log_sigmoid.default, lambda t, x: t * (-x).sigmoid())
pointwise(aten.mish.default, _mish)
pointwise(aten.relu.default, lambda t, out: threshold_backward(t, out, 0))
pointwise(aten.sigmoid.default, _sigmoid)
pointwise(aten.silu.default, _silu)
pointwise(
    aten.softplus.default, lambda t, x, beta, threshold: softplus_backward(t, x, beta, threshold)
)
pointwise(aten.softshrink.default, lambda t, x, lambd: softshrink_backward(t, x, lambd))
pointwise(aten.tanh.default, _tanh)
pointwise(aten.threshold.default, lambda t, x, threshold: threshold_backward(t, x, threshold))

# -- their derivatives -----------------------------------------------------------------------------

pointwise(
    elu_backward,
    lambda t, y, alpha, scale, input_scale, is_result: elu_backward(
        t, alpha, scale, input_scale, is_result, y
    ),
    _elu_second,
)
pointwise(
    gelu_backward,
    lambda t, y, approximate: gelu_backward(t, y, approximate=approximate),
    _gelu_second,
)
pointwise(hardshrink_backward, lambda t, y, lambd: hardshrink_backward(t, y, lambd))
pointwise(hardsigmoid_backward, lambda t, y: _hardsigmoid(t, y))
pointwise(hardswish_backward, lambda t, y: hardswish_backward(t, y), _hardswish_second)
pointwise(
    hardtanh_backward, lambda t, y, min_val, max_val: hardtanh_backward(t, y, min_val, max_val)
)
pointwise(
    leaky_relu_backward,
    lambda t, y, negative_slope, self_is_result: leaky_relu_backward(
        t, y, negative_slope, self_is_result
    ),
)
pointwise(mish_backward, lambda t, y: _mish(t, y), _mish_second)
pointwise(
    sigmoid_backward, lambda t, y: sigmoid_backward(t, y), lambda t, x, y: t * x * (1 - 2 * y)
)
pointwise(silu_backward, lambda t, y: _silu(t, y), _silu_second)
pointwise(
    softplus_backward,
    lambda t, y, beta, threshold: softplus_backward(t, y, beta, threshold),
    _softplus_second,
)
pointwise(softshrink_backward, lambda t, y, lambd: softshrink_backward(t, y, lambd))
pointwise(tanh_backward, lambda t, y: tanh_backward(t, y), lambda t, x, y: t * (-2 * x * y))
pointwise(threshold_backward, lambda t, y, threshold: threshold_backward(t, y, threshold))


# -- glu: two halves of one operand ----------------------------------------------------------------


@vjp_rule(aten.glu.default)
def glu_vjp(needs, x, dim=-1):
    """[.., 2n, ..] -> [.., n, ..]"""
    return aten.glu.default(x, dim), (x, dim), _glu_pullback


def _glu_pullback(residuals, needs, ct):
    x, dim = residuals
    if ct is None:
        return (None,)
    value, gate = x.chunk(2, dim)
    gate = gate.sigmoid()
    value_ct = ct * gate
    return (torch.cat([value_ct, value_ct * value * (1 - gate)], dim),)


@jvp_rule(aten.glu.default)
def glu_jvp(tangents, x, dim=-1):
    """[.., 2n, ..] -> [.., n, ..]"""
    value, gate = x.chunk(2, dim)
    value_t, gate_t = tangents[0].chunk(2, dim)
    gate = gate.sigmoid()
    return value * gate, gate * (value_t + value * (1 - gate) * gate_t)


@vjp_rule(aten.glu_backward.default)
def glu_backward_vjp(needs, ct, x, dim):
    """[.., n, ..], [.., 2n, ..] -> [.., 2n, ..]"""
    return aten.glu_backward.default(ct, x, dim), (ct, x, dim), _glu_backward_pullback


def _glu_backward_pullback(residuals, needs, out_ct):
    ct, x, dim = residuals
    if out_ct is None:
        return None, None
    value, gate = x.chunk(2, dim)
    gate = gate.sigmoid()
    slope = gate * (1 - gate)
    value_ct, gate_ct = out_ct.chunk(2, dim)
    ct_ct = x_ct = None
    if needs[0]:
        ct_ct = value_ct * gate + gate_ct * value * slope
    if needs[1]:
        by_gate = ct * slope * (value_ct + gate_ct * value * (1 - 2 * gate))
        x_ct = torch.cat([gate_ct * ct * slope, by_gate], dim)
    return ct_ct, x_ct
