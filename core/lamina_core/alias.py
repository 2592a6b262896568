"""Alias groups: what a write means on wrappers that are views of one another.

# NOTE [Writes]
A wrapper may be a view of another: its `recipe` then names the parent and the op that made it. The
group of a wrapper is the tree of recipes with the base at its root. An in-place op is interpreted
as its out-of-place counterpart, followed by `write`:

* the wrapper written to is *rebound* to the result: it stands for the new value from now on;
* if it is a view, its parent is written as well, with the result scattered into the region that the
  view covers, and so on up to the base; beneath a view that shows an element in several places
  (`expand`, overlapping windows) what it shows is written, and all else is seen anew;
* every other view of the group is stale. Versions tell: a view remembers the version of its parent,
  and `refresh` replays its recipe when the two differ. Nothing is done for views nobody uses again.

Old values are never overwritten, so a residual of a tape node that was saved before the write still
holds what it held: gradients are right where PyTorch has to raise "modified by an inplace
operation". A base that is an argument of the transform belongs to the caller, who must see the
writes: they are copied back when the transform returns .
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina_core.dispatch import lower, pass_down
from lamina_core.errors import MutationError, NotDifferentiableError
from lamina_core.exchanges import exchanges_memory, refuse_exchange
from lamina_core.interpreter import Interpreter
from lamina_core.level import Level
from lamina_core.mode import mode_off
from lamina_core.recipe import ViewRecipe
from lamina_core.refusals import refused
from lamina_core.scatter import refuse_repeated, scatter
from lamina_core.schema import OpFacts, facts
from lamina_core.scopes import run_at
from lamina_core.tensors import map_tensors, tensors_in
from lamina_core.torch_hooks.keys import (
    BelowADInplaceOrView,
    DispatchKey,
    DispatchKeySet,
    ExcludeKeys,
)
from lamina_core.views import become_former, detach_in_place, refresh
from lamina_core.wrapper import LevelTensor

__all__ = [
    "captured_error",
    "mutate",
    "mutate_copies",
    "write",
]

_CLASSES = LevelTensor.classes
aten = torch.ops.aten


def mutate(interpreter: Interpreter, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Interpret an op that writes to its arguments: out of place, then `write` each result.

    Raises:
        MutationError: If no out-of-place counterpart is known, or a captured tensor is written to.
    """
    known = facts(op)
    if exchanges_memory(op):
        refuse_exchange(op, args, kwargs, interpreter.where())
    if not any(interpreter.is_own(tensor) for tensor in tensors_in(args, kwargs)):
        return pass_down(interpreter, op, args, kwargs)
    if op is _DETACH_IN_PLACE:
        return detach_in_place(interpreter, args[0])
    counterpart = known.functional()
    if counterpart is None:
        if op.namespace not in _TORCH_OWN:
            return _mutate_below(interpreter, known, args, kwargs)
        raise interpreter.error(
            MutationError,
            f"{known.name} writes to its argument and has no out-of-place counterpart",
            "to fix: use the out-of-place form of the op",
        )
    if known.op._schema.name in _RESHAPING:
        return _reshape(interpreter, known, counterpart, args, kwargs)
    targets = [args[m] if isinstance(m, int) else kwargs[m] for m in known.mutated]
    given = kwargs
    if known.is_out_variant():
        kwargs = {k: v for k, v in kwargs.items() if k not in known.mutated}
        if _is_told(counterpart, "dtype") and not _is_told(op, "dtype"):  # a factory
            kwargs |= {"dtype": targets[0].dtype, "device": targets[0].device}
    with run_at(interpreter):
        out = counterpart(*_with_defaults(op, args), **kwargs)
        several = isinstance(out, (list, tuple)) and facts(counterpart).returns != ("list",)
        results = list(out) if several else [out]
        # Functional forms of ops such as batch norm give outputs first, then what is written.
        written = results[len(results) - len(targets) :]
        for target, new in zip(targets, written, strict=True):
            for one, value in _pairs(target, new):
                # Where the write below would cast: some ops do, and some refuse.
                if one.dtype != value.dtype and torch.can_cast(value.dtype, one.dtype):
                    own = refused(interpreter, op, args, given)
                    if own is not None:
                        raise own
                write(interpreter, known, one, value)
    if not known.returns:
        return None
    if len(results) == len(targets):
        return targets[0] if len(targets) == 1 else tuple(targets)
    kept = results[: len(results) - len(targets)]
    return kept[0] if len(kept) == 1 else tuple(kept)


