"""To whom the running torch gives a derivative at ties, bounds and NaN, where calculus is silent.

Ops such as `maximum` and `clamp` return one of their operands. Which of two equal operands the
derivative belongs to, or what becomes of it at a NaN, differs between ops, between reverse and
forward mode, and between versions of torch. So torch is asked, once, when this module is loaded:
each op is differentiated at points where its operands stand in every order, which gives the weight
of each operand. The weights are kept as a tree of comparisons, so a rule costs what it would cost
if it had been written down.

It is asked in a thread of its own: what the caller may have switched on (`torch.no_grad`, inference
mode, autocast, dispatch modes, hooks, a transform) belongs to the caller's thread.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina_core.torch_hooks.autograd import (
    enter_dual_level,
    exit_dual_level,
    forward_ad,
    make_dual,
    unpack_dual,
)
from lamina_core.torch_hooks.threads import in_own_thread

__all__ = ["CHOICES", "Choice", "asked", "share"]

# A weight, or `(comparison, place, place)` and the trees for where it holds and where it does not.
Tree = Any

_NAN = math.nan
_TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "nan": lambda x, _: x.isnan() if isinstance(x, torch.Tensor) else math.isnan(x),
}


def share(tree: Tree, t: Any, operands: Sequence[Any]) -> Any:
    """The part of a cotangent or tangent that a tree of weights gives one operand."""
    found = _shared(tree, t, operands)
    return torch.zeros_like(t) if isinstance(found, float) else found


def _shared(tree: Tree, t: Any, operands: Sequence[Any]) -> Any:
    if isinstance(tree, float):
        return t if tree == 1 else t * tree if tree else 0.0
    (test, i, j), yes, no = tree
    holds = _TESTS[test](operands[i], operands[j])
    if isinstance(holds, bool):  # of two bounds that are numbers
        return _shared(yes if holds else no, t, operands)
    return torch.where(holds, _shared(yes, t, operands), _shared(no, t, operands))


@dataclass(frozen=True)
class Choice:
    """How an op that returns one of its operands shares out a derivative.

    Attributes:
        reverse: For each differentiable operand the tree of its weight in reverse mode.
        forward: The same in forward mode.
        blends: Whether forward mode multiplies by the weights, so that the tangent of an operand
            that is not chosen makes a NaN if it is infinite.
    """

    reverse: tuple[Tree, ...]
    forward: tuple[Tree, ...]
    blends: bool

    def pulled(self, place: int, t: Any, *operands: Any) -> Any:
        """The cotangent of one operand."""
        return share(self.reverse[place], t, operands)

    def pushed(self, place: int, t: Any, *operands: Any) -> Any:
        """What the tangent of one operand contributes."""
        if not self.blends:
            return share(self.forward[place], t, operands)
        part = t * share(self.forward[0], torch.ones_like(t), operands)
        return part if place == 0 else t - part


# -- the questions ---------------------------------------------------------------------------------


def _orders(count: int) -> tuple[tuple[float, ...], ...]:
    """Every order in which operands can stand, each of them NaN or not."""
    found = {}
    for values in itertools.product((0.0, 1.0, 2.0, _NAN), repeat=count):
        known = sorted({v for v in values if v == v})
        if known == [float(i) for i in range(len(known))]:
            found[tuple("nan" if v != v else v for v in values)] = values
    return tuple(found.values())


def _with_numbers(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op whose bounds are numbers, as a function of tensors that have one bound a place."""

    def spread(x: Any, *bounds: Any) -> Any:
        rows = list(zip(*(bound.tolist() for bound in bounds), strict=True))
        out = x
        for row in {str(row): row for row in rows}.values():
            here = torch.tensor([str(other) == str(row) for other in rows], device="cpu")
            out = torch.where(here, op(x, *row), out)
        return out

    return spread


