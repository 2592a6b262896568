"""The laws of derivatives at the kinks: at ties, bounds, zeros, infinities and NaN.

What the derivative is there is a convention, and the one that counts is that of the running
torch: its reverse mode for `vjp`, its forward mode for `jvp`. The samples are those of PyTorch's
table with other values in them, drawn from a small pool so that every value meets itself again: see
`POOLS`.
What PyTorch refuses is left out, and so is what draws random numbers. `tests.exempt` has the places
where the laws are not asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

import lamina
from tests.exempt import EXEMPT
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
SAMPLES = 4

# What the values of a sample are drawn from. "bounds" stands for the numbers among its arguments.
# The last three are drawn like ties, and differ in the cotangents, in the indices, in the sizes.
_TIES = (-1.0, -0.5, 0.0, 0.5, 1.0)
POOLS: dict[str, tuple[float | str, ...]] = {
    "zeros": (0.0,),
    "ties": _TIES,
    "bounds": (0.0, "bounds"),
    "unit interval": (0.0, 0.5, 1.0),
    "infinities": (-math.inf, -1.0, 0.0, 1.0, math.inf),
    "minus infinity": (-math.inf,),
    "nan": (*_TIES, math.nan),
    "infinite cotangents": _TIES,
    "repeated indices": _TIES,
    "empty": _TIES,
}
_UNUSUAL = (0.0, 1.0, math.inf, math.nan)  # cotangents and tangents
# Of complex values: whatever is not finite depends on how a product is written.
COMPLEX_POOLS = ("zeros", "ties", "bounds", "repeated indices", "empty")

# Bounds that are no arguments.
BUILT_IN: dict[str, tuple[float, ...]] = {
    "nn.functional.hardsigmoid": (-3.0, 3.0),
    "nn.functional.hardswish": (-3.0, 3.0),
    "nn.functional.relu6": (6.0,),
    "nn.functional.softplus": (20.0,),
}


# PyTorch reads memory out of bounds where a grid is not finite, or where there are no points, and
# crashes.
_NOT_FINITE = ("infinities", "minus infinity", "nan")
CRASHES: dict[str, tuple[str, ...]] = {
    "grid_sampler_2d": _NOT_FINITE,
    "grid_sampler_3d": _NOT_FINITE,
    "nn.functional.grid_sample": _NOT_FINITE,
    "nn.functional.pdist": ("empty",),
}


@dataclass(frozen=True)
class Kink:
    """A case at special values, with what PyTorch says there, for each example of a batch.

    Attributes:
        case: The operator on a sample.
        pool: What its values are drawn from.
        text: What to print about it.
        kept: The outputs that have a derivative.
        facts: One for each example.
    """

    case: Case
    pool: str
    text: str
    kept: list[int]
    facts: tuple[Facts, ...]


@dataclass(frozen=True)
class Facts:
    """What plain PyTorch gives at one point.

    Attributes:
        outs: The value.
        u: Cotangents of the outputs.
        t: Tangents of the primals.
        pulled: What `torch.autograd.grad` makes of u.
        pushed: What `torch.autograd.forward_ad` makes of t; without a formula the transpose of
            `torch.autograd.grad`; None without either.
    """

    outs: Tensors
    u: Tensors
    t: Tensors
    pulled: Tensors
    pushed: Tensors | None


@functools.lru_cache(maxsize=2)
def kinks(name: str, seed: int = 0, count: int = SAMPLES) -> tuple[Kink, ...]:
    """The special points of an operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, on what it deprecates
        return tuple(_kinks(name, seed, count))


def _kinks(name: str, seed: int, count: int) -> Iterator[Kink]:
    for i, case in enumerate(cases(name, "vjp", count)):
        if case.random or not case.differentiable:
            continue
        real = not any(t.is_complex() for t in case.generations[0])
        for pool in POOLS if real else COMPLEX_POOLS:
            made = _kink(name, case, pool, f"{name} {seed} {i}")
            if made is not None:
                yield made