def _is_told(op: Any, option: str) -> bool:
    return option in facts(op).arg_names


# Here the kernels say unsaid things, such as which storage a tensor has, that no copy would repeat.
_TORCH_OWN = frozenset(("aten", "prims"))


def mutate_copies(
    interpreter: Interpreter,
    known: OpFacts,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[[tuple[Any, ...], dict[str, Any], list[Any]], Any],
) -> Any:
    """Interpret a write of which only the in-place form is known: on copies, then `write` each.

    Args:
        interpreter: Whose level it is.
        known: The facts of the op.
        args: Its arguments.
        kwargs: Its keyword arguments.
        run: Called with the arguments and keyword arguments, copies in place of what is written,
            and the list of these copies. They are wrappers of the level, and `run` writes to their
            values.

    Returns:
        What `run` returns, with what is written in place of its copies.
    """
    written = [args[m] if isinstance(m, int) else kwargs.get(m) for m in known.mutated]
    targets = {id(tensor): tensor for tensor in tensors_in(written, {})}
    with run_at(interpreter):
        copies = {key: target.clone() for key, target in targets.items()}

    def swap(tensor: Any) -> Any:
        return copies.get(id(tensor), tensor)

    inner = {key: map_tensors(swap, value) for key, value in kwargs.items()}
    out = run(tuple([map_tensors(swap, arg) for arg in args]), inner, list(copies.values()))
    with run_at(interpreter):
        for key, target in targets.items():
            write(interpreter, known, target, copies[key])
    if len(known.op._schema.returns) == 1:
        return _itself(known, 0, out, args, kwargs)
    if isinstance(out, tuple):
        return tuple([_itself(known, i, item, args, kwargs) for i, item in enumerate(out)])
    return out


def _itself(known: OpFacts, index: int, out: Any, args: Any, kwargs: Any) -> Any:
    """An output, or the argument that the schema says it is."""
    alias = known.op._schema.returns[index].alias_info
    if alias is None or not alias.is_write:
        return out
    for position, argument in enumerate(known.op._schema.arguments):
        theirs = argument.alias_info
        if theirs is not None and theirs.before_set == alias.before_set:
            return kwargs[argument.name] if argument.kwarg_only else args[position]
    return out


