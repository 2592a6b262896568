"""The laws of derivatives under derivatives and under `vmap`, each a function of one `Point`.

All follow from four facts of a function f at a point x, which `Facts` has from PyTorch alone: its
value, its pullback P(x, u), its pushforward T(x, t), and the second derivative
H(x, u, t) = d/dx Re<P(x, u), t>. That is a symmetric map of t, so one H serves every order of the
two modes:

| composition | of what | gives |
|---|---|---|
| vjp of vjp | P in (x, u), cotangent t | H and T(x, t) |
| jvp of vjp | P in (x, u), tangents t and v | H + P(x, v) |
| vjp of jvp | T in (x, t), cotangent u | H and P(x, u) |
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

import lamina
from tests.laws import (
    close,
    examples,
    kept_outputs,
    noise,
    of_reference,
    restricted,
    stacked,
    try_on_all,
)
from tests.oracles import pull_back
from tests.samples import BATCH, LEFT_OUT, NOT_UNDER, Case, cases, database

Tensors = tuple[torch.Tensor, ...]
SAMPLES = 2  # of each kind of dtype: what is tried here is tried thirteen times
ENTRIES = 200_000  # jacobians of more entries than this are left to the other laws

_WIDE = (torch.float64, torch.complex128)


@dataclass(frozen=True)
class Facts:
    """What must come out at one point, for one cotangent u, v and tangent t.

    Attributes:
        u, v: Cotangents of the outputs.
        t: Tangents of the primals.
        pulled_u, pulled_v: P(x, u) and P(x, v).
        pushed: T(x, t).
        second: H(x, u, t).
    """

    u: Tensors
    v: Tensors
    t: Tensors
    pulled_u: Tensors
    pulled_v: Tensors
    pushed: Tensors
    second: Tensors


@dataclass(frozen=True)
class Point:
    """A case with its facts, for each example of a batch.

    Attributes:
        case: The operator on a sample.
        kept: The outputs that have a derivative.
        facts: One for each example; of a random case only for the first.
        loose: Whether the facts are right to a few digits only.
    """

    case: Case
    kept: list[int]
    facts: tuple[Facts, ...]
    loose: bool

    @property
    def text(self) -> str:
        """What to print about it."""
        return self.case.text


@functools.lru_cache(maxsize=2)
def points(name: str) -> tuple[Point, ...]:
    """The points of an operator at which the laws are tried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, on what it deprecates
        return tuple(_points(name))


def _points(name: str) -> Iterator[Point]:
    for case in cases(name, "vjp", SAMPLES):
        if not case.differentiable:
            continue
        kept = kept_outputs(case, case.generations[0])
        if not kept:
            continue
        # Tensors without a derivative, such as indices, are those of the first example.
        count = 1 if case.random else BATCH
        rows = [examples(case, case.differentiable, i) for i in range(count)]
        made = [_facts(case, row, kept, i) for i, row in enumerate(rows)]
        narrow = any(case.generations[0][k].dtype not in _WIDE for k in case.differentiable)
        loose = case.loose or narrow or any(rough for _, rough in made)
        yield Point(case, kept, tuple(facts for facts, _ in made), loose)


def _facts(case: Case, row: Tensors, kept: list[int], seed: int) -> tuple[Facts, bool]:
    """The facts at one example, and whether some are central differences."""
    f, x = restricted(of_reference(case), row, kept)

    def at(x: Sequence[torch.Tensor], track: bool) -> tuple[Tensors, Tensors]:
        leaves = tuple(p.detach().requires_grad_() for p in x)
        torch.manual_seed(0)
        with torch.set_grad_enabled(True):
            outs = f(*leaves)
        return leaves, outs if track else tuple(o.detach() for o in outs)

    def pull(x: Sequence[torch.Tensor], u: Tensors) -> Tensors:
        leaves, outs = at(x, True)
        return tuple(g.detach() for g in pull_back(outs, leaves, u, create_graph=False))

    _, outs = at(x, False)
    u = tuple(noise(o, 1000 * seed + i) for i, o in enumerate(outs))
    v = tuple(noise(o, 1000 * seed + 100 + i) for i, o in enumerate(outs))
    t = tuple(noise(p, 1000 * seed + 200 + i) for i, p in enumerate(x))
    by_autograd = _second(at, x, u, t)
    if by_autograd is None:
        pushed = _difference(lambda moved: at(moved, False)[1], x, t)
        second = _difference(lambda moved: pull(moved, u), x, t)
    else:
        pushed, second = by_autograd
    facts = Facts(u, v, t, pull(x, u), pull(x, v), pushed, second)
    return facts, by_autograd is None


