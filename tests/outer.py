"""The law of the caller's autograd: it may differentiate whatever a transform has computed.

A function f of an operator's inputs is given them multiplied by a factor of ones that requires grad
and that no transform knows of. What `torch.autograd` then says of a transform of f in that factor
must be what it says of the same quantity computed by `torch.autograd` alone, in reverse mode.

PyTorch lacks some second derivatives, and reads statistics and factorisations as constants in some
that it has. So an answer other than its own must be the slope of what the transform itself gives.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import lamina
from tests import devices
from tests.laws import close, examples, kept_outputs, noise, of_reference, restricted, try_on_all
from tests.oracles import pull_back
from tests.samples import LEFT_OUT, NOT_UNDER, Case, cases, database

Tensors = tuple[torch.Tensor, ...]
SAMPLES = 2  # of each kind of dtype
MAPPED = 2  # examples, cotangents or tangents under vmap
_WIDE = (torch.float64, torch.complex128)


@dataclass(frozen=True)
class Given:
    """What a composition is computed of.

    Attributes:
        f: The function of the inputs of one example.
        xs: The inputs, for each example.
        us: Cotangents of the outputs, likewise.
        ts: Tangents of the inputs, likewise.
    """

    f: Callable[..., Tensors]
    xs: Sequence[Tensors]
    us: Sequence[Tensors]
    ts: Sequence[Tensors]


@dataclass(frozen=True)
class Composition:
    """A quantity by transforms, and by `torch.autograd` alone at one example."""

    ours: Callable[[Given], Tensors]
    theirs: Callable[[Callable, Tensors, Tensors, Tensors], Tensors]
    mapped: str = ""  # which of x, u and t are, the others being those of the first example


# ---------------------------------------------------------------------------------------------
# By PyTorch
# ---------------------------------------------------------------------------------------------


_grad = functools.partial(pull_back, create_graph=True)


def _leaves(tensors: Tensors) -> Tensors:
    return tuple(t.detach().requires_grad_() for t in tensors)


def _value(f: Callable, x: Tensors, u: Tensors, t: Tensors) -> Tensors:
    return f(*x)


def _pulled(f: Callable, x: Tensors, u: Tensors, t: Tensors) -> Tensors:
    x = _leaves(x)
    return _grad(f(*x), x, u)


def _pushed(f: Callable, x: Tensors, u: Tensors, t: Tensors) -> Tensors:
    x, probes = _leaves(x), _leaves(u)
    return _grad(_grad(f(*x), x, probes), probes, t)


def _second(f: Callable, x: Tensors, u: Tensors, t: Tensors) -> Tensors:
    x = _leaves(x)
    return _grad(_grad(f(*x), x, u), x, t)


# ---------------------------------------------------------------------------------------------
# By transforms
# ---------------------------------------------------------------------------------------------


def _stack(rows: Sequence[Tensors]) -> Tensors:
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _pullback(f: Callable, u: Tensors) -> Callable:
    return lambda *x: lamina.vjp(f, *x)[1](u)


def _vmap(g: Given) -> Tensors:
    return lamina.vmap(g.f)(*_stack(g.xs))


def _jvp(g: Given) -> Tensors:
    return lamina.jvp(g.f, g.xs[0], g.ts[0])[1]


def _vjp(g: Given) -> Tensors:
    return lamina.vjp(g.f, *g.xs[0])[1](g.us[0])


def _vmap_jvp(g: Given) -> Tensors:
    return lamina.vmap(lambda x, t: lamina.jvp(g.f, x, t)[1])(_stack(g.xs), _stack(g.ts))


def _vmap_vjp(g: Given) -> Tensors:
    return lamina.vmap(lambda x, u: lamina.vjp(g.f, *x)[1](u))(_stack(g.xs), _stack(g.us))


def _directions(g: Given) -> Tensors:
    pushforward = lamina.linearize(g.f, *g.xs[0])[1]
    return lamina.vmap(lambda t: pushforward(*t))(_stack(g.ts))


def _rows(g: Given) -> Tensors:
    return lamina.vmap(lamina.vjp(g.f, *g.xs[0])[1])(_stack(g.us))


def _vjp_vjp(g: Given) -> Tensors:
    return lamina.vjp(_pullback(g.f, g.us[0]), *g.xs[0])[1](g.ts[0])


def _jvp_vjp(g: Given) -> Tensors:
    return lamina.jvp(_pullback(g.f, g.us[0]), g.xs[0], g.ts[0])[1]


def _vjp_jvp(g: Given) -> Tensors:
    pushforward = lambda *x: lamina.jvp(g.f, x, g.ts[0])[1]
    return lamina.vjp(pushforward, *g.xs[0])[1](g.us[0])


def _rows_vjp(g: Given) -> Tensors:
    return lamina.vmap(lamina.vjp(_pullback(g.f, g.us[0]), *g.xs[0])[1])(_stack(g.ts))


COMPOSITIONS = {
    "outer_vmap": Composition(_vmap, _value, "x"),
    "outer_jvp": Composition(_jvp, _pushed),
    "outer_vjp": Composition(_vjp, _pulled),
    "outer_vmap_jvp": Composition(_vmap_jvp, _pushed, "xt"),
    "outer_vmap_vjp": Composition(_vmap_vjp, _pulled, "xu"),
    "outer_directions": Composition(_directions, _pushed, "t"),
    "outer_rows": Composition(_rows, _pulled, "u"),
    "outer_vjp_vjp": Composition(_vjp_vjp, _second),
    "outer_jvp_vjp": Composition(_jvp_vjp, _second),
    "outer_vjp_jvp": Composition(_vjp_jvp, _second),
    "outer_rows_vjp": Composition(_rows_vjp, _second, "t"),
}


# ---------------------------------------------------------------------------------------------
# The law
# ---------------------------------------------------------------------------------------------


def follows(composition: Composition, case: Case) -> bool:
    """The gradient in the factor is that of `torch.autograd` alone, or else the slope of ours."""
    if case.random or not case.differentiable:
        return False
    kept = kept_outputs(case, case.generations[0])
    if not kept or case.generations[0][case.differentiable[0]].dtype not in _WIDE:
        return False
    run = _Run(composition, case, kept)
    try:
        expected = run.gradient(run.theirs)
    except (RuntimeError, NotImplementedError):
        expected = None  # PyTorch has no formula
    try:
        found = run.gradient(run.ours)
    except RuntimeError as error:
        if expected is None and isinstance(error, (NotImplementedError, RuntimeError)):
            return True
        raise
    if expected is not None and all(e.isfinite().all() for e in expected):
        try:
            close(found, expected, "the gradient in the factor", case.loose)
        except AssertionError:
            if not run.is_slope(found):
                raise
    elif all(f.isfinite().all() for f in found):
        assert run.is_slope(found), "the gradient is not the slope of what the transform gives"
    return True


class _Run:
    """A composition at the examples of a case."""

    def __init__(self, composition: Composition, case: Case, kept: list[int]) -> None:
        self.composition, self.case, self.kept = composition, case, kept
        self.rows = [examples(case, case.differentiable, i) for i in range(MAPPED)]
        _, first = restricted(case, self.rows[0], kept)
        self.factors = tuple(map(torch.ones_like, first))
        self.xs = [tuple(row[k] for k in case.differentiable) for row in self.rows]
        outs = self.function(case, self.factors)(*self.xs[0])
        seeds = [1000 * i for i in range(MAPPED)]
        self.us = [tuple(noise(o, s + i) for i, o in enumerate(outs)) for s in seeds]
        self.ts = [tuple(noise(p, s + 200 + i) for i, p in enumerate(first)) for s in seeds]

    def function(self, case: Case, factors: Tensors) -> Callable[..., Tensors]:
        f, _ = restricted(case, self.rows[0], self.kept)
        return lambda *x: f(*[p * w for p, w in zip(x, factors, strict=True)])

    def ours(self, factors: Tensors) -> Tensors:
        f = self.function(self.case, factors)
        return tuple(self.composition.ours(Given(f, self.xs, self.us, self.ts)))

    def theirs(self, factors: Tensors) -> Tensors:
        f, mapped = self.function(of_reference(self.case), factors), self.composition.mapped
        rows = []
        for i in range(MAPPED if mapped else 1):
            x, u, t = (
                values[i if name in mapped else 0]
                for name, values in (("x", self.xs), ("u", self.us), ("t", self.ts))
            )
            rows.append(self.composition.theirs(f, x, u, t))
        return _stack(rows) if mapped else rows[0]

    def total(self, outs: Tensors) -> torch.Tensor:
        """A weighted sum of the outputs, whose weights are no symmetric ones."""
        return sum((o * noise(o, 500 + i).conj()).real.sum() for i, o in enumerate(outs))

    def gradient(self, run: Callable[[Tensors], Tensors]) -> Tensors:
        """What the caller's autograd says of the total in the factors."""
        factors = _leaves(self.factors)
        devices.seed(0)
        with torch.enable_grad():
            total = self.total(run(factors))
            return tuple(g.detach() for g in _grad((total,), factors, (torch.ones_like(total),)))

    def is_slope(self, found: Tensors) -> bool:
        """Whether a gradient is that of what the transform gives, by differences of two steps."""
        direction = tuple(noise(w, 900 + i) for i, w in enumerate(self.factors))
        slopes = []
        for step in (1e-3, 5e-4):
            ahead, behind = (
                self.total(
                    self.ours(
                        tuple(
                            w + sign * step * d
                            for w, d in zip(self.factors, direction, strict=True)
                        )
                    )
                ).item()
                for sign in (1, -1)
            )
            slopes.append((ahead - behind) / (2 * step))
        expected = (4 * slopes[1] - slopes[0]) / 3
        actual = sum(
            (g.conj() * d).real.sum().item() for g, d in zip(found, direction, strict=True)
        )
        size = sum((g.abs() * d.abs()).sum().item() for g, d in zip(found, direction, strict=True))
        return abs(actual - expected) <= 1e-5 * max(1.0, abs(expected), size)


# Of whom the two ways do not say the same.
NOT_ASKED = {
    "nn.functional.gaussian_nll_loss": "it clamps in place under no_grad, and such a write keeps "
    "cotangents as they were, and pushes tangents that are constants for autograd",
}


def operators() -> list[str]:
    """The operators that the law speaks of: those with a derivative, unless it is no function's."""
    excluded = NOT_UNDER["jvp"] | NOT_UNDER["vmap_vjp"] | NOT_ASKED
    names = [name for name, op in database().items() if op.supports_autograd]
    return [name for name in names if name not in LEFT_OUT and name not in excluded]


def pairs(names: list[str] | None = None) -> list[tuple[str, str]]:
    """Pairs of an operator and a law."""
    return [(n, law) for n in (operators() if names is None else names) for law in COMPOSITIONS]


def hold(name: str, law: str) -> None:
    """Fails unless the law holds for every case of the operator (or is expected not to)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, on what it deprecates
        subjects = cases(name, "vjp", SAMPLES)
    try_on_all(name, law, subjects, lambda case: follows(COMPOSITIONS[law], case) or True)