def _mutate_below(
    interpreter: Interpreter, known: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A user's op that writes, and of which this level has nothing to say but to hand it down."""
    if interpreter.tracking():
        for tensor in tensors_in(args, kwargs):
            if interpreter.is_own(tensor) and not interpreter.is_constant(tensor):
                raise interpreter.error(
                    NotDifferentiableError,
                    f"{known.name} writes to its argument and has no derivative",
                    f"it is given a tensor of shape {list(tensor.shape)} that carries one",
                    "to fix: detach its arguments, or define the op without writes and register "
                    "a formula with torch.library.register_autograd",
                )

    def run(args: Any, kwargs: Any, copies: list[Any]) -> Any:
        def value_of(tensor: Any) -> Any:
            return tensor.value if interpreter.is_own(tensor) else tensor

        inner = {key: map_tensors(value_of, value) for key, value in kwargs.items()}
        values = tuple([map_tensors(value_of, arg) for arg in args])
        return map_tensors(interpreter.constant, lower(interpreter, known.op, values, inner))

    return mutate_copies(interpreter, known, args, kwargs, run)


# Ops that change the shape of a tensor in place and none of its elements.
_RESHAPING = frozenset(
    f"aten::{name}"
    for name in (
        "as_strided_",
        "squeeze_",
        "swapaxes_",
        "swapdims_",
        "t_",
        "transpose_",
        "unsqueeze_",
    )
)
_NO_PYTHON = DispatchKeySet(DispatchKey.Python)


def _reshape(
    interpreter: Interpreter, known: OpFacts, counterpart: Any, args: Any, kwargs: Any
) -> Any:
    """`x.t_()` and the like: `x` becomes a view of what it was, which lives on without a name.

    The caller of the transform does not see the new shape of an argument, only what is written to
    it: in a mapped function it would be the shape of a view that an example is.
    """
    target = args[0]
    refresh(interpreter, target)
    former = become_former(interpreter, target)
    former.is_input, target.is_input = target.is_input, False
    with run_at(interpreter):
        new = counterpart(former, *args[1:], **kwargs)
    with (
        mode_off(),
        ExcludeKeys(_NO_PYTHON),
        BelowADInplaceOrView(),
    ):
        torch.Tensor.resize_(target, new.shape)
    interpreter.rebind(target, new)
    target.recipe = ViewRecipe(former, counterpart, args[1:], kwargs, None)
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
        if not torch.can_cast(new.dtype, target.dtype):
            raise interpreter.error(
                MutationError,
                f"{known.name} writes a result of dtype {new.dtype}, which can't be cast to the "
                f"{target.dtype} of what it writes to",
                "to fix: give the written tensor the dtype of the result, or cast the operands",
            )
        new = new.to(target.dtype)
    if new is target:
        new = new.clone()
    refuse_repeated(interpreter, known, target)
    _write(interpreter, target, new)


def captured_error(interpreter: Level, name: str, target: Any) -> Exception:
    """The error for a write of a value of this level to a tensor from outside."""
    return interpreter.error(
        MutationError,
        f"{name} writes a value of this transform to a tensor captured from outside it",
        f"captured, or passed without being mapped: a tensor of shape {list(target.shape)}",
        "to fix: pass it as an argument (a mapped one under vmap), make it inside, or do not write",
    )


def _write(interpreter: Interpreter, target: LevelTensor, new: LevelTensor) -> None:
    """Write and rebind, up to the base: a loop, as views of views may be many.

    Under `no_grad` a write leaves what reverse mode knows of the old value; through `detach`, what
    forward mode knows of it too.
    """
    enabled = torch.is_grad_enabled()
    alone = False  # whether a `detach` has been passed on the way up
    bound: list[tuple[LevelTensor, LevelTensor, bool]] = []
    while True:
        with torch.set_grad_enabled(enabled and not alone):
            if alone or not enabled:
                new = _with_derivative_of(target, new, tangents=alone)
            if alone:
                new = interpreter.keep_derivative(target, new)
            if interpreter.store(target, new):
                break
            interpreter.mutated = True
            bound.append((target, new, alone))
            recipe = target.recipe
            if recipe is None:
                if target.is_input and target not in _identities(interpreter.written):
                    interpreter.written.append(target)
                break
            refresh(interpreter, target)
            alone = alone or recipe.op is _DETACH
        with torch.set_grad_enabled(enabled and not alone):
            target, new = scatter(target, new)
    for target, new, alone in reversed(bound):
        if target.recipe is not None:
            target.recipe.version = target.recipe.parent.version
        with torch.set_grad_enabled(enabled and not alone):
            interpreter.rebind(target, new)
        target.version += 1


_DETACH = aten.detach.default
_DETACH_IN_PLACE = aten.detach_.default


def _with_derivative_of(target: LevelTensor, new: LevelTensor, *, tangents: bool) -> Any:
    """The new value with the derivative of the old one: without its tangents, unless asked for.

    `rebind` sees to the level of the write; this is for the levels below, and the user's autograd.
    """
    value = target.value
    if type(value) not in LevelTensor.classes and not value.requires_grad:
        return new
    if not (target.is_floating_point() or target.is_complex()):
        return new
    with torch.enable_grad():
        zero = target - target.detach()
        zero = zero.masked_fill(zero.isnan(), 0)  # an infinity less itself
        if tangents:
            new = _detached(new)
        else:
            inner: Any = zero
            while type(inner) in _CLASSES:
                for name in inner.holds[1:]:
                    setattr(inner, name, None)
                inner = inner.value
        return new + zero


def _detached(tensor: Any) -> Any:
    return tensor.detach()


class _identities:
    def __init__(self, items: list[Any]) -> None:
        self.ids = {id(item) for item in items}

    def __contains__(self, item: Any) -> bool:
        return id(item) in self.ids
