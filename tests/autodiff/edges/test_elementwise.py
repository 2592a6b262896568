"""Elementwise ops at interior points and at edges, three orders in both modes, against mpmath.

The points are where formulas fail: 0, so small or so large that a square under- or overflows, close
to branch points and far out in tails. At kinks see `test_kinks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath as mp
import pytest
import torch
from torch.nn import functional as F

from tests.autodiff.edges.oracle import MODES, derivatives, elementwise, hold

special = torch.special

REAL = (0.0, 0.3, -0.3, 1.7, -1.7, 5.3, -5.3, 1e-8, 1e-160)
TAILS = (12.1, -12.1, 38.0, -38.0, 200.0, -200.0)
FAR = (1e10, 1e155, -1e155)
POSITIVE = (0.3, 1.7, 5.3, 12.1, 200.0, 1e-3, 1e-8, 1e-100, 1e-160)
UNIT = (0.0, 0.3, -0.3, 0.9, 0.999, 1 - 1e-8, -1 + 1e-8, 1e-8, 1e-160)
WITHOUT_0 = tuple(p for p in REAL if p)


@dataclass(frozen=True)
class Case:
    """An elementwise function, itself again for mpmath, and where to try it.

    Attributes:
        f: The function of a tensor.
        reference: The same of a number of mpmath.
        points: Where its derivatives exist.
        rtol: How well the values of PyTorch's own kernels agree with mpmath.
        atol: What is taken for 0. For functions with bounds whose derivatives are made of the
            result, as PyTorch makes them: the digits of a tail are those of its distance from 1.
    """

    f: Callable[[Any], Any]
    reference: Callable[[Any], Any]
    points: Sequence[float]
    rtol: float = 1e-9
    atol: float = 0.0


def _sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def _softplus(x):
    return mp.log1p(mp.exp(x)) if x < 0 else x + mp.log1p(mp.exp(-x))


def _ndtr(x):
    return mp.erfc(-x / mp.sqrt(2)) / 2


def _log_ndtr(x):
    return mp.log(_ndtr(x)) if x < 0 else mp.log1p(-_ndtr(-x))


def _of_cube(x):
    return mp.sqrt(2 / mp.pi) * (x + mp.mpf(0.044715) * x**3)


def _either(x, low, high):
    return low(x) if x < 0 else high(x)


_SCALE, _ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

CASES = {
    # of the real line
    "abs": Case(torch.abs, mp.fabs, WITHOUT_0 + FAR),
    "asinh": Case(torch.asinh, mp.asinh, REAL + FAR),
    "atan": Case(torch.atan, mp.atan, REAL + FAR),
    "cos": Case(torch.cos, mp.cos, REAL),
    "cosh": Case(torch.cosh, mp.cosh, REAL + TAILS),
    "erf": Case(torch.erf, mp.erf, REAL + TAILS + (1e155,)),
    "erfc": Case(torch.erfc, mp.erfc, REAL + TAILS),
    "exp": Case(torch.exp, mp.exp, REAL + TAILS),
    "exp2": Case(torch.exp2, lambda x: mp.mpf(2) ** x, REAL + TAILS),
    "expm1": Case(torch.expm1, mp.expm1, REAL + TAILS),
    "pow.2": Case(lambda x: x**2, lambda x: x**2, REAL + FAR),
    "pow.3": Case(lambda x: x**3, lambda x: x**3, REAL + FAR[:1]),
    "pow.tensor": Case(lambda x: x ** torch.full_like(x, 2.0), lambda x: x**2, REAL),
    "pow.of_number": Case(lambda x: 2.5**x, lambda x: mp.mpf(2.5) ** x, REAL + TAILS),
    "sigmoid": Case(torch.sigmoid, _sigmoid, REAL + TAILS, atol=1e-15),
    "sin": Case(torch.sin, mp.sin, REAL),
    "sinc": Case(torch.sinc, mp.sincpi, (*REAL, 0.1, 0.159, 0.16, 0.2)),
    "sinh": Case(torch.sinh, mp.sinh, REAL + TAILS),
    "tan": Case(torch.tan, mp.tan, REAL),
    "tanh": Case(torch.tanh, mp.tanh, REAL + TAILS, atol=1e-15),
    # of a half-line or an interval
    "acos": Case(torch.acos, mp.acos, UNIT, rtol=1e-7),
    "acosh": Case(torch.acosh, mp.acosh, (1 + 1e-8, 1.001, 1.5, 3.0, 1e3, 1e10, 1e155), rtol=1e-7),
    "asin": Case(torch.asin, mp.asin, UNIT, rtol=1e-7),
    "atanh": Case(torch.atanh, mp.atanh, UNIT, rtol=1e-7),
    "erfinv": Case(torch.erfinv, mp.erfinv, (*UNIT[:5], 1e-8)),
    "log": Case(torch.log, mp.log, POSITIVE + FAR[:2]),
    "log10": Case(torch.log10, mp.log10, POSITIVE + FAR[:2]),
    "log1p": Case(torch.log1p, mp.log1p, (*POSITIVE, 0.0, -0.3, -1 + 1e-8, *FAR[:1]), rtol=1e-7),
    "log2": Case(torch.log2, lambda x: mp.log(x, 2), POSITIVE + FAR[:2]),
    "logit": Case(
        torch.logit, lambda x: mp.log(x / (1 - x)), (0.3, 0.5, 0.9, 1 - 1e-8, 1e-8, 1e-90), 1e-7
    ),
    "pow.fraction": Case(lambda x: x**1.5, lambda x: x ** mp.mpf(1.5), POSITIVE + FAR[:1]),
    "pow.negative": Case(lambda x: x**-2, lambda x: x**-2, POSITIVE),
    "reciprocal": Case(torch.reciprocal, lambda x: 1 / x, POSITIVE),
    "rsqrt": Case(torch.rsqrt, lambda x: 1 / mp.sqrt(x), POSITIVE + FAR[:1]),
    "sqrt": Case(torch.sqrt, mp.sqrt, POSITIVE + FAR[:2]),
    "xlogy.self": Case(lambda x: torch.xlogy(3.0, x), lambda x: 3 * mp.log(x), POSITIVE),
    # gamma functions
    "digamma": Case(torch.digamma, mp.digamma, (0.3, -0.3, 1.7, 5.3, 200.0, 1e-3, 1e8)),
    "lgamma": Case(
        torch.lgamma,
        lambda x: mp.log(mp.fabs(mp.gamma(x))) if x < 1e3 else mp.loggamma(x),
        (0.3, -0.3, 1.7, 5.3, 200.0, 1e-3, 1e8),
    ),
    "mvlgamma": Case(
        lambda x: torch.mvlgamma(x, 3),
        lambda x: sum(mp.loggamma(x - mp.mpf(k) / 2) for k in range(3)),
        (1.2, 3.0, 50.0),
    ),
    "polygamma": Case(
        lambda x: torch.polygamma(1, x), lambda x: mp.polygamma(1, x), (0.3, 1.7, 5.3, 200.0, 1e-3)
    ),
    # activations
    "celu": Case(
        lambda x: F.celu(x, 0.5),
        lambda x: _either(x, lambda x: mp.expm1(2 * x) / 2, lambda x: x),
        WITHOUT_0 + TAILS,
    ),
    "elu": Case(
        lambda x: F.elu(x, 0.5),
        lambda x: _either(x, lambda x: mp.expm1(x) / 2, lambda x: x),
        WITHOUT_0 + TAILS,
    ),
    "gelu": Case(F.gelu, lambda x: x * _ndtr(x), REAL + TAILS + (1e155,), atol=1e-15),
    "gelu.tanh": Case(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x / 2 * (1 + mp.tanh(_of_cube(x))),
        REAL + TAILS,
        atol=1e-13,
    ),
    "hardsigmoid": Case(F.hardsigmoid, lambda x: min(max(x / 6 + 0.5, 0), 1), REAL + TAILS),
    "hardswish": Case(F.hardswish, lambda x: x * min(max(x + 3, 0), 6) / 6, REAL + TAILS),
    "logsigmoid": Case(F.logsigmoid, lambda x: -_softplus(-x), REAL + TAILS, atol=1e-15),
    "mish": Case(F.mish, lambda x: x * mp.tanh(_softplus(x)), REAL + TAILS, atol=1e-13),
    "selu": Case(
        F.selu,
        lambda x: _SCALE * _either(x, lambda x: _ALPHA * mp.expm1(x), lambda x: x),
        WITHOUT_0 + TAILS,
    ),
    "silu": Case(F.silu, lambda x: x * _sigmoid(x), REAL + TAILS, atol=1e-13),
    "softplus": Case(
        lambda x: F.softplus(x, 2.0, 900.0),
        lambda x: _softplus(2 * x) / 2,
        REAL + TAILS,
        atol=1e-14,
    ),
    "softsign": Case(F.softsign, lambda x: x / (1 + mp.fabs(x)), WITHOUT_0 + TAILS),
    "tanhshrink": Case(F.tanhshrink, lambda x: x - mp.tanh(x), REAL + TAILS, atol=1e-15),
    # special functions
    "entr": Case(special.entr, lambda x: -x * mp.log(x), POSITIVE),
    "erfcx": Case(
        special.erfcx,
        lambda x: mp.exp(x * x) * mp.erfc(x),
        (*REAL, 7.9, 8.1, 12.1, 38.0, 200.0, 1e4),
    ),
    "i0": Case(special.i0, lambda x: mp.besseli(0, x), (*REAL, 0.99, 1.01, 38.0, -200.0)),
    "i0e": Case(
        special.i0e,
        lambda x: mp.besseli(0, x) * mp.exp(-mp.fabs(x)),
        (*WITHOUT_0, 29.9, 30.1, -38.0, 200.0, 1e4),
    ),
    "i1": Case(special.i1, lambda x: mp.besseli(1, x), (*REAL, 0.99, 1.01, 38.0, -200.0)),
    "i1e": Case(
        special.i1e,
        lambda x: mp.besseli(1, x) * mp.exp(-mp.fabs(x)),
        (*WITHOUT_0, 0.99, 1.01, 29.9, 30.1, -38.0, 200.0, 1e4),
    ),
    "log_ndtr": Case(special.log_ndtr, _log_ndtr, (*REAL, *TAILS, 1e4, -1e4), rtol=1e-7),
    "ndtr": Case(special.ndtr, _ndtr, REAL + TAILS),
    "ndtri": Case(
        special.ndtri,
        lambda x: mp.sqrt(2) * mp.erfinv(2 * x - 1),
        (0.3, 0.5, 0.9, 0.999, 1e-3, 1e-8),
    ),
    "zeta": Case(
        lambda x: special.zeta(torch.full_like(x, 2.5), x),
        lambda x: mp.zeta(2.5, x),
        (0.3, 1.7, 12.1, 200.0),
    ),
}


@pytest.mark.parametrize("order", MODES)
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, order):
    case = CASES[name]
    x = torch.tensor(case.points, dtype=torch.float64)
    expected = [derivatives(case.reference, p, order) for p in case.points]
    for modes in MODES[order]:
        found = elementwise(case.f, modes)(x).tolist()
        hold(found, expected, [f"{p} in mode {modes}" for p in case.points], case.rtol, case.atol)