def _second(at: Callable, x: Tensors, u: Tensors, t: Tensors) -> tuple[Tensors, Tensors] | None:
    """T and H by differentiating PyTorch's pullback; None if it has no finite derivative."""
    try:
        leaves, outs = at(x, True)
        probes = tuple(ct.clone().requires_grad_() for ct in u)
        pulled = pull_back(outs, leaves, probes, create_graph=True)
        if not any(p.requires_grad for p in pulled):  # zero whatever the cotangents are
            return tuple(map(torch.zeros_like, u)), tuple(map(torch.zeros_like, x))
        found = pull_back(pulled, (*leaves, *probes), t, create_graph=False)
    except (RuntimeError, NotImplementedError):
        return None
    if not all(g.isfinite().all() for g in found):
        return None
    return found[len(x) :], found[: len(x)]


def _difference(f: Callable[..., Tensors], x: Tensors, t: Tensors) -> Tensors:
    step = 1e-6 if x[0].dtype in _WIDE else 1e-3
    ahead, behind = (
        f([p + sign * step * d for p, d in zip(x, t, strict=True)]) for sign in (1, -1)
    )
    return tuple((hi - lo) / (2 * step) for hi, lo in zip(ahead, behind, strict=True))


# ---------------------------------------------------------------------------------------------
# The compositions, as functions of (x, u, v, t) for one example
# ---------------------------------------------------------------------------------------------


def _seeded(transform: Callable, *args: object) -> object:
    torch.manual_seed(0)
    return transform(*args)


def _pullback(f: Callable) -> Callable:
    return lambda x, u: _seeded(lamina.vjp, f, *x)[1](u)


def _pushforward(f: Callable) -> Callable:
    return lambda x, t: _seeded(lamina.jvp, f, x, t)[1]


def _vjp(f: Callable, x: Tensors, u: Tensors, v: Tensors, t: Tensors) -> Tensors:
    return _pullback(f)(x, u)


def _jvp(f: Callable, x: Tensors, u: Tensors, v: Tensors, t: Tensors) -> Tensors:
    return _pushforward(f)(x, t)


def _vjp_of_vjp(f: Callable, x: Tensors, u: Tensors, v: Tensors, t: Tensors) -> Tensors:
    second, pushed = lamina.vjp(_pullback(f), x, u)[1](t)
    return (*second, *pushed)


def _jvp_of_vjp(f: Callable, x: Tensors, u: Tensors, v: Tensors, t: Tensors) -> Tensors:
    return lamina.jvp(_pullback(f), (x, u), (t, v))[1]


def _vjp_of_jvp(f: Callable, x: Tensors, u: Tensors, v: Tensors, t: Tensors) -> Tensors:
    second, pulled = lamina.vjp(_pushforward(f), x, t)[1](u)
    return (*second, *pulled)


@dataclass(frozen=True)
class Composition:
    """What Lamina computes at one example, and what must come out by the facts."""

    run: Callable[..., Tensors]
    expected: Callable[[Facts], Tensors]


COMPOSITIONS = {
    "vjp": Composition(_vjp, lambda k: k.pulled_u),
    "jvp": Composition(_jvp, lambda k: k.pushed),
    "vjp_vjp": Composition(_vjp_of_vjp, lambda k: (*k.second, *k.pushed)),
    "jvp_vjp": Composition(
        _jvp_of_vjp,
        lambda k: tuple(a + b for a, b in zip(k.second, k.pulled_v, strict=True)),
    ),
    "vjp_jvp": Composition(_vjp_of_jvp, lambda k: (*k.second, *k.pulled_u)),
}


# ---------------------------------------------------------------------------------------------
# The laws
# ---------------------------------------------------------------------------------------------


def at_a_point(composition: Composition, point: Point) -> bool:
    """The composition gives what the facts say."""
    f, x = restricted(point.case, point.case.generations[0], point.kept)
    facts = point.facts[0]
    found = composition.run(f, x, facts.u, facts.v, facts.t)
    close(found, composition.expected(facts), "at a point", point.loose)
    return True


