"""Derivatives of every order, from mpmath: an oracle that shares no code with what it checks.

A function is written once more for numbers of mpmath. Its derivatives are differences at so many
digits that nothing is left of their error in a float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import torch

from lamina import grad, jvp

__all__ = ["MODES", "along", "derivatives", "elementwise", "hold"]

DIGITS = 55  # of the step; a central difference has twice as many right, if it spans no kink
SPARE = 110  # so many more are computed with, so that what a difference leaves is below NOTHING
NOTHING = 1e-100

# Which modes the orders are taken in, the innermost last: "r" is grad, "f" is jvp.
MODES = {1: ("r", "f"), 2: ("rr", "ff", "rf", "fr"), 3: ("rrr", "fff", "frf", "rfr")}


def derivatives(f: Callable[[Any], Any], point: float, order: int) -> float:
    """The derivative of a function of a number of mpmath, as a float; the order 0 is its value."""
    size = abs(point)
    exponent = math.ceil(abs(math.log10(size))) if size else 0
    small, large = 0 < size < 1e-5, size > 1e5
    with mpmath.workdps(DIGITS * (order + 2) + SPARE + (exponent * order if small else 0)):
        x, step = mpmath.mpf(point), mpmath.mpf(10) ** -DIGITS
        if small or large:
            step *= size
        terms = [
            (-1) ** k * mpmath.binomial(order, k) * f(x + (mpmath.mpf(order) / 2 - k) * step)
            for k in range(order + 1)
        ]
        found = mpmath.re(mpmath.fsum(terms) / step**order)
        return math.inf if abs(found) > torch.finfo(torch.float64).max else float(found)


def elementwise(f: Callable[..., Any], modes: str) -> Callable[..., Any]:
    """A derivative of an elementwise function, one letter of MODES an order."""
    for mode in reversed(modes):
        f = _slopes(f) if mode == "r" else _pushed(f)
    return f


def _slopes(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: grad(lambda x: f(x).sum())(x)


def _pushed(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


def along(f: Callable[..., Any], t: torch.Tensor, modes: str) -> Callable[..., Any]:
    """A derivative of a function with one number for a result, each order along t."""
    for mode in reversed(modes):
        f = _dotted(f, t) if mode == "r" else _pushed_along(f, t)
    return f


def _dotted(f: Callable[..., Any], t: torch.Tensor) -> Callable[..., Any]:
    return lambda x: (grad(f)(x) * t).sum()


def _pushed_along(f: Callable[..., Any], t: torch.Tensor) -> Callable[..., Any]:
    return lambda x: jvp(f, (x,), (t,))[1]


def hold(
    found: Sequence[float], expected: Sequence[float], what: Any, rtol: float, atol: float
) -> None:
    """Compare numbers; one too large for a float may come out as NaN."""
    wrong = []
    for value, right, where in zip(found, expected, what, strict=True):
        if math.isinf(right):
            fine = abs(value) > 1e290 or math.isnan(value)
        else:
            fine = abs(value - right) <= max(rtol * abs(right), atol, NOTHING)
        if not fine:
            wrong.append(f"at {where}: found {value!r}, expected {right!r}")
    assert not wrong, "\n".join(wrong)
