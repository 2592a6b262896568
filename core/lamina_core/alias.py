"""Alias groups: what a write means on wrappers that are views of one another.

# NOTE [Writes]
A wrapper may be a view of another: its `recipe` then names the parent and the op that made it. The
group of a wrapper is the tree of recipes with the base at its root. An in-place op is interpreted
as its out-of-place counterpart, followed by `write`:

* the wrapper written to is *rebound* to the result: it stands for the new value from now on;
* if it is a view, its parent is written as well, with the result scattered into the region that the
  view covers, and so on up to the base;
* every other view of the group is stale. Versions tell: a view remembers the version of its parent,
  and `refresh` replays its recipe when the two differ. Nothing is done for views nobody uses again.

Old values are never overwritten, so a residual of a tape node that was saved before the write still
holds what it held: gradients are right where PyTorch has to raise "modified by an inplace
operation". A base that is an argument of the transform belongs to the caller, who must see the
writes: they are copied back when the transform returns .
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.dispatch import pass_down, tensors_in
from lamina_core.errors import MutationError
from lamina_core.interpreter import Interpreter, mode_off, run_at
from lamina_core.schema import OpFacts, facts
from lamina_core.wrapper import LevelTensor

__all__ = ["ViewRecipe", "mutate", "record_views", "refresh", "refresh_all", "write"]

aten = torch.ops.aten


class ViewRecipe:
    """How a wrapper was viewed out of its parent.

    Attributes:
        parent: The wrapper that was viewed.
        op: The view op.
        args: Its arguments behind the parent.
        kwargs: Its keyword arguments.
        index: Which output of the op this view is, or None if it has one output.
        version: The version of the parent that the view shows.
    """

    __slots__ = ("args", "index", "kwargs", "op", "parent", "version")

    def __init__(
        self, parent: LevelTensor, op: Any, args: Any, kwargs: Any, index: int | None
    ) -> None:
        self.parent = parent
        self.op = op
        self.args = args
        self.kwargs = kwargs
        self.index = index
        self.version = parent.version


def record_views(out: Any, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give the outputs of a view op their recipes, and return them."""
    parent = args[0]
    if isinstance(out, (list, tuple)):
        for index, item in enumerate(out):
            item.recipe = ViewRecipe(parent, op, args[1:], kwargs, index)
    elif out is not parent:
        out.recipe = ViewRecipe(parent, op, args[1:], kwargs, None)
    return out


def refresh(interpreter: Interpreter, view: LevelTensor) -> None:
    """Bring a view up to date with its base."""
    recipe = view.recipe
    if recipe is None:
        return
    parent = recipe.parent
    refresh(interpreter, parent)
    if parent.version != recipe.version:
        if parent.reshaped > recipe.version:
            raise interpreter.error(
                MutationError,
                f"a view made by {recipe.op} is used after its base changed shape in place",
                "to fix: change the shape out of place, or make the view afterwards",
            )
        with run_at(interpreter):
            out = recipe.op(parent, *recipe.args, **recipe.kwargs)
        interpreter.rebind(view, out if recipe.index is None else out[recipe.index])
        recipe.version = parent.version
        view.version += 1


def refresh_all(interpreter: Interpreter, args: Any, kwargs: dict[str, Any]) -> None:
    """Bring all views of this level among the arguments of an op up to date."""
    for tensor in tensors_in(args, kwargs):
        if interpreter.is_own(tensor) and tensor.recipe is not None:
            refresh(interpreter, tensor)


