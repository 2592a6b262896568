"""The laws in half precision: as plain PyTorch in the same dtypes, and no less precise.

A batch may be rounded elsewhere than its examples, and a formula of ours elsewhere than PyTorch's.
So values are held against three things: the shapes and dtypes of the plain run in half precision,
its values, and where these differ, the same computation in double precision, to which ours has to
be as near as the plain run is.

| law | of |
|---|---|
| `half` | an operator whose tensors are all in one half precision |
| `mixed` | an operator one of whose tensors is in half precision, if PyTorch takes that |
| `autocast` | an operator in single precision inside or around which autocast is on |
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import lamina
from tests.laws import examples, noise, stacked
from tests.oracles import pull_back
from tests.samples import BATCH, Case, cases, database

HALF = (torch.bfloat16, torch.float16)
Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., Tensors]


@dataclass(frozen=True)
class Setting:
    """A case in half precision.

    Attributes:
        text: What to print about it.
        case: The operator on a sample.
        dtype: The half precision.
        inside: What the function runs in.
        around: What our transforms run in.
    """

    text: str
    case: Case
    dtype: torch.dtype
    inside: Callable[[], Any] = nullcontext
    around: Callable[[], Any] = nullcontext

    def ours(self, *tensors: torch.Tensor) -> Tensors:
        """The function as a transform is given it."""
        with self.inside():
            return self.case.function(*tensors)

    def plain(self, *tensors: torch.Tensor) -> Tensors:
        """The function as plain PyTorch runs it."""
        with self.inside(), self.around():
            return self.case.function(*tensors)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in double precision."""
    return tensor.double() if tensor.is_floating_point() else tensor


def attempt(run: Callable[[], Any]) -> Any:
    """What plain PyTorch gives; None where it cannot."""
    try:
        return run()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None


# -- settings --------------------------------------------------------------------------------------


def half(name: str, dtype: torch.dtype, law: str, count: int) -> list[Setting]:
    """An operator in half precision."""
    return [Setting(case.text, case, dtype) for case in cases(name, law, count, [dtype])]


# Operators of which it depends on sizes, and on the machine, what dtypes they take together.
_BY_SIZE = frozenset(
    f"nn.functional.conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)
)


def mixed(name: str, dtype: torch.dtype, law: str, count: int) -> list[Setting]:
    """An operator with one tensor in half precision, for each that PyTorch takes so."""
    found = []
    for case in cases(name, law, count, [torch.float32]):
        tensors = case.generations[0]
        floating = [k for k, t in enumerate(tensors) if t.dtype is torch.float32]
        for k in floating if len(floating) > 1 else []:
            generations = tuple(
                tuple(t.to(dtype) if i == k else t for i, t in enumerate(generation))
                for generation in case.generations
            )
            if attempt(lambda case=case, given=generations[0]: case.function(*given)) is not None:
                other = dataclasses.replace(case, generations=generations)
                found.append(Setting(f"{case.text}, tensor {k} in {dtype}", other, dtype))
    return found


def autocast(name: str, dtype: torch.dtype, law: str, count: int) -> list[Setting]:
    """An operator in single precision, with autocast inside the function or around transforms."""
    on = functools.partial(torch.autocast, "cpu", dtype=dtype)
    found = []
    for case in cases(name, law, count, [torch.float32]):
        text = f"{case.text}, autocast to {dtype}"
        found.append(Setting(f"{text} inside", case, dtype, inside=on))
        found.append(Setting(f"{text} around", case, dtype, around=on))
    return [setting for setting in found if attempt(lambda s=setting: _runs(s)) is not None]


def _runs(setting: Setting) -> Tensors:
    """The plain run, which may be refused in half precision."""
    return setting.plain(*setting.case.generations[0])


SETTINGS = {"half": half, "mixed": mixed, "autocast": autocast}


# -- laws ------------------------------------------------------------------------------------------


def vmap(setting: Setting) -> bool:
    """`vmap` is a loop."""
    case = setting.case
    if case.random or case.refused or case.python:
        return False
    everything = tuple(range(len(case.generations[0])))
    for batched in dict.fromkeys([everything, everything[:1], everything[1:]]):
        if not batched:
            continue
        rows = [examples(case, batched, i) for i in range(BATCH)]
        plain = attempt(lambda rows=rows: stacked([setting.plain(*row) for row in rows]))
        if plain is None:
            continue
        wanted = attempt(
            lambda rows=rows: stacked([case.function(*map(exact, row)) for row in rows])
        )
        args, in_dims = _batch(rows, batched)
        with setting.around():
            actual = lamina.vmap(setting.ours, in_dims)(*args)
        near(actual, plain, wanted, setting.dtype, f"in_dims={in_dims}")
    return True


