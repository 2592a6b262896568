"""Functions of several numbers at edges, three orders along a line in both modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath as mp
import pytest
import torch
from torch.nn import functional as F

from tests.autodiff.edges.oracle import MODES, along, derivatives, hold

special = torch.special
linalg = torch.linalg


@dataclass(frozen=True)
class Case:
    """A function of a vector with one number for a result, itself for mpmath, and where to try it.

    Attributes:
        f: The function of a tensor [n].
        reference: The same of a list of n numbers of mpmath.
        points: Vectors of n numbers. A pair of them is a point and the direction to go in; else
            that is one of no special meaning.
        steep: More of them, tried at first order: derivatives of higher ones are no floats.
        rtol: As in `test_elementwise`.
        atol: What is taken for 0.
    """

    f: Callable[[Any], Any]
    reference: Callable[[list[Any]], Any]
    points: Sequence[Any]
    steep: Sequence[Any] = ()
    rtol: float = 1e-8
    atol: float = 1e-12


def direction(count: int) -> list[float]:
    """Numbers between 0.4 and 1.3 of either sign."""
    return [(-1) ** (i // 2) * (0.4 + (0.37 * (i + 1)) % 0.9) for i in range(count)]


def hold_case(case: Case, order: int) -> None:
    """Every order of modes, at every point of a case."""
    for point in (*case.points, *(case.steep if order == 1 else ())):
        x, t = point if isinstance(point[0], tuple) else (point, direction(len(point)))

        def line(s: Any, x: Any = x, t: Any = t) -> Any:
            return case.reference([mp.mpf(a) + s * mp.mpf(b) for a, b in zip(x, t, strict=True)])

        expected = derivatives(line, 0.0, order)
        xs, ts = (torch.tensor(v, dtype=torch.float64) for v in (x, t))
        for modes in MODES[order]:
            found = along(case.f, ts, modes)(xs).item()
            hold([found], [expected], [f"{x} in mode {modes}"], case.rtol, case.atol)


def _norm(values, p):
    return sum(mp.fabs(v) ** p for v in values) ** (mp.mpf(1) / mp.mpf(p))


def _variance(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1)


def _logsumexp(values):
    top = max(values)
    return top + mp.log(sum(mp.exp(v - top) for v in values))


def _softplus(x):
    return mp.log1p(mp.exp(x)) if x < 0 else x + mp.log1p(mp.exp(-x))


def _power_of_2(y):
    return mp.mpf(2) ** y


TINY, HUGE = ((1e-200, 2e-200), (1e-200, -1e-200)), ((1e155, 2e155), (1e155, 1e154))

OF_TWO = {
    "atan2": Case(
        lambda v: torch.atan2(v[0], v[1]),
        lambda v: mp.atan2(v[0], v[1]),
        [(0.3, 1.7), (-2.0, 1e-8), (1.0, 0.0), (0.0, 1.0)],
        steep=[TINY, HUGE],
    ),
    "copysign": Case(
        lambda v: torch.copysign(v[0], v[1]),
        lambda v: mp.fabs(v[0]) * mp.sign(v[1]),
        [(0.3, -1.7), (-2.0, 1e-3)],
    ),
    "div": Case(
        lambda v: v[0] / v[1], lambda v: v[0] / v[1], [(0.3, 1.7), (0.0, 1e-3)], [TINY, HUGE]
    ),
    "float_power": Case(
        lambda v: torch.float_power(v[0], v[1]), lambda v: v[0] ** v[1], [(0.3, 1.7), (2.5, 0.0)]
    ),
    "fmod": Case(
        lambda v: torch.fmod(v[0], v[1]), lambda v: v[0] - 3 * v[1], [(5.5, 1.7), (-5.5, -1.7)]
    ),
    "hypot": Case(
        lambda v: torch.hypot(v[0], v[1]),
        lambda v: mp.hypot(v[0], v[1]),
        [(0.3, -1.7), (0.0, 2.0)],
        steep=[TINY, HUGE],
    ),
    "ldexp": Case(
        lambda v: torch.ldexp(v[0], v[1]), lambda v: v[0] * _power_of_2(v[1]), [(0.3, -1.7)]
    ),
    "logaddexp": Case(
        lambda v: torch.logaddexp(v[0], v[1]),
        _logsumexp,
        [(0.3, -1.7), (2.0, 2.0), (800.0, -800.0)],
    ),
    "logaddexp2": Case(
        lambda v: torch.logaddexp2(v[0], v[1]),
        lambda v: _logsumexp([x * mp.log(2) for x in v]) / mp.log(2),
        [(0.3, -1.7), (2.0, 2.0), (800.0, -800.0)],
    ),
    "pow": Case(
        lambda v: torch.pow(v[0], v[1]),
        lambda v: v[0] ** v[1],
        [(0.3, 1.7), (2.5, 0.0), (2.5, -1.3), (1e-3, 3.0)],
    ),
    "pow.at_0": Case(
        lambda v: torch.pow(v[0], torch.full_like(v[0], 3.0)), lambda v: v[0] ** 3, [(0.0,)]
    ),
    "remainder": Case(
        lambda v: torch.remainder(v[0], v[1]), lambda v: v[0] - 3 * v[1], [(5.5, 1.7), (-5.5, -1.7)]
    ),
    "xlog1py": Case(
        lambda v: special.xlog1py(v[0], v[1]),
        lambda v: v[0] * mp.log1p(v[1]),
        [(0.3, 1.7), (0.0, 1.7), (2.0, -0.999), (2.0, 1e-12)],
    ),
    "xlogy": Case(
        lambda v: torch.xlogy(v[0], v[1]),
        lambda v: v[0] * mp.log(v[1]),
        [(0.3, 1.7), (0.0, 1.7), (2.0, 1e-3)],
    ),
    "igamma": Case(
        lambda v: torch.igamma(torch.full_like(v[0], 2.5), v[0]),
        lambda v: mp.gammainc(2.5, 0, v[0], regularized=True),
        [(0.3,), (0.999,), (1.001,), (12.1,), (60.0,)],
    ),
    "igamma.at_0": Case(
        lambda v: sum(torch.igamma(torch.full_like(v[0], a), v[0]) for a in (1.0, 2.0, 3.0)),
        lambda v: 3 - mp.exp(-v[0]) * (3 + 2 * v[0] + v[0] ** 2 / 2),
        [(0.0,)],
    ),
    "igammac": Case(
        lambda v: torch.igammac(torch.full_like(v[0], 60.0), v[0]),
        lambda v: mp.gammainc(60, v[0], mp.inf, regularized=True),
        [(0.3,), (30.0,), (90.0,)],
    ),
}

OF_THREE = {
    "addcdiv": Case(
        lambda v: torch.addcdiv(v[0], v[1], v[2], value=0.7),
        lambda v: v[0] + mp.mpf(0.7) * v[1] / v[2],
        [(0.3, 1.7, -2.0)],
        steep=[((0.0, 1e-200, 2e-200), (1e-200, 1e-200, 1e-200))],
    ),
    "addcmul": Case(
        lambda v: torch.addcmul(v[0], v[1], v[2], value=0.7),
        lambda v: v[0] + mp.mpf(0.7) * v[1] * v[2],
        [(0.3, 1.7, -2.0)],
    ),
    "lerp": Case(
        lambda v: torch.lerp(v[0], v[1], v[2]),
        lambda v: v[0] + v[2] * (v[1] - v[0]),
        [(0.3, 1.7, 0.2), (0.3, 1.7, 0.9)],
    ),
}

_ZEROS = [
    (0.3, -1.7, 2.0, 0.5),
    (0.0, -1.7, 2.0, 0.5),
    (0.0, -1.7, 0.0, 0.5),
    (0.0, 0.0, 2.0, 0.0),
    (0.0, 0.0, 0.0, 0.0),
]
# A product that overflows although it is 0, and its derivatives with it.
_OVERFLOWING = [
    ((0.0, 0.0, 1e200, 1e200, 0.0, 0.0, 1e200), (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)),
    ((0.0, 1e200, 0.0, 0.0, 1e200, 0.0, 1e200), (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)),
]
_SPREAD = [(0.3, -1.7, 2.0, 0.5), (2.0, 2.0, 2.0, 2.0), (800.0, -800.0, 799.0, 0.0)]


def _scattered(v):
    """All of v multiplied into place 1 of three ones."""
    index = torch.ones(len(v), dtype=torch.long)
    return torch.ones(3, dtype=v.dtype).scatter_reduce(0, index, v, "prod")[1]


def _to_a_norm(v, maximum):
    norm = _norm(v, 2)
    return v[0] * (maximum / (norm + mp.mpf(1e-7)) if norm > maximum else 1)


REDUCTIONS = {
    "cumprod": Case(
        lambda v: v.cumprod(0)[-1], lambda v: mp.fprod(v), [*_ZEROS, *_OVERFLOWING], atol=1e-10
    ),
    "cumprod.within": Case(
        lambda v: v.cumprod(0)[2], lambda v: mp.fprod(v[:3]), [*_ZEROS, *_OVERFLOWING]
    ),
    "dist": Case(
        lambda v: torch.dist(v[:2], v[2:], 3),
        lambda v: _norm([v[0] - v[2], v[1] - v[3]], 3),
        _SPREAD[:1],
    ),
    "logcumsumexp": Case(
        lambda v: v.logcumsumexp(0)[2], lambda v: _logsumexp(v[:3]), [*_SPREAD, _SPREAD[2][::-1]]
    ),
    "log_softmax": Case(lambda v: v.log_softmax(0)[1], lambda v: v[1] - _logsumexp(v), _SPREAD),
    "logsumexp": Case(lambda v: v.logsumexp(0), _logsumexp, _SPREAD),
    "norm.1.5": Case(lambda v: linalg.vector_norm(v, 1.5), lambda v: _norm(v, 1.5), _SPREAD[:2]),
    "norm.2": Case(
        linalg.vector_norm,
        lambda v: _norm(v, 2),
        [*_SPREAD, (0.0, 0.0, 1.0, 0.0)],
    ),
    "norm.3": Case(
        lambda v: linalg.vector_norm(v, 3),
        lambda v: _norm(v, 3),
        [*_SPREAD[:2], ((0.0, 3.0, 1.0, 0.0), (0.0, 1.0, 0.3, 0.0))],
    ),
    "norm.inf": Case(lambda v: linalg.vector_norm(v, torch.inf), lambda v: v[2], _SPREAD[:1]),
    "prod": Case(torch.prod, lambda v: mp.fprod(v), [*_ZEROS, *_OVERFLOWING]),
    "prod.dim": Case(lambda v: v.prod(0), lambda v: mp.fprod(v), [*_ZEROS, *_OVERFLOWING]),
    "renorm": Case(
        lambda v: v.unsqueeze(0).renorm(2, 0, 1.5)[0, 0],
        lambda v: _to_a_norm(v, 1.5),
        [_SPREAD[0], (0.1, 0.2, 0.0, 0.3)],
    ),
    "renorm.to_0": Case(
        lambda v: v.unsqueeze(0).renorm(2, 0, 0.0).sum(),
        lambda v: 0 * v[0],
        [(0.0, 0.0), (1.0, 2.0)],
    ),
    "scatter_reduce.prod": Case(_scattered, lambda v: mp.fprod(v), _ZEROS[:3]),
    "softmax": Case(
        lambda v: v.softmax(0)[1], lambda v: mp.exp(v[1] - _logsumexp(v)), _SPREAD, atol=1e-14
    ),
    "std": Case(torch.std, lambda v: mp.sqrt(_variance(v)), [_SPREAD[0], _SPREAD[2]]),
    "var": Case(torch.var, _variance, _SPREAD),
}


def _logits(x, y, weight=1):
    return weight * y * _softplus(-x) + (1 - y) * _softplus(x)


def _huber(gap, delta):
    gap = mp.fabs(gap)
    return gap**2 / 2 if gap < delta else delta * (gap - mp.mpf(delta) / 2)


_LABELS = torch.tensor([1.0, 0.0, 1.0, 0.3], dtype=torch.float64)
_SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
_SCORES = [(0.3, -1.7, 2.0, 0.5), (38.0, -38.0, 5.0, -12.1), (-800.0, 800.0, 800.0, 0.0)]
# One score that is nearly right: nothing is added to what it contributes.
_FOUND = [(38.0,), (300.0,)]
_WEIGHT = torch.tensor([1.7], dtype=torch.float64)

LOSSES = {
    "bce": Case(
        lambda v: F.binary_cross_entropy(v, _LABELS, reduction="sum"),
        lambda v: (
            -sum(
                y * mp.log(x) + (1 - y) * mp.log(1 - x)
                for x, y in zip(v, _LABELS.tolist(), strict=True)
            )
        ),
        [(0.3, 0.9, 0.5, 0.4), (0.999, 1e-3, 0.5, 0.5)],
    ),
    "bce_with_logits": Case(
        lambda v: F.binary_cross_entropy_with_logits(v, _LABELS, reduction="sum"),
        lambda v: sum(_logits(x, y) for x, y in zip(v, _LABELS.tolist(), strict=True)),
        _SCORES,
    ),
    "bce_with_logits.found": Case(
        lambda v: F.binary_cross_entropy_with_logits(v, torch.ones_like(v)),
        lambda v: _logits(v[0], 1),
        _FOUND,
        atol=0.0,
    ),
    "bce_with_logits.missed": Case(
        lambda v: F.binary_cross_entropy_with_logits(-v, torch.zeros_like(v)),
        lambda v: _logits(-v[0], 0),
        _FOUND,
        atol=0.0,
    ),
    "bce_with_logits.weighted": Case(
        lambda v: F.binary_cross_entropy_with_logits(v, torch.ones_like(v), pos_weight=_WEIGHT),
        lambda v: _logits(v[0], 1, mp.mpf(1.7)),
        _FOUND,
        atol=0.0,
    ),
    "cross_entropy": Case(
        lambda v: F.cross_entropy(v.unsqueeze(0), torch.tensor([1])),
        lambda v: _logsumexp(v) - v[1],
        _SCORES,
    ),
    "huber": Case(
        lambda v: F.huber_loss(v, torch.zeros_like(v), reduction="sum", delta=0.7),
        lambda v: sum(_huber(x, 0.7) for x in v),
        [(0.3, -1.7, 2.0, 0.5)],
    ),
    "kl_div": Case(
        lambda v: F.kl_div(_LABELS, v, reduction="sum"),
        lambda v: sum(x * (mp.log(x) - y) for x, y in zip(v, _LABELS.tolist(), strict=True)),
        [(0.3, 1.7, 2.0, 1e-3)],
    ),
    "poisson_nll": Case(
        lambda v: F.poisson_nll_loss(v, _LABELS, reduction="sum"),
        lambda v: sum(mp.exp(x) - y * x for x, y in zip(v, _LABELS.tolist(), strict=True)),
        _SCORES[:1],
    ),
    "smooth_l1": Case(
        lambda v: F.smooth_l1_loss(v, torch.zeros_like(v), reduction="sum", beta=0.7),
        lambda v: sum(_huber(x, 0.7) / 0.7 for x in v),
        [(0.3, -1.7, 2.0, 0.5)],
    ),
    "soft_margin": Case(
        lambda v: F.soft_margin_loss(v, _SIGNS, reduction="sum"),
        lambda v: sum(_softplus(-x * y) for x, y in zip(v, _SIGNS.tolist(), strict=True)),
        _SCORES,
    ),
}

ALL = {**OF_TWO, **OF_THREE, **REDUCTIONS, **LOSSES}


@pytest.mark.parametrize("order", MODES)
@pytest.mark.parametrize("name", ALL)
def test_derivatives(name, order):
    hold_case(ALL[name], order)
