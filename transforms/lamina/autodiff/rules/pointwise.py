"""Derivatives of elementwise ops: per operand, `t` times the partial derivative.

The parameters of a product name what is kept for it: see the NOTE in `lamina.autodiff.declare`.
A product is linear in `t` over the complex numbers. For a real function of a complex operand its
real part is the pushforward, so that `abs` has the product `t * conj(sgn(x))`.

Activation functions are in `activations`, ops without derivative in `constants`.
"""

from __future__ import annotations

import cmath
import math

import torch

from lamina.autodiff.conventions import CHOICES
from lamina.autodiff.declare import jvp_rule, linear, pointwise, vjp_rule
from lamina.autodiff.shapes import in_dtype
from lamina_core.overloads import aten

where = torch.where

_LN2 = math.log(2.0)
_LN10 = math.log(10.0)


def _scaled(t, factor):
    return t if factor == 1 else t * factor


# -- products that take more than a line -----------------------------------------------------------


def _abs(t, x):
    """The subgradient at 0 is 0, that of sgn."""
    return t * (x.sgn().conj() if x.is_complex() else x.sgn())


def _acosh(t, x):
    """Two roots for complex x: the root of the product has another branch cut."""
    if x.is_complex():
        return t * ((x + 1).rsqrt() * (x - 1).rsqrt())
    return t * ((x + 1).rsqrt() * (x - 1).rsqrt())  # the square may overflow


def _angle(t, x):
    """Zero for real x and at 0."""
    if not x.is_complex():
        return torch.zeros_like(t)
    zero = x == 0
    return where(zero, 0.0, t / x.masked_fill(zero, 1) * -1j)


def _asinh(t, x):
    if x.is_complex():
        return t * (x * x + 1).rsqrt()
    return t / torch.hypot(x, x.new_ones(()))  # the square may overflow


def _atan(t, x):
    if x.is_complex():
        return t / (x * x + 1)
    size = torch.hypot(x, x.new_ones(()))
    return t / size / size


def _atan2(t, this, other):
    """The product with `this / (x * x + y * y)`, whose squares may over- or underflow."""
    size = torch.hypot(this, other)
    return t * ((this / size) / size)


def _copysign(t, x, out):
    """Sign of x times that of out, whose derivatives are 0."""
    return t * (x.sgn() * out.sgn())


def _div_mode_x(t, y, rounding_mode):
    return t / y if rounding_mode is None else torch.zeros_like(t)


def _div_mode_y(t, x, y, rounding_mode):
    return -(t * ((x / y) / y)) if rounding_mode is None else torch.zeros_like(t)


def _lead(x, y):
    """The difference, 0 of equal infinities: masked values of -inf then have finite derivatives."""
    return where(x.isinf() & (x == y), 0.0, x - y)


def _pow_scalar(t, x, exponent):
    """x**0 is flat everywhere, also at 0, where the formula would give 0 * inf."""
    if exponent == 0:
        return torch.zeros_like(t)
    if exponent == 2:
        return t * (2 * x)
    return t * (exponent * x.pow(exponent - 1))


def _pow_base(t, x, y):
    """x**0 is flat at 0 as well; elsewhere its derivative is 0, but the mixed one is 1 / x."""
    return t * (y * where((x == 0) & (y == 0), 1.0, x).pow(y - 1))


def _pow_exponent(t, x, y, out):
    """0**y is flat where y >= 0, though log(0) is not finite."""
    grows = (y.real >= 0) & (y.imag == 0) if y.is_complex() else y >= 0
    return t * (out * where((x == 0) & grows, 1.0, x.to(out.dtype)).log())


def _pow_of_number(t, x, self, out):
    """As `_pow_exponent`, the base a number: its logarithm is one too, NaN for a negative base."""
    if self == 0:
        grows = (x.real >= 0) & (x.imag == 0) if x.is_complex() else x >= 0
        return where(grows, 0.0, t * -math.inf)
    if isinstance(self, complex) or x.is_complex():
        return t * (out * cmath.log(self))
    return t * (out * (math.log(self) if self > 0 else math.nan))