def vjp(setting: Setting) -> bool:
    """`vjp` is `torch.autograd.grad`."""
    point = _point(setting, setting.case.generations[0])
    if point is None:
        return False
    f, primals = point.f(setting.ours), point.primals
    with setting.around():
        _, pullback = lamina.vjp(f, *primals)
        actual = pullback(point.cotangents)
    near(actual, *point.pulled, setting.dtype, "the cotangents")
    return True


def jvp(setting: Setting) -> bool:
    """`jvp` gives tangents with the dtypes of the outputs."""
    point = _point(setting, setting.case.generations[0])
    if point is None:
        return False
    tangents = tuple(noise(p, 7 + i) for i, p in enumerate(point.primals))
    with setting.around():
        outs, actual = lamina.jvp(point.f(setting.ours), point.primals, tangents)
    assert [t.dtype for t in actual] == [out.dtype for out in outs]
    plain = attempt(lambda: _pushed(point.f(setting.plain), point.primals, tangents))
    if plain is not None:  # PyTorch's tangents have other dtypes than outputs, at times
        plain = tuple(t.to(out.dtype) for t, out in zip(plain, outs, strict=True))
    wide = tuple(map(exact, point.primals)), tuple(map(exact, tangents))
    wanted = attempt(lambda: _pushed(point.f(setting.case.reference, exact), *wide))
    if plain is not None or wanted is not None:
        near(actual, plain or actual, wanted, setting.dtype, "the tangents", loose=plain is None)
    return True


def vmap_vjp(setting: Setting) -> bool:
    """`vmap(vjp)` is a loop of `torch.autograd.grad`."""
    case = setting.case
    if case.random:
        return False
    wrt = case.differentiable
    tried = False
    for batched in dict.fromkeys([wrt, wrt[:1], wrt[1:]]):
        rows = [examples(case, batched, i) for i in range(BATCH)]
        points = [_point(setting, row, seed=i) for i, row in enumerate(rows)]
        if any(point is None for point in points):
            continue
        plain = stacked([point.pulled[0] for point in points])
        wanted = None
        if all(point.pulled[1] is not None for point in points):
            wanted = stacked([point.pulled[1] for point in points])
        args, in_dims = _batch(rows, batched)
        kept = points[0].kept

        def pulled_back(cts, *tensors, kept=kept):
            f, primals = _restricted(setting.ours, case, tensors, kept)
            return lamina.vjp(f, *primals)[1](cts)

        cotangents = stacked([point.cotangents for point in points])
        with setting.around():
            actual = lamina.vmap(pulled_back, (0, *in_dims))(cotangents, *args)
        near(actual, plain, wanted, setting.dtype, f"in_dims={in_dims} and batched cotangents")
        tried = True
    return tried


LAWS: dict[str, Callable[[Setting], bool]] = {
    "vmap": vmap,
    "vjp": vjp,
    "jvp": jvp,
    "vmap_vjp": vmap_vjp,
}


def speaks(kind: str, name: str, dtype: torch.dtype, law: str) -> bool:
    """Whether the table has samples of an operator for a law of some kind."""
    op = database()[name]
    needed = dtype if kind == "half" else torch.float32
    supported = op.supported_dtypes("cpu") if law == "vmap" else op.supported_backward_dtypes("cpu")
    return needed in supported and not (kind == "mixed" and name in _BY_SIZE)