def _kink(name: str, case: Case, pool: str, seed: str) -> Kink | None:
    if pool in CRASHES.get(name, ()):
        return None
    values = _values(name, case, pool)
    if len(values) < len(POOLS[pool]):
        return None
    generations = tuple(
        tuple(
            _drawn(t, values, f"{seed} {pool} {g} {k}") if k in case.differentiable else t
            for k, t in enumerate(generation)
        )
        for g, generation in enumerate(case.generations)
    )
    if pool == "repeated indices":
        generations = _repeated(generations, seed)
    elif pool == "empty":
        generations = _emptied(generations)
    if generations is None:
        return None
    case = dataclasses.replace(case, generations=generations)
    rows = [examples(case, case.differentiable, i) for i in range(BATCH)]
    try:
        kept = kept_outputs(case, rows[0])
        if not kept:
            return None
        unusual = pool == "infinite cotangents"
        facts = tuple(_facts(case, row, kept, i, unusual) for i, row in enumerate(rows))
    except (RuntimeError, ValueError, IndexError):
        return None  # values that the operator refuses, as it may
    return Kink(case, pool, f"{case.text} at {pool}", kept, facts)


def _repeated(generations: Sequence[Tensors], seed: str) -> tuple[Tensors, ...] | None:
    """The tensors of all examples with few indices in each tensor of them; None if none has any."""
    at = [
        k
        for k, t in enumerate(generations[0])
        if t.numel() > 1 and t.dtype in (torch.int64, torch.int32)
    ]
    few = {k: generations[0][k].reshape(-1)[:3].tolist() for k in at}
    new = {k: _drawn(generations[0][k], few[k], f"{seed} {k}") for k in at}
    return tuple(tuple(new.get(k, t) for k, t in enumerate(g)) for g in generations) if at else None


def _emptied(generations: Sequence[Tensors]) -> tuple[Tensors, ...] | None:
    if not any(t.dim() for t in generations[0]):
        return None
    return tuple(tuple(t[:0].clone() if t.dim() else t for t in g) for g in generations)


def _values(name: str, case: Case, pool: str) -> list[float]:
    found: list[float] = []
    for value in POOLS[pool]:
        if value != "bounds":
            found.append(float(value))
            continue
        for bound in dict.fromkeys((*case.numbers, *BUILT_IN.get(name, ()))):
            found += [bound, -bound]
    return found


def _drawn(like: torch.Tensor, values: Sequence[float], seed: str) -> torch.Tensor:
    """A tensor of values out of a pool, laid out as the given one."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    pool = torch.tensor(values, dtype=torch.float64)
    drawn = pool[torch.randint(len(values), like.shape, generator=generator)]
    if like.is_complex():
        drawn = torch.complex(
            drawn, pool[torch.randint(len(values), like.shape, generator=generator)]
        )
    out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    return out.copy_(drawn)


# ---------------------------------------------------------------------------------------------
# What PyTorch says
# ---------------------------------------------------------------------------------------------


def _facts(case: Case, row: Tensors, kept: list[int], seed: int, unusual: bool) -> Facts:
    f, x = restricted(of_reference(case), row, kept)
    leaves = tuple(p.detach().requires_grad_() for p in x)
    outs = f(*leaves)
    u = tuple(noise(o, 1000 * seed + i) for i, o in enumerate(outs))
    t = tuple(noise(p, 1000 * seed + 200 + i) for i, p in enumerate(x))
    if unusual:
        u = tuple(_drawn(o, _UNUSUAL, f"u {seed} {i}") for i, o in enumerate(outs))
        t = tuple(_drawn(o, _UNUSUAL, f"t {seed} {i}") for i, o in enumerate(x))
    pulled = pull_back(outs, leaves, u, create_graph=False, retain_graph=True)
    pushed = _pushed(f, x, t)
    if pushed is None:
        pushed = _transposed(outs, leaves, u, t)
    return Facts(tuple(o.detach() for o in outs), u, t, pulled, pushed)


def _pushed(f: Callable, x: Tensors, t: Tensors) -> Tensors | None:
    """By PyTorch's forward mode; None where it has no formula."""
    with forward_ad.dual_level():
        try:
            outs = f(*(forward_ad.make_dual(p, p_t) for p, p_t in zip(x, t, strict=True)))
        except (NotImplementedError, RuntimeError):
            return None
        pairs = [forward_ad.unpack_dual(o) for o in outs]
        if any(p.tangent is None for p in pairs):
            return None
        return tuple(p.tangent.clone() for p in pairs)


def _transposed(outs: Tensors, leaves: Tensors, u: Tensors, t: Tensors) -> Tensors | None:
    probes = tuple(ct.clone().requires_grad_() for ct in u)
    try:
        pulled = pull_back(outs, leaves, probes, create_graph=True)
        if not any(p.requires_grad for p in pulled):
            return tuple(map(torch.zeros_like, u))
        return pull_back(pulled, probes, t)
    except (RuntimeError, NotImplementedError):
        return None