# The op on tensors, how many operands it chooses among, how many of them are differentiable.
_QUESTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "clamp": (_with_numbers(torch.clamp), 3, 1),
    "clamp max": (_with_numbers(lambda x, y: torch.clamp(x, max=y)), 2, 1),
    "clamp min": (_with_numbers(lambda x, y: torch.clamp(x, min=y)), 2, 1),
    "clamp.Tensor": (torch.clamp, 3, 3),
    "clamp.Tensor max": (lambda x, y: torch.clamp(x, max=y), 2, 2),
    "clamp.Tensor min": (lambda x, y: torch.clamp(x, min=y), 2, 2),
    "clamp_max": (_with_numbers(torch.clamp_max), 2, 1),
    "clamp_max.Tensor": (torch.clamp_max, 2, 2),
    "clamp_min": (_with_numbers(torch.clamp_min), 2, 1),
    "clamp_min.Tensor": (torch.clamp_min, 2, 2),
    "fmax": (torch.fmax, 2, 2),
    "fmin": (torch.fmin, 2, 2),
    "maximum": (torch.maximum, 2, 2),
    "minimum": (torch.minimum, 2, 2),
}


def asked() -> dict[str, Choice]:
    """Ask torch, in a thread of its own."""
    return in_own_thread(
        lambda: {name: _choice(*question) for name, question in _QUESTIONS.items()}
    )


def _choice(op: Callable[..., Any], count: int, wanted: int) -> Choice:
    orders = _orders(count)
    values = [_column(column) for column in zip(*orders, strict=True)]
    ones = torch.ones_like(values[0])
    leaves = [value.clone().requires_grad_() for value in values[:wanted]]
    # Of the sum, for a cotangent that is given makes torch load its symbolic shapes: half a second.
    pulled = torch.autograd.grad(op(*leaves, *values[wanted:]).sum(), leaves)
    pushed = [_pushed(op, values, wanted, place, ones) for place in range(wanted)]
    infinite = _pushed(op, values, wanted, 0, ones * math.inf)
    blends = wanted == 2 and bool((infinite.isnan() & (pushed[0] == 0)).any())
    return Choice(
        tuple(_tree(count, tuple(weights.tolist())) for weights in pulled),
        tuple(_tree(count, tuple(weights.tolist())) for weights in pushed),
        blends,
    )


def _column(values: Sequence[float]) -> Any:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _pushed(op: Callable[..., Any], values: Sequence[Any], wanted: int, at: int, t: Any) -> Any:
    """The tangent for the tangent t of one operand, those of the others zero."""
    level = forward_ad._current_level  # there is one for the process; the caller may be in it
    mine = level < 0
    if mine:
        level = enter_dual_level()
    try:
        duals = [
            make_dual(value, t if place == at else torch.zeros_like(t), level=level)
            for place, value in enumerate(values[:wanted])
        ]
        return unpack_dual(op(*duals, *values[wanted:]), level=level).tangent.clone()
    finally:
        if mine:
            exit_dual_level(level=level)


# -- trees of comparisons --------------------------------------------------------------------------


@functools.lru_cache
def _splits(count: int) -> tuple[tuple[tuple[str, int, int], int], ...]:
    """Each comparison, with the orders where it holds as the bits of a number."""
    orders = _orders(count)
    pairs = list(itertools.combinations(range(count), 2))
    tests = [(test, i, j) for test in ("<", ">", "<=", ">=", "==") for i, j in pairs]
    tests += [("nan", i, i) for i in range(count)]
    held = {
        (test, i, j): sum(
            1 << k
            for k, order in enumerate(orders)
            if (order[i] != order[i] if test == "nan" else _TESTS[test](order[i], order[j]))
        )
        for test, i, j in tests
    }
    return tuple(held.items())


@functools.cache
def _tree(count: int, weights: tuple[float, ...]) -> Tree:
    """The comparisons that tell the weight of an operand in every order."""
    places: dict[float, int] = {}
    for k, weight in enumerate(weights):
        places[weight] = places.get(weight, 0) | 1 << k
    return _grown(_splits(count), tuple(places.items()), (1 << len(weights)) - 1)


def _grown(splits: Any, places: tuple[tuple[float, int], ...], among: int) -> Tree:
    here = [(weight, bits & among) for weight, bits in places if bits & among]
    if len(here) == 1:
        return here[0][0] + 0.0  # minus zero is zero

    def mixed(bits: int) -> int:
        """How far a set of orders is from having one weight."""
        size = bits.bit_count()
        return size - max((part & bits).bit_count() for _, part in here)

    test, held = min(
        (split for split in splits if 0 < (among & split[1]).bit_count() < among.bit_count()),
        key=lambda split: mixed(among & split[1]) + mixed(among & ~split[1]),
    )
    return test, _grown(splits, places, among & held), _grown(splits, places, among & ~held)


CHOICES = asked()
