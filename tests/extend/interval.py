"""Interval arithmetic, by somebody who knows `lamina.extend` and nothing else of Lamina.

`interval(f)(lo, hi)` gives bounds of `f` over all arguments between `lo` and `hi`.
"""

import functools
import math

import torch

from lamina.extend import LevelTensor, RuleInterpreter, pytree

aten = torch.ops.aten


class IntervalTensor(LevelTensor):
    """Stands for every tensor between its value, `lo`, and `hi`."""

    __slots__ = ("hi",)
    lo = property(lambda self: self.value)


class Interval(RuleInterpreter):
    wrapper = IntervalTensor
    transform = "interval"

    def constant(self, value):
        return self.wrap(value, hi=value)

    def is_constant(self, x):
        return x.lo is x.hi

    @classmethod
    def family(cls, known):
        """Ops that never fall where an operand rises act on each bound alone."""
        rising = known.is_structural or known.name.split(".")[1] in RISING
        return functools.partial(at_each_bound, known.op) if rising else None


RISING = frozenset(
    "_to_copy amax amin ceil clamp cumsum exp floor index_put index_select log logsumexp maximum "
    "mean minimum relu sigmoid softplus sqrt sum tanh".split()
)


def side(tree, bound):
    """The tree with one bound in the place of every interval."""
    return pytree.tree_map(lambda x: getattr(x, bound, x), tree)


def at_each_bound(op, level, *args, **kwargs):
    los, his = op(*side(args, "lo"), **kwargs), op(*side(args, "hi"), **kwargs)
    return pytree.tree_map(lambda lo, hi: level.wrap(lo, hi=hi), los, his)


def ends(x):
    return (x.lo, x.hi) if isinstance(x, IntervalTensor) else (x, x)


def hull(level, *corners):
    lo, hi = functools.reduce(torch.minimum, corners), functools.reduce(torch.maximum, corners)
    return level.wrap(lo, hi=hi)


@Interval.rule(aten.neg.default)
def neg(level, x):
    return level.wrap(-x.hi, hi=-x.lo)


@Interval.rule(aten.add.Tensor)
def add(level, x, y, *, alpha=1):
    lo, hi = ends(y if alpha == 1 else y * alpha)
    return level.wrap(x.lo + lo, hi=x.hi + hi)


@Interval.rule(aten.sub.Tensor)
def sub(level, x, y, *, alpha=1):
    return x + y * -alpha


@Interval.rule(aten.rsub.Scalar)
def rsub(level, x, y, alpha=1):
    return x * -alpha + y


@Interval.rule(aten.mul.Tensor)
def mul(level, x, y):
    return hull(level, *(a * b for a in ends(x) for b in ends(y)))


@Interval.rule(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(level, x, y):
    """Around the product of the centres; exact where one operand is a constant."""
    (x, x_rad), (y, y_rad) = (((z.hi + z.lo) / 2, (z.hi - z.lo) / 2) for z in (x, y))
    out, rad = x @ y, x.abs() @ y_rad + x_rad @ (y.abs() + y_rad)
    return level.wrap(out - rad, hi=out + rad)


@Interval.rule(aten.sin.default)
def sin(level, x):
    """Between the ends, unless there is a crest or a trough between them."""
    trough, crest = (
        x.hi > torch.ceil((x.lo - at) * (0.5 / math.pi)) * (2 * math.pi) + at
        for at in (-math.pi / 2, math.pi / 2)
    )
    out = hull(level, x.lo.sin(), x.hi.sin())
    return level.wrap(torch.where(trough, -1.0, out.lo), hi=torch.where(crest, 1.0, out.hi))


def interval(f):
    @functools.wraps(f)
    def bounds(lo, hi):
        with Interval() as level:
            args = pytree.tree_map(lambda lo, hi: level.argument(lo, hi=hi), lo, hi)
            outs = level.results(f(args))
        return side(outs, "lo"), side(outs, "hi")

    return bounds