def under_vmap(composition: Composition, point: Point) -> bool:
    """Mapped over primals, cotangents and tangents, it gives what the facts of each say."""
    if point.case.random:
        return False
    f, _ = restricted(point.case, point.case.generations[0], point.kept)

    def run(x: Tensors, u: Tensors, v: Tensors, t: Tensors) -> Tensors:
        return composition.run(f, x, u, v, t)

    found = lamina.vmap(run)(*batches(point))
    close(found, _stacked_results(composition, point), "under vmap", point.loose)
    return True


def of_vmap(composition: Composition, point: Point) -> bool:
    """Of the mapped function it gives the same: examples do not influence each other."""
    if point.case.random:
        return False
    f, _ = restricted(point.case, point.case.generations[0], point.kept)
    found = composition.run(lamina.vmap(f), *batches(point))
    close(found, _stacked_results(composition, point), "of vmap", point.loose)
    return True


def batches(point: Point) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """Primals, u, v and t of all examples, stacked."""
    case = point.case
    rows = [examples(case, case.differentiable, i) for i in range(BATCH)]
    primals = stacked([[row[k] for k in case.differentiable] for row in rows])
    return primals, *(stacked([getattr(k, name) for k in point.facts]) for name in "uvt")


def _stacked_results(composition: Composition, point: Point) -> Tensors:
    return stacked([composition.expected(facts) for facts in point.facts])


def jacobians(point: Point) -> bool:
    """`jacrev == jacfwd`, and applied to a tangent they give the pushforward; real values only."""
    facts = point.facts[0]
    f, x = restricted(point.case, point.case.generations[0], point.kept)
    everything = (*x, *facts.u)
    entries = sum(p.numel() for p in x) * sum(u.numel() for u in facts.u)
    if point.case.random or any(t.is_complex() for t in everything) or entries > ENTRIES:
        return True  # a jacobian maps, and means little of what is drawn, complex or huge
    if not all(out.isfinite().all() for out in f(*x)):
        return True  # where rows are NaN, it depends on the order of sums which of their zeros are
    argnums = tuple(range(len(x)))
    reverse, forward = lamina.jacrev(f, argnums)(*x), lamina.jacfwd(f, argnums)(*x)
    for i, (from_reverse, from_forward) in enumerate(zip(reverse, forward, strict=True)):
        # One has the dtypes of the inputs, the other that of the output, where the two differ.
        cast = [r.to(j.dtype) for r, j in zip(from_reverse, from_forward, strict=True)]
        close(cast, from_forward, f"jacrev and jacfwd of output {i}", point.loose)
    rows = [
        sum(torch.tensordot(j, t.to(j.dtype), t.dim()) for j, t in zip(row, facts.t, strict=True))
        for row in forward
    ]
    close(rows, facts.pushed, "the jacobian applied to a tangent", point.loose)
    return True


def _all_laws() -> dict[str, Callable[[Point], bool]]:
    twice = ("vjp_vjp", "jvp_vjp", "vjp_jvp")
    plan = [
        *(("", at_a_point, name) for name in twice),
        *(("vmap_", under_vmap, name) for name in ("jvp", *twice)),
    ]
    laws = {p + name: functools.partial(law, COMPOSITIONS[name]) for p, law, name in plan}
    for name in ("vjp", "jvp"):
        laws[f"{name}_vmap"] = functools.partial(of_vmap, COMPOSITIONS[name])
    return {**laws, "jacobians": jacobians}


LAWS = _all_laws()


def operators(law: str) -> list[str]:
    """The operators that a law speaks of: those with a derivative, unless it is no function's."""
    excluded = NOT_UNDER["jvp"]
    if law == "jacobians" or "vmap" in law:
        excluded = excluded | NOT_UNDER["vmap_vjp"]
    names = [name for name, op in database().items() if op.supports_autograd]
    return [name for name in names if name not in LEFT_OUT and name not in excluded]


def pairs(names: list[str] | None = None) -> list[tuple[str, str]]:
    """Pairs of an operator and a law, by operator, whose points are then computed once."""
    spoken = {law: frozenset(operators(law)) for law in LAWS}
    names = list(database()) if names is None else names
    return [(name, law) for name in names for law in LAWS if name in spoken[law]]


def hold(name: str, law: str) -> None:
    """Fails unless the law holds at every point of the operator (or is expected not to)."""
    try_on_all(name, law, points(name), LAWS[law])