# -- one operand -----------------------------------------------------------------------------------

pointwise(aten.abs.default, _abs)
pointwise(aten.acos.default, lambda t, x: -(t * (1 - x * x).rsqrt()))
pointwise(aten.acosh.default, _acosh)
pointwise(aten.angle.default, _angle)
pointwise(aten.asin.default, lambda t, x: t * (1 - x * x).rsqrt())
pointwise(aten.asinh.default, _asinh)
pointwise(aten.atan.default, _atan)
pointwise(aten.atanh.default, lambda t, x: t / (1 - x * x))
pointwise(aten.cos.default, lambda t, x: -(t * x.sin()))
pointwise(aten.cosh.default, lambda t, x: t * x.sinh())
pointwise(aten.deg2rad.default, lambda t: t * (math.pi / 180))
pointwise(aten.exp.default, lambda t, out: t * out)
pointwise(aten.exp2.default, lambda t, out: t * (out * _LN2))
pointwise(aten.expm1.default, lambda t, x: t * x.exp())
pointwise(aten.frac.default, lambda t: t)
pointwise(aten.log.default, lambda t, x: t / x)
pointwise(aten.log10.default, lambda t, x: t / (x * _LN10))
pointwise(aten.log1p.default, lambda t, x: t / (x + 1))
pointwise(aten.log2.default, lambda t, x: t / (x * _LN2))
pointwise(aten.nan_to_num.default, lambda t, x: t * x.isfinite())
pointwise(aten.neg.default, lambda t: -t)
pointwise(aten.rad2deg.default, lambda t: t * (180 / math.pi))
pointwise(aten.reciprocal.default, lambda t, out: -(t * (out * out)))
pointwise(aten.rsqrt.default, lambda t, out: t * (-0.5 * out.pow(3)))
pointwise(aten.sin.default, lambda t, x: t * x.cos())
pointwise(aten.sinh.default, lambda t, x: t * x.cosh())
pointwise(aten.sqrt.default, lambda t, out: t / (2 * out))  # infinite at 0, as PyTorch's
pointwise(aten.square.default, lambda t, x: t * (2 * x))
pointwise(aten.tan.default, lambda t, out: t * (1 + out * out))

# -- an operand and a number -----------------------------------------------------------------------

pointwise(aten.add.Scalar, lambda t: t)
pointwise(aten.copysign.Scalar, _copysign)
pointwise(aten.div.Scalar, lambda t, other: t / other)
pointwise(
    aten.div.Scalar_mode, lambda t, other, rounding_mode: _div_mode_x(t, other, rounding_mode)
)
pointwise(aten.fmod.Scalar, lambda t: t)
pointwise(aten.mul.Scalar, lambda t, other: t * other)
pointwise(aten.pow.Scalar, _pow_of_number)
pointwise(aten.pow.Tensor_Scalar, _pow_scalar)
pointwise(aten.remainder.Scalar, lambda t: t)
pointwise(aten.remainder.Scalar_Tensor, lambda t, x, self: -(t * (self / x).floor()))
pointwise(aten.rsub.Scalar, lambda t, alpha: t * -alpha)
pointwise(aten.sub.Scalar, lambda t: t)

# -- two operands ----------------------------------------------------------------------------------