# -- derivatives by PyTorch ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """A setting at some tensors, and its pullback by PyTorch.

    Attributes:
        case, tensors, kept: What the function is of.
        primals: The tensors to differentiate in.
        cotangents: Of the outputs that have a derivative.
        pulled: The cotangents of the primals as the plain run gives them, and exactly, if it can.
    """

    case: Case
    tensors: Tensors
    kept: list[int]
    primals: Tensors
    cotangents: Tensors
    pulled: tuple[Tensors, Tensors | None]

    def f(self, function: Function, convert: Callable = lambda t: t) -> Function:
        """A function of the differentiable tensors alone."""
        tensors = tuple(map(convert, self.tensors))
        return _restricted(function, self.case, tensors, self.kept)[0]


def _point(setting: Setting, tensors: Tensors, seed: int = 0) -> _Point | None:
    """None where the plain run has no derivative."""
    case = setting.case
    kept = attempt(lambda: _kept(setting, tensors))
    if not kept:
        return None
    f, primals = _restricted(_as_reference(setting), case, tensors, kept)
    with torch.no_grad():
        cotangents = tuple(noise(out, 100 * seed + i) for i, out in enumerate(f(*primals)))
    plain = attempt(lambda: _pulled(f, primals, cotangents))
    if plain is None:
        return None
    g, wide = _restricted(case.reference, case, tuple(map(exact, tensors)), kept)
    wanted = attempt(lambda: _pulled(g, wide, tuple(map(exact, cotangents))))
    return _Point(case, tensors, kept, primals, cotangents, (plain, wanted))


def _as_reference(setting: Setting) -> Function:
    def plain(*tensors: torch.Tensor) -> Tensors:
        with setting.inside(), setting.around():
            return setting.case.reference(*tensors)

    return plain


def _kept(setting: Setting, tensors: Tensors) -> list[int]:
    filled = [
        t.detach().requires_grad_() if k in setting.case.differentiable else t
        for k, t in enumerate(tensors)
    ]
    return [i for i, out in enumerate(setting.plain(*filled)) if out.requires_grad]


def _restricted(
    function: Function, case: Case, tensors: Tensors, kept: Sequence[int]
) -> tuple[Function, Tensors]:
    """The function of the differentiable tensors, giving the outputs `kept`, and the former."""

    def f(*primals: torch.Tensor) -> Tensors:
        torch.default_generator.manual_seed(0)
        filled = list(tensors)
        for k, primal in zip(case.differentiable, primals, strict=True):
            filled[k] = primal
        outs = function(*filled)
        return tuple(outs[i] for i in kept)

    return f, tuple(tensors[k] for k in case.differentiable)


def _pulled(f: Function, primals: Tensors, cotangents: Tensors) -> Tensors:
    leaves = tuple(p.detach().requires_grad_() for p in primals)
    outs = f(*leaves)
    return torch.autograd.grad(outs, leaves, cotangents, allow_unused=True, materialize_grads=True)


def _pushed(f: Function, primals: Tensors, tangents: Tensors) -> Tensors:
    """By PyTorch's own forward mode, or the derivative of the pullback in its cotangent."""
    forward = attempt(lambda: torch.func.jvp(f, primals, tangents)[1])
    if forward is not None:
        return forward
    leaves = tuple(p.detach().requires_grad_() for p in primals)
    outs = f(*leaves)
    probes = tuple(torch.ones_like(out).requires_grad_() for out in outs)
    pulled = pull_back(outs, leaves, probes, create_graph=True)
    return pull_back(pulled, probes, tangents)


def _batch(rows: Sequence[Tensors], batched: Sequence[int]) -> tuple[Tensors, tuple]:
    """The batched arguments, alternately by the first and by the last dim, and their in_dims."""
    args, in_dims = [], []
    for k, column in enumerate(zip(*rows, strict=True)):
        if k not in batched:
            args.append(column[0])
            in_dims.append(None)
            continue
        dim = column[0].ndim if k % 2 else 0
        args.append(torch.stack(column).movedim(0, dim))
        in_dims.append(dim)
    return tuple(args), tuple(in_dims)


# -- near ------------------------------------------------------------------------------------------


def near(
    actual: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor] | None,
    dtype: torch.dtype,
    what: str,
    *,
    loose: bool = False,
) -> None:
    """Fails unless shapes and dtypes are those of the plain run, and values as good as its values.

    Args:
        actual: What Lamina gives.
        plain: What PyTorch gives in the same dtypes.
        wanted: What it gives in double precision; None where it cannot.
        dtype: The half precision that is somewhere in the computation.
        what: What to print.
        loose: Whether the plain run is no measure, for there is none.
    """
    assert len(actual) == len(plain), f"{what}: {len(actual)} outputs, not {len(plain)}"
    eps = torch.finfo(dtype).eps
    for k, (a, p) in enumerate(zip(actual, plain, strict=True)):
        assert (a.dtype, a.shape) == (p.dtype, p.shape), (
            f"{what}, output {k}: {a.dtype} {list(a.shape)}, and PyTorch gives "
            f"{p.dtype} {list(p.shape)}"
        )
        a, p = a.detach(), p.detach()
        if not (a.is_floating_point() or a.is_complex()):
            assert torch.equal(a, p), f"{what}, output {k}: {a} and not {p}"
            continue
        a, p = _wide(a), _wide(p)
        scale = _largest(p)
        if not loose and torch.allclose(a, p, rtol=2 * eps, atol=2 * eps * scale, equal_nan=True):
            continue
        assert wanted is not None, f"{what}, output {k}: {a} and not {p}"
        e = _wide(wanted[k].detach())
        seen = p.isfinite() & e.isfinite()
        assert a[seen].isfinite().all(), f"{what}, output {k}: {a} and not {p}"
        scale = max(scale, _largest(e))
        allowed = (16 if loose else 2) * eps * scale + 2 * _largest((p - e)[seen])
        error = _largest((a - e)[seen])
        assert error <= allowed, (
            f"{what}, output {k}: off by {error:.3g}, and PyTorch by {_largest((p - e)[seen]):.3g}"
            f"\nours {a}\nPyTorch {p}\nexactly {e}"
        )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _largest(tensor: torch.Tensor) -> float:
    """The largest magnitude that is finite."""
    finite = tensor.abs()[tensor.isfinite()]
    return finite.max().item() if finite.numel() else 0.0


@contextmanager
def quiet() -> Iterator[None]:
    """Lets PyTorch warn of what it does in half precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