def mutate(interpreter: Interpreter, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Interpret an op that writes to its arguments: out of place, then `write` each result.

    Raises:
        MutationError: If no out-of-place counterpart is known, or a captured tensor is written to.
    """
    known = facts(op)
    if not any(interpreter.is_own(tensor) for tensor in tensors_in(args, kwargs)):
        return pass_down(interpreter, op, args, kwargs)
    counterpart = known.functional()
    if counterpart is None:
        raise interpreter.error(
            MutationError,
            f"{known.name} writes to its argument and has no out-of-place counterpart",
            "to fix: use the out-of-place form of the op",
        )
    if known.op._schema.name in _RESHAPING:
        return _reshape(interpreter, known, counterpart, args, kwargs)
    targets = [args[m] if isinstance(m, int) else kwargs[m] for m in known.mutated]
    if known.is_out_variant():
        kwargs = {k: v for k, v in kwargs.items() if k not in known.mutated}
    with run_at(interpreter):
        out = counterpart(*_with_defaults(op, args), **kwargs)
        results = list(out) if isinstance(out, (list, tuple)) else [out]
        # Functional forms of ops such as batch norm give outputs first, then what is written.
        written = results[len(results) - len(targets) :]
        for target, new in zip(targets, written, strict=True):
            for one, value in _pairs(target, new):
                write(interpreter, known, one, value)
    if not known.returns:
        return None
    if len(results) == len(targets):
        return targets[0] if len(targets) == 1 else tuple(targets)
    kept = results[: len(results) - len(targets)]
    return kept[0] if len(kept) == 1 else tuple(kept)


# Ops that change the shape of a tensor in place and none of its elements.
_RESHAPING = frozenset(
    f"aten::{name}"
    for name in (
        "squeeze_",
        "swapaxes_",
        "swapdims_",
        "t_",
        "transpose_",
        "unsqueeze_",
    )
)
_NO_PYTHON = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)


def _reshape(
    interpreter: Interpreter, known: OpFacts, counterpart: Any, args: Any, kwargs: Any
) -> Any:
    """`x.t_()` and the like: `x` becomes a view of what it was, which lives on without a name."""
    target = args[0]
    if target.is_input:
        raise interpreter.error(
            MutationError,
            f"{known.name} changes the shape of an argument of the transform",
            f"to fix: use the out-of-place {counterpart}",
        )
    refresh(interpreter, target)
    with run_at(interpreter):
        former = target.view_as(target)
        former.recipe, former.version = target.recipe, target.version
        new = counterpart(former, *args[1:], **kwargs)
    with (
        mode_off(),
        torch._C._ExcludeDispatchKeyGuard(_NO_PYTHON),
        torch._C._AutoDispatchBelowADInplaceOrView(),
    ):
        torch.Tensor.resize_(target, new.shape)
    interpreter.rebind(target, new)
    target.recipe = ViewRecipe(former, counterpart, args[1:], kwargs, None)
    # Views taken before refer to a tensor that is no longer of that shape: see `refresh`.
    target.version += 1
    target.reshaped = target.version
    return target


def _with_defaults(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Trailing defaults filled in: `bernoulli_(p=0.5)` has one that `bernoulli.p` has not."""
    missing = op._schema.arguments[len(args) :]
    return (*args, *[a.default_value for a in missing if not a.kwarg_only])


def _pairs(target: Any, new: Any) -> list[tuple[Any, Any]]:
    if isinstance(target, (list, tuple)):
        return list(zip(target, new, strict=True))
    return [(target, new)]


def write(interpreter: Interpreter, known: OpFacts, target: Any, new: Any) -> None:
    """Make `target`, and all that shares its memory at this level, show `new`.

    Runs as code of the interpreter's level (see `run_at`).
    """
    if not interpreter.is_own(target):
        if interpreter.is_own(new) and not interpreter.is_constant(new):
            raise captured_error(interpreter, known.name, target)
        target.copy_(new.value if interpreter.is_own(new) else new)
        return
    if not interpreter.is_own(new):
        new = interpreter.constant(new)
    if new.shape != target.shape:
        if known.is_out_variant() and target.numel() == 0:
            raise interpreter.error(
                MutationError,
                f"{known.name} would resize its out argument of shape {list(target.shape)}",
                f"the result has shape {list(new.shape)}",
                "to fix: use the op without out=, or give an out of the result's shape",
            )
        raise interpreter.error(
            MutationError,
            f"{known.name} writes a result of shape {list(new.shape)} to a tensor of shape "
            f"{list(target.shape)}",
            "to fix: use the out-of-place form of the op",
        )
    if new.dtype != target.dtype:
        new = new.to(target.dtype)
    if new is target:
        new = new.clone()
    _write(interpreter, target, new)


def captured_error(interpreter: Interpreter, name: str, target: Any) -> Exception:
    """The error for a write of a value of this level to a tensor from outside."""
    return interpreter.error(
        MutationError,
        f"{name} writes a value of this transform to a tensor captured from outside it",
        f"captured, or passed without being mapped: a tensor of shape {list(target.shape)}",
        "to fix: pass it as an argument (a mapped one under vmap), make it inside, or do not write",
    )


def _write(interpreter: Interpreter, target: LevelTensor, new: LevelTensor) -> None:
    if interpreter.store(target, new):
        return
    interpreter.mutated = True
    recipe = target.recipe
    if recipe is None:
        if target.is_input and target not in _identities(interpreter.written):
            interpreter.written.append(target)
    else:
        refresh(interpreter, target)
        _write(interpreter, recipe.parent, scatter(recipe, new))
        recipe.version = recipe.parent.version
    interpreter.rebind(target, new)
    target.version += 1


class _identities:
    def __init__(self, items: list[Any]) -> None:
        self.ids = {id(item) for item in items}

    def __contains__(self, item: Any) -> bool:
        return id(item) in self.ids


# -- the inverse of a view op: the parent with the view's region replaced --------------------------


def scatter(recipe: ViewRecipe, new: Any) -> Any:
    """The parent of a view, with the region that the view covers replaced by `new`."""
    parent, op = recipe.parent, recipe.op
    inverse = _INVERSES.get(op._schema.name)
    if inverse is not None and op is not aten.view.dtype:
        return inverse(parent, new, *recipe.args, **recipe.kwargs)
    return _scatter_by_index(recipe, new)


def _scatter_by_index(recipe: ViewRecipe, new: Any) -> Any:
    """Any view that only moves elements: replay it on their numbers to see which it shows."""
    parent = recipe.parent
    if new.dtype != parent.dtype:
        raise parent.interpreter.error(
            MutationError,
            f"cannot write through {recipe.op}, which views {parent.dtype} as {new.dtype}",
            "to fix: write to the tensor itself, with values of its own dtype",
        )
    numbers = torch.arange(parent.numel(), device=parent.device).reshape(parent.shape)
    seen = recipe.op(numbers, *recipe.args, **recipe.kwargs)
    seen = seen if recipe.index is None else seen[recipe.index]
    flat = parent.reshape(-1).index_put((seen.reshape(-1),), new.reshape(-1))
    return flat.reshape(parent.shape)


def _reshaped(parent: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
    return new.reshape(parent.shape)


def _same(parent: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
    return new


def _permuted(parent: Any, new: Any, dims: Any) -> Any:
    rank = parent.dim()
    inverse = [0] * rank
    for position, dim in enumerate(dims):
        inverse[dim % rank] = position
    return new.permute(inverse)


def _imaginary(parent: Any, new: Any) -> Any:
    return torch.complex(torch.real(parent), new)


def _real(parent: Any, new: Any) -> Any:
    return torch.complex(new, torch.imag(parent))


def _detached(parent: Any, new: Any) -> Any:
    interpreter = parent.interpreter
    if interpreter.differentiates and not interpreter.is_constant(parent):
        raise interpreter.error(
            MutationError,
            "a write through detach() to a tensor that carries a derivative",
            "PyTorch changes the value behind the back of the derivative, which is then wrong",
            "to fix: write to the tensor itself, or to a clone of the detached one",
        )
    return new


_INVERSES: dict[str, Any] = {
    "aten::_conj": lambda parent, new: torch.conj(new),
    "aten::_neg_view": lambda parent, new: -new,
    "aten::_reshape_alias": _reshaped,
    "aten::_unsafe_view": _reshaped,
    "aten::alias": _same,
    "aten::detach": _detached,
    "aten::diagonal": lambda parent, new, *a, **k: torch.diagonal_scatter(parent, new, *a, **k),
    "aten::flatten": _reshaped,
    "aten::imag": _imaginary,
    "aten::permute": _permuted,
    "aten::real": _real,
    "aten::reshape": _reshaped,
    "aten::select": lambda parent, new, dim, index: torch.select_scatter(parent, new, dim, index),
    "aten::slice": lambda parent, new, *a, **k: torch.slice_scatter(parent, new, *a, **k),
    "aten::squeeze": _reshaped,
    "aten::t": lambda parent, new: new.t(),
    "aten::transpose": lambda parent, new, first, second: new.transpose(first, second),
    "aten::unflatten": _reshaped,
    "aten::unsqueeze": _reshaped,
    "aten::view": _reshaped,
    "aten::view_as": _reshaped,
    "aten::view_as_complex": lambda parent, new: torch.view_as_real(new),
    "aten::view_as_real": lambda parent, new: torch.view_as_complex(new.contiguous()),
}