# ---------------------------------------------------------------------------------------------
# The laws
# ---------------------------------------------------------------------------------------------


def _restricted(kink: Kink) -> tuple[Callable, Tensors]:
    return restricted(kink.case, kink.case.generations[0], kink.kept)


def vjp(kink: Kink) -> bool:
    """`vjp` gives what PyTorch's reverse mode gives."""
    f, x = _restricted(kink)
    facts = kink.facts[0]
    outs, pullback = lamina.vjp(f, *x)
    agree(outs, facts.outs, x, "the value")
    agree(pullback(facts.u), facts.pulled, x, "the cotangents")
    return True


def jvp(kink: Kink) -> bool:
    """`jvp` gives what PyTorch's forward mode gives."""
    f, x = _restricted(kink)
    facts = kink.facts[0]
    if facts.pushed is None:
        return True
    _, pushed = lamina.jvp(f, x, facts.t)
    agree(pushed, facts.pushed, (*x, *facts.t), "the tangents")
    return True


def vmap(kink: Kink) -> bool:
    """The values under `vmap` are those of a loop."""
    f, _ = _restricted(kink)
    x = _primals(kink)
    agree(lamina.vmap(f)(*x), stacked([facts.outs for facts in kink.facts]), x, "under vmap")
    return True


def vmap_vjp(kink: Kink) -> bool:
    """`vmap(vjp)` gives what a loop over PyTorch's reverse mode gives."""
    f, _ = _restricted(kink)
    cts = stacked([facts.u for facts in kink.facts])
    x = _primals(kink)
    found = lamina.vmap(lambda u, *x: lamina.vjp(f, *x)[1](u))(cts, *x)
    agree(found, stacked([facts.pulled for facts in kink.facts]), x, "under vmap")
    return True


def agree(found: Sequence, expected: Sequence, x: Tensors, what: str) -> None:
    """As `close`, complex numbers by parts; says at which x the first differing elements are.

    Among complex x all that is not finite is alike: it depends on how a product is written.
    """
    loosely = any(p.is_complex() for p in x)
    found, expected = ([_parts(t, loosely) for t in ts] for ts in (found, expected))
    try:
        close(found, expected, what)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{_places(found, expected, x)}") from error


def _parts(t: torch.Tensor, loosely: bool) -> torch.Tensor:
    if loosely:
        t = t.where(t.isfinite(), math.nan)
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _places(found: Sequence, expected: Sequence, x: Tensors) -> str:
    lines = []
    for n, (a, e) in enumerate(zip(found, expected, strict=True)):
        if a.shape != e.shape:
            continue
        differ = ~torch.isclose(a, e.to(a.dtype), rtol=1e-6, atol=1e-6, equal_nan=True)
        for at in differ.nonzero().tolist()[:4]:
            here = [p[tuple(at)].item() if p.shape == e.shape else "?" for p in x]
            got, right = a[tuple(at)].item(), e[tuple(at)].item()
            lines.append(f"  {n}{at} at {here}: {got:.6g}, where {right:.6g} is right")
    small = [p.tolist() for p in x if p.numel() <= 12]
    return "\n".join([*lines, f"  small arguments: {small}"])


def _primals(kink: Kink) -> Tensors:
    rows = [examples(kink.case, kink.case.differentiable, i) for i in range(BATCH)]
    return stacked([[row[k] for k in kink.case.differentiable] for row in rows])


LAWS: dict[str, Callable[[Kink], bool]] = {
    "kink_vjp": vjp,
    "kink_jvp": jvp,
    "kink_vmap": vmap,
    "kink_vmap_vjp": vmap_vjp,
}


def operators() -> list[str]:
    """All operators with a derivative that could be tried."""
    names = [name for name, op in database().items() if op.supports_autograd]
    return [n for n in names if n not in LEFT_OUT and n not in NOT_UNDER["vmap_vjp"]]


def hold(name: str, law: str, seed: int = 0) -> None:
    """Fails unless the law holds at every special point of the operator that is not exempt."""
    points = kinks(name, seed)
    assert points, f"no sample of {name} has a special point"
    asked = [k for k in points if not any(row.covers(name, law, k.pool, k.text) for row in EXEMPT)]
    if asked:
        try_on_all(name, law, asked, LAWS[law])
