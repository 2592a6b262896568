"""More rules for intervals, of which derivatives are made; by somebody else again."""

import math

import torch

from tests.extend.interval import Interval, ends, hull

aten = torch.ops.aten


@Interval.rule(aten.pow.Tensor_Scalar)
def power(level, x, exponent):
    if exponent < 0 or exponent % 1:
        return NotImplemented
    out = hull(level, x.lo**exponent, x.hi**exponent)
    zero = torch.where((x.lo < 0) & (x.hi > 0) & (exponent % 2 == 0), 0.0, out.lo)
    return level.wrap(zero, hi=out.hi)


@Interval.rule(aten.cos.default)
def cos(level, x):
    return torch.sin(x + math.pi / 2)


@Interval.rule(aten.gt.Scalar, aten.gt.Tensor)
def gt(level, x, y):
    """Certainly, and possibly."""
    return level.wrap(x.lo > ends(y)[1], hi=x.hi > ends(y)[0])


@Interval.rule(aten.where.self)
def where(level, condition, x, y):
    both, either = ends(condition)
    lo = torch.where(both, x.lo, torch.where(either, torch.minimum(x.lo, y.lo), y.lo))
    return level.wrap(
        lo, hi=torch.where(both, x.hi, torch.where(either, torch.maximum(x.hi, y.hi), y.hi))
    )


@Interval.rule(aten.threshold_backward.default)
def threshold_backward(level, ct, x, threshold):
    return torch.where(x > threshold, ct, ct * 0)