pointwise(aten.add.Tensor, lambda t: t, lambda t, alpha: _scaled(t, alpha))
pointwise(
    aten.atan2.default,
    lambda t, x, y: _atan2(t, y, x),
    lambda t, x, y: -_atan2(t, x, y),
)
pointwise(aten.complex.default, lambda t: t, lambda t: t * 1j)
pointwise(aten.copysign.Tensor, _copysign, None)
pointwise(aten.div.Tensor, lambda t, y: t / y, lambda t, x, y: -(t * ((x / y) / y)))
pointwise(aten.div.Tensor_mode, _div_mode_x, _div_mode_y)
pointwise(
    aten.fmod.Tensor,
    lambda t: t,
    lambda t, x, y: -(t * torch.div(x, y, rounding_mode="trunc")),
)
pointwise(
    aten.hypot.default,
    lambda t, x, out: t * (x / out),
    lambda t, y, out: t * (y / out),
)
pointwise(  # 2**y of an integer y would be an integer
    aten.ldexp.Tensor, lambda t, y: torch.ldexp(t, y), lambda t, out: t * (out * _LN2)
)
pointwise(
    aten.logaddexp.default,
    lambda t, x, y: t * _lead(x, y).sigmoid(),
    lambda t, x, y: t * _lead(y, x).sigmoid(),
)
pointwise(
    aten.logaddexp2.default,
    lambda t, x, y: t * (_lead(x, y) * _LN2).sigmoid(),
    lambda t, x, y: t * (_lead(y, x) * _LN2).sigmoid(),
)
pointwise(aten.mul.Tensor, lambda t, y: t * y, lambda t, x: t * x)
pointwise(aten.polar.default, lambda t, y: t * (y * 1j).exp(), lambda t, out: t * (out * 1j))
pointwise(aten.pow.Tensor_Tensor, _pow_base, _pow_exponent)
pointwise(
    aten.remainder.Tensor,
    lambda t: t,
    lambda t, x, y: -(t * torch.div(x, y, rounding_mode="floor")),
)
pointwise(aten.rsub.Tensor, lambda t, alpha: t * -alpha, lambda t: t)
pointwise(aten.sub.Tensor, lambda t: t, lambda t, alpha: t * -alpha)

# -- three operands --------------------------------------------------------------------------------

pointwise(
    aten.addcdiv.default,
    lambda t: t,
    lambda t, z, value: t * (value / z),
    lambda t, y, z, value: -(t * (value * ((y / z) / z))),
)
pointwise(
    aten.addcmul.default,
    lambda t: t,
    lambda t, z, value: t * _scaled(z, value),
    lambda t, y, value: t * _scaled(y, value),
)
pointwise(aten.lerp.Scalar, lambda t, weight: t * (1 - weight), lambda t, weight: t * weight)
pointwise(
    aten.lerp.Tensor,
    lambda t, z: t * (1 - z),
    lambda t, z: t * z,
    lambda t, x, y: t * (y - x),
)
pointwise(aten.masked_fill.Scalar, lambda t, y: t.masked_fill(y, 0.0))
pointwise(
    aten.masked_fill.Tensor,
    lambda t, y: t.masked_fill(y, 0.0),
    None,
    lambda t, y: where(y, t, 0.0),
)
pointwise(aten.where.ScalarOther, None, lambda t, x: where(x, t, 0.0))
pointwise(aten.where.ScalarSelf, None, lambda t, x: where(x, 0.0, t))
pointwise(  # the dead branch gets 0, even where its own derivative is not finite
    aten.where.self,
    None,
    lambda t, x: where(x, t, 0.0),
    lambda t, x: where(x, 0.0, t),
)

# -- ops that return one of their operands: torch says which gets the derivative -------------------


def _among_bounds(name, place, mode):
    """The product of `clamp` in one operand; without one of the bounds it is another question."""
    both, least, most = (
        getattr(CHOICES[question], mode) for question in (name, f"{name} min", f"{name} max")
    )

    def product(t, x, low, high):
        if low is None:
            return most(place and place - 1, t, x, high)
        if high is None:
            return least(place, t, x, low)
        return both(place, t, x, low, high)

    return product


def _clamp_by_numbers(mode):
    product = _among_bounds("clamp", 0, mode)
    return lambda t, x, min, max: product(t, x, min, max)


def _clamp_by_tensors(mode):
    products = [_among_bounds("clamp.Tensor", place, mode) for place in range(3)]

    def of(product):
        return lambda t, x, y, z: product(t, x, y, z)

    return [of(product) for product in products]


def _between_two(name, mode):
    choose = getattr(CHOICES[name], mode)
    return (
        lambda t, x, y: choose(0, t, x, y),
        lambda t, x, y: choose(1, t, x, y),
    )


