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
from lamina.autodiff.declare import jvp_rule, pointwise, vjp_rule
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
    """Two roots: that of the product has another branch cut, and the square may overflow.

    For real x the sign is that of the square, so that at -1 the slope is infinite as at 1.
    """
    size = x if x.is_complex() else x.abs()
    return t * ((size + 1).rsqrt() * (size - 1).rsqrt())


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


def _atan2_pulled(t, this, other):
    """At (0, 0) reverse mode gives 0, as torch does, and forward mode the quotient 0 / 0."""
    nowhere = (this == 0) & (other == 0)
    size = torch.hypot(where(nowhere, 1.0, this), other)
    return t * where(nowhere, 0.0, (this / size) / size)


def _copysign(t, x, out):
    """Out over x, the quotient as signs, whose derivatives are 0; 0 at 0."""
    return t * where(x.isfinite(), x.sgn() * out.sgn(), math.nan)


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
    """x**0 is flat at 0 and NaN as well; elsewhere the slope is 0, but the mixed one is 1 / x."""
    return t * (y * where((x.abs() > 0) | (y != 0), x, 1.0).pow(y - 1))


def _pow_exponent(t, x, y, out):
    """0**y is flat where y >= 0, though log(0) is not finite."""
    grows = (y.real >= 0) & (y.imag == 0) if y.is_complex() else y >= 0
    flat = (x == 0) & grows
    return where(flat, 0.0, t * (out * where(flat, 1.0, x.to(out.dtype)).log()))


def _pow_of_number(t, x, self, out):
    """As `_pow_exponent`, the base a number: its logarithm is one too, NaN for a negative base."""
    if self == 0:
        grows = (x.real >= 0) & (x.imag == 0) if x.is_complex() else x >= 0
        return where(grows, 0.0, t * -math.inf)
    if isinstance(self, complex) or x.is_complex():
        return t * (out * cmath.log(self))
    return t * (out * (math.log(self) if self > 0 else math.nan))


# -- forward mode where the terms are not simply added: else infinities of two terms meet ----------


def _complex_jvp(tangents, x, y):
    """[*S], [*S] -> [*S]"""
    parts = [torch.zeros_like(v) if t is None else t for v, t in zip((x, y), tangents, strict=True)]
    return torch.complex(x, y), torch.complex(*parts)


def _div_jvp(tangents, x, y):
    """[*S], [*S] -> [*S]; one quotient, of the difference."""
    x_t, y_t = tangents
    out = x / y
    t = x_t
    if y_t is not None:
        t = -(y_t * out) if x_t is None else x_t - y_t * out
    return out, in_dtype(t / y, out.dtype)


def _lerp_jvp(tangents, x, y, weight):
    """[*S], [*S], weight [*S] or a number -> [*S]; lerp of the tangents."""
    x_t, y_t, weight_t = (*tangents, None)[:3]
    terms = [] if weight_t is None else [weight_t * (y - x)]
    if x_t is None or y_t is None:
        terms += [] if x_t is None else [x_t * (1 - weight)]
        terms += [] if y_t is None else [y_t * weight]
    else:
        terms.append(torch.lerp(x_t, y_t, weight))
    out = torch.lerp(x, y, weight)
    return out, sum(terms[1:], terms[0]).expand(out.shape)


def _polar_jvp(tangents, x, y):
    """[*S], [*S] -> [*S]; part by part."""
    x_t, y_t = tangents
    cos, sin = y.cos(), y.sin()
    parts = []
    for along, across in ((cos, -(x * sin)), (sin, x * cos)):
        terms = [t * s for t, s in ((x_t, along), (y_t, across)) if t is not None]
        parts.append(sum(terms[1:], terms[0]))
    return torch.polar(x, y), torch.complex(*parts)


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
    lambda t, x, y: _atan2_pulled(t, y, x),
    lambda t, x, y: -_atan2_pulled(t, x, y),
    forward=(lambda t, x, y: _atan2(t, y, x), lambda t, x, y: -_atan2(t, x, y)),
)
pointwise(  # parts, and no product with i, which makes a NaN of an infinite part
    aten.complex.default, lambda t: t, lambda t: -t.imag, forward=_complex_jvp
)
pointwise(aten.copysign.Tensor, _copysign, None)
pointwise(
    aten.div.Tensor,
    lambda t, y: t / y,
    lambda t, x, y: -(t * ((x / y) / y)),
    forward=_div_jvp,
)
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
    aten.ldexp.Tensor, lambda t, y: _times_power(t, y), lambda t, out: t * (out * _LN2)
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
pointwise(  # reverse mode takes the direction of the result, which has none at 0
    aten.polar.default,
    lambda t, x, out: t * (out.sgn() * x.sgn()),
    lambda t, out: t * (out * 1j),
    forward=_polar_jvp,
)
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
pointwise(
    aten.lerp.Scalar,
    lambda t, weight: t * (1 - weight),
    lambda t, weight: t * weight,
    forward=_lerp_jvp,
)
pointwise(
    aten.lerp.Tensor,
    lambda t, z: t * (1 - z),
    lambda t, z: t * z,
    lambda t, x, y: t * (y - x),
    forward=_lerp_jvp,
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

# -- frexp -----------------------------------------------------------------------------------------


def _times_power(t, exponent):
    """`ldexp` as a product: of an integer exponent below 0, PyTorch's own derivative is 0."""
    return t * torch.ldexp(torch.ones_like(t), exponent)


@vjp_rule(aten.frexp.Tensor)
def frexp_vjp(needs, x):
    """[*S] -> mantissa [*S], exponent [*S]; PyTorch's power of 2 is of single precision."""
    outs = tuple(torch.frexp(x))
    return outs, (outs[1],), _frexp_pullback


def _frexp_pullback(residuals, needs, ct, exponent_ct=None):
    return (None if ct is None else _times_power(ct, -residuals[0]),)


@jvp_rule(aten.frexp.Tensor)
def frexp_jvp(tangents, x):
    """[*S] -> mantissa [*S], exponent [*S]"""
    outs = tuple(torch.frexp(x))
    return outs, (_times_power(tangents[0], -outs[1]), None)


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
