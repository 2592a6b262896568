"""Derivatives of special functions, elementwise.

PyTorch's own formulas subtract nearly equal numbers far from 0 (erfcx, i0e, i1e, log_ndtr), have
right values at 0 but not right derivatives (i1, igamma), or do not exist, in which case PyTorch
gives zero gradients without a word (the other Bessel functions). The formulas are those of the NIST
Digital Library of Mathematical Functions; its numbers stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lamina.autodiff.declare import constant, pointwise
from lamina_core.errors import NotDifferentiableError, message
from lamina_core.overloads import aten

special = torch.special
where = torch.where

_SQRT_PI = math.sqrt(math.pi)


def _polynomial(x: Any, coefficients: list[float]) -> Any:
    """The sum of coefficients[k] * x**k."""
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


# -- logarithms times a factor, logit, sinc --------------------------------------------------------


def _logit(t: Any, x: Any, eps: Any) -> Any:
    low, high, outside = (0.0, 1.0, math.nan) if eps is None else (eps, 1.0 - eps, 0.0)
    inside = (x >= low) & (x <= high)
    x = where(inside, x, 0.5)
    return where(inside, t / (x * (1 - x)), outside)


def _sinc_slope(angle: Any) -> Any:
    """The derivative of sin(x) / x, near 0 by the series, whose derivatives are right there too."""
    near = angle.abs() < 0.5
    far = where(near, 1.0, angle)
    square = where(near, angle * angle, 0.0)
    series = torch.zeros_like(square)
    for k in range(8, 0, -1):
        series = series * square + (-1) ** k * 2 * k / math.factorial(2 * k + 1)
    return where(near, angle * series, (far.cos() - far.sin() / far) / far)


def _xlogy(t: Any, x: Any, y: Any) -> Any:
    """0 log y is 0 for every y, also for the t of 0."""
    flat = (x == 0) & (y <= 0)
    return where(flat, 0.0, torch.xlogy(t, where(flat, 1.0, y.to(t.dtype))))


def _xlogy_y(t: Any, x: Any, y: Any) -> Any:
    """At (0, 0) the quotient 0 / 0, as in torch, though 0 log y is 0 for every y."""
    return t * (x / y)


def _xlog1py(t: Any, x: Any, y: Any) -> Any:
    flat = (x == 0) & (y <= -1)
    return where(flat, 0.0, special.xlog1py(t, where(flat, 0.0, y.to(t.dtype))))


def _xlog1py_y(t: Any, x: Any, y: Any) -> Any:
    return t * (x / (y + 1))


pointwise(aten.logit.default, _logit)
pointwise(aten.sinc.default, lambda t, x: t * (_sinc_slope(x * math.pi) * math.pi))
pointwise(aten.special_entr.default, lambda t, x: -(t * (1 + x.log())))
pointwise(aten.special_xlog1py.default, _xlog1py, _xlog1py_y)
pointwise(
    aten.special_xlog1py.other_scalar, lambda t, x, other: _xlog1py(t, x, x.new_full((), other))
)
pointwise(aten.special_xlog1py.self_scalar, lambda t, x, self: t * (self / (x + 1)))
pointwise(aten.xlogy.Scalar_Other, lambda t, x, other: _xlogy(t, x, x.new_full((), other)))
pointwise(aten.xlogy.Scalar_Self, lambda t, x, self: t * self / x)
pointwise(aten.xlogy.Tensor, _xlogy, _xlogy_y)


# -- error functions and the normal distribution ---------------------------------------------------


def _gaussian(x: Any) -> Any:
    """exp(-x * x), which is 0 in every dtype long before the bounds; the square may overflow."""
    x = x.clamp(-100, 100)
    return (-x * x).exp()


# 1 / (2 x^2) - 3 / (4 x^4) + ... in powers of 1 / x^2, without the first factor: 7.12.1.
_ERFCX_FAR = [(-1) ** k * math.prod(range(1, 2 * k + 2, 2)) / 2 ** (k + 1) for k in range(18)]


def _erfcx(t: Any, x: Any, out: Any) -> Any:
    """`2 x erfcx(x) - 2 / sqrt(pi)`, and where these cancel their difference."""
    far = x > 8
    inverse = 1 / where(far, x, 8.0)
    square = inverse * inverse
    difference = square * _polynomial(square, _ERFCX_FAR) * (-2 / _SQRT_PI)
    near = where(far, 0.0, x) * where(far, 0.0, out) * 2 - 2 / _SQRT_PI
    return t * where(far, difference, near)


def _log_ndtr(t: Any, x: Any) -> Any:
    """The density over the distribution, `sqrt(2 / pi) exp(-z * z) / erfc(z)` with z below.

    Where erfc is small, erfcx is its product with the inverse of the exponential.
    """
    z = x * -math.sqrt(0.5)
    right = z > 0
    by_erfcx = 1 / special.erfcx(where(right, z, 0.0))
    z = where(right, 0.0, z)
    return t * (math.sqrt(2 / math.pi) * where(right, by_erfcx, _gaussian(z) / z.erfc()))


pointwise(aten.erf.default, lambda t, x: t * ((2 / _SQRT_PI) * _gaussian(x)))
pointwise(aten.erfc.default, lambda t, x: t * ((-2 / _SQRT_PI) * _gaussian(x)))
pointwise(aten.erfinv.default, lambda t, out: t * ((_SQRT_PI / 2) * (out * out).exp()))
pointwise(aten.special_erfcx.default, _erfcx)
pointwise(aten.special_log_ndtr.default, _log_ndtr)
pointwise(
    aten.special_ndtri.default, lambda t, out: t * ((out * out / 2).exp() * math.sqrt(2 * math.pi))
)


# -- Bessel functions ------------------------------------------------------------------------------


def _first_over_x(x: Any, first: Any, sign: float) -> Any:
    """`J1(x) / x` (sign -1) or `I1(x) / x` (sign 1), near 0 by their series: 10.2.2, 10.25.2."""
    near = x.abs() < 1
    series = [sign**k / (2 * 4**k * math.factorial(k) * math.factorial(k + 1)) for k in range(11)]
    small = where(near, x, 0.0)
    return where(near, _polynomial(small * small, series), first / where(near, 1.0, x))


_FAR = 30  # from where on the asymptotic series have all digits


def _asymptotic_slope(order: int, sign: float) -> list[float]:
    """Coefficients of 1 / x in the sum of `(k + 1/2) a_k / x**k`: 10.17.1, 10.40.1, 10.40.2.

    With `a_k` the scaled functions are multiples of the sum of `a_k / x**(k + 1/2)`, so this is
    minus the slope, less a factor `x**(-3/2)`.
    """
    found, a = [], 1.0
    for k in range(20):
        found.append((k + 0.5) * a)
        a *= sign * (4 * order * order - (2 * k + 1) ** 2) / (8 * (k + 1))
    return found


def _far_slope(size: Any, order: int, sign: float, factor: float) -> Any:
    """The derivative of a scaled Bessel function of `size`, right where `size` is beyond _FAR."""
    inverse = 1 / where(size > _FAR, size, float(_FAR))
    total = _polynomial(inverse, _asymptotic_slope(order, sign))
    return total * (inverse * inverse.sqrt()) * -factor


_OF_I, _OF_K = 1 / math.sqrt(2 * math.pi), math.sqrt(math.pi / 2)


def _i0e(t: Any, x: Any, out: Any) -> Any:
    near = special.i1e(x) - x.sgn() * out
    size = x.abs()
    return t * where(size > _FAR, x.sgn() * _far_slope(size, 0, -1, _OF_I), near)


def _i1(t: Any, x: Any, out: Any) -> Any:
    return t * (special.i0(x) - _first_over_x(x, out, 1))


def _i1e(t: Any, x: Any, out: Any) -> Any:
    size = x.abs()
    scale = where(size < 1, -size, 0.0).exp()
    ratio = where(size < 1, scale * _first_over_x(x, out, 1), _first_over_x(x, out, 1))
    near = special.i0e(x) - ratio - x.sgn() * out
    return t * where(size > _FAR, _far_slope(size, 1, -1, _OF_I), near)


def _k0e(t: Any, x: Any, out: Any) -> Any:
    near = out - special.scaled_modified_bessel_k1(x)
    return t * where(x > _FAR, _far_slope(x, 0, 1, _OF_K), near)


def _k1e(t: Any, x: Any, out: Any) -> Any:
    near = out - special.scaled_modified_bessel_k0(x) - out / x
    return t * where(x > _FAR, _far_slope(x, 1, 1, _OF_K), near)


# Order 0 by 10.6.3 and 10.29.3, order 1 by 10.6.2 and 10.29.2.
pointwise(aten.i0.default, lambda t, x: t * special.i1(x))
pointwise(aten.special_bessel_j0.default, lambda t, x: -(t * special.bessel_j1(x)))
pointwise(
    aten.special_bessel_j1.default,
    lambda t, x, out: t * (special.bessel_j0(x) - _first_over_x(x, out, -1)),
)
pointwise(aten.special_bessel_y0.default, lambda t, x: -(t * special.bessel_y1(x)))
pointwise(  # at 0 the second term outgrows the first
    aten.special_bessel_y1.default,
    lambda t, x, out: t * where(x == 0, math.inf, special.bessel_y0(x) - out / x),
)
pointwise(aten.special_i0e.default, _i0e)
pointwise(aten.special_i1.default, _i1)
pointwise(aten.special_i1e.default, _i1e)
pointwise(aten.special_modified_bessel_i0.default, lambda t, x: t * special.modified_bessel_i1(x))
pointwise(
    aten.special_modified_bessel_i1.default,
    lambda t, x, out: t * (special.modified_bessel_i0(x) - _first_over_x(x, out, 1)),
)
pointwise(
    aten.special_modified_bessel_k0.default, lambda t, x: -(t * special.modified_bessel_k1(x))
)
pointwise(
    aten.special_modified_bessel_k1.default,
    lambda t, x, out: -(t * (special.modified_bessel_k0(x) + out / x)),
)
pointwise(aten.special_scaled_modified_bessel_k0.default, _k0e)
pointwise(aten.special_scaled_modified_bessel_k1.default, _k1e)
pointwise(aten.special_spherical_bessel_j0.default, lambda t, x: t * _sinc_slope(x))


# -- gamma functions, zeta -------------------------------------------------------------------------


def _missing(name: str, operand: str) -> Callable[..., Any]:
    """The product of an operand that PyTorch and we have no formula for."""

    def product(t: Any) -> Any:
        raise NotDifferentiableError(
            message(
                f"aten.{name} has no derivative in {operand}: neither PyTorch nor Lamina has one",
                f"to fix: detach {operand}, or give a formula with lamina.custom_jvp",
            )
        )

    return product


def _gamma_density(a: Any, x: Any) -> Any:
    """`x**(a - 1) exp(-x) / Gamma(a)`: 8.8.13. Near 0 as a power, right in every derivative."""
    near = x < 1
    power = where(near, x, 1.0).pow(a - 1) * (-where(near, x, 0.0) - a.lgamma()).exp()
    beyond = where(near, 1.0, x)
    return where(near, power, ((a - 1) * beyond.log() - beyond - a.lgamma()).exp())


pointwise(aten.digamma.default, lambda t, x: t * torch.polygamma(1, x))
pointwise(
    aten.igamma.default, _missing("igamma", "input"), lambda t, x, y: t * _gamma_density(x, y)
)
pointwise(
    aten.igammac.default, _missing("igammac", "input"), lambda t, x, y: -(t * _gamma_density(x, y))
)
pointwise(aten.lgamma.default, lambda t, x: t * x.digamma())
pointwise(aten.polygamma.default, lambda t, x, n: t * torch.polygamma(n + 1, x))
pointwise(
    aten.special_zeta.default,
    _missing("special_zeta", "input"),
    lambda t, x, y: -(t * (x * special.zeta(x + 1, y))),
)
pointwise(aten.special_zeta.other_scalar, _missing("special_zeta", "input"))
pointwise(
    aten.special_zeta.self_scalar, lambda t, x, self: -(t * (self * special.zeta(self + 1.0, x)))
)


# -- without a formula in terms of what PyTorch has ------------------------------------------------


def _degree(n: Any) -> Any:
    """PyTorch takes a degree that is no integer for the next integer towards 0."""
    return n.trunc() if isinstance(n, torch.Tensor) else math.trunc(n)


def _polynomials(name: str, factor: int | None = None, slope: str = "") -> None:
    """Declare an orthogonal polynomial with the derivative `factor * n * slope(x, n - 1)`."""
    packet = getattr(aten, f"special_{name}")
    constant(packet.x_scalar)  # a function of the degree alone, which is an integer
    if factor is None:
        product = _missing(f"special_{name}", "input")
        pointwise(packet.default, product, None)
        pointwise(packet.n_scalar, product)
        return
    lower = getattr(special, slope)

    def by_tensor(t: Any, x: Any, y: Any) -> Any:
        return t * (factor * _degree(y) * lower(x, y - 1))

    def by_number(t: Any, x: Any, n: Any) -> Any:
        return t * (factor * _degree(n) * lower(x, n - 1))

    pointwise(packet.default, by_tensor, None)
    pointwise(packet.n_scalar, by_number)


# Those of Hermite are closed under differentiation, those of Chebyshev lead from the first kind to
# the second: 18.9.21, 18.9.25, 18.9.27.
_polynomials("chebyshev_polynomial_t", 1, "chebyshev_polynomial_u")
_polynomials("chebyshev_polynomial_u")
_polynomials("chebyshev_polynomial_v")
_polynomials("chebyshev_polynomial_w")
_polynomials("hermite_polynomial_h", 2, "hermite_polynomial_h")
_polynomials("hermite_polynomial_he", 1, "hermite_polynomial_he")
_polynomials("laguerre_polynomial_l")
_polynomials("legendre_polynomial_p")
_polynomials("shifted_chebyshev_polynomial_t", 2, "shifted_chebyshev_polynomial_u")
_polynomials("shifted_chebyshev_polynomial_u")
_polynomials("shifted_chebyshev_polynomial_v")
_polynomials("shifted_chebyshev_polynomial_w")
pointwise(aten.special_airy_ai.default, _missing("special_airy_ai", "input"))