def _below(mode):
    choose = getattr(CHOICES["clamp_max"], mode)
    return lambda t, x, max: choose(0, t, x, max)


def _above(mode):
    choose = getattr(CHOICES["clamp_min"], mode)
    return lambda t, x, min: choose(0, t, x, min)


pointwise(aten.clamp.default, _clamp_by_numbers("pulled"), forward=(_clamp_by_numbers("pushed"),))
pointwise(aten.clamp.Tensor, *_clamp_by_tensors("pulled"), forward=_clamp_by_tensors("pushed"))
pointwise(aten.clamp_max.default, _below("pulled"), forward=(_below("pushed"),))
pointwise(aten.clamp_min.default, _above("pulled"), forward=(_above("pushed"),))
for _op, _name in (
    (aten.clamp_max.Tensor, "clamp_max.Tensor"),
    (aten.clamp_min.Tensor, "clamp_min.Tensor"),
    (aten.fmax.default, "fmax"),
    (aten.fmin.default, "fmin"),
    (aten.maximum.default, "maximum"),
    (aten.minimum.default, "minimum"),
):
    pointwise(_op, *_between_two(_name, "pulled"), forward=_between_two(_name, "pushed"))

# -- copies ----------------------------------------------------------------------------------------

linear(aten.clone.default, lambda ct: ct)
linear(aten.lift.default, lambda ct: ct)
linear(aten.lift_fresh.default, lambda ct: ct)


@vjp_rule(aten._to_copy.default)
def to_copy_vjp(needs, x, **kwargs):
    """[*S] -> [*S], in another dtype or on another device, where the cotangent comes back from."""
    return aten._to_copy.default(x, **kwargs), (x.dtype, x.device), _to_copy_pullback


def _to_copy_pullback(residuals, needs, ct):
    dtype, device = residuals
    if ct is None:
        return (None,)
    ct = in_dtype(ct, dtype)
    return (ct if ct.device == device else ct.to(device),)


@jvp_rule(aten._to_copy.default)
def to_copy_jvp(tangents, x, **kwargs):
    """[*S] -> [*S], the tangent copied likewise."""
    call = aten._to_copy.default
    return call(x, **kwargs), call(tangents[0], **kwargs)


# -- frexp -----------------------------------------------------------------------------------------


@vjp_rule(aten.frexp.Tensor)
def frexp_vjp(needs, x):
    """[*S] -> mantissa [*S], exponent [*S]; PyTorch's power of 2 is of single precision."""
    outs = tuple(torch.frexp(x))
    return outs, (outs[1],), _frexp_pullback


def _frexp_pullback(residuals, needs, ct, exponent_ct=None):
    return (None if ct is None else torch.ldexp(ct, -residuals[0]),)


@jvp_rule(aten.frexp.Tensor)
def frexp_jvp(tangents, x):
    """[*S] -> mantissa [*S], exponent [*S]"""
    outs = tuple(torch.frexp(x))
    return outs, (torch.ldexp(tangents[0], -outs[1]), None)


# -- sgn: not holomorphic --------------------------------------------------------------------------


@vjp_rule(aten.sgn.default)
def sgn_vjp(needs, x):
    """[*S] -> [*S]; flat for real x."""
    out = torch.sgn(x)
    return (out, (x, out), _sgn_pullback) if x.is_complex() else (out, (), None)


def _sgn_pullback(residuals, needs, ct):
    return (None if ct is None else _around_circle(ct, *residuals),)


@jvp_rule(aten.sgn.default)
def sgn_jvp(tangents, x):
    """[*S] -> [*S]; flat for real x."""
    out = torch.sgn(x)
    return out, _around_circle(tangents[0], x, out) if x.is_complex() else None


def _around_circle(t, x, out):
    """The part of t across the direction of x, over |x|: a symmetric map, so its own transpose."""
    along = (t * out.conj()).real * out
    zero = x == 0
    return where(zero, 0.0, (t - along) / x.abs().masked_fill(zero, 1))
