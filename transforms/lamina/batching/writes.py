"""In-place ops under vmap: written through to the value where it can hold the result.

Where it cannot (the tensor was made inside and is not batched yet, or its value is of too low a
level) the wrapper is rebound instead: see NOTE [Writes] in `lamina_core.alias`.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.batched import BatchedTensor
from lamina.batching.dims import batch_first, pad_rank
from lamina_core.alias import captured_error, mutate
from lamina_core.dispatch import is_followed, pass_down
from lamina_core.errors import MutationError
from lamina_core.overloads import aten
from lamina_core.recipe import root_of
from lamina_core.scatter import refuse_repeated, shows_twice
from lamina_core.schema import OpFacts
from lamina_core.scopes import run_at
from lamina_core.wrapper import LevelTensor, level_of, shares_memory, strip_dead

__all__ = ["in_place_handler", "store"]

_CLASSES = LevelTensor.classes

# Elementwise in meaning, though not tagged as pointwise.
_ELEMENTWISE = (aten.copy_.default, aten.fill_.Scalar, aten.zero_.default)


def in_place_handler(known: OpFacts) -> Any:
    """The handler of an op that writes to its arguments."""
    direct = (
        known.mutated == (0,)
        and not known.is_random
        and not known.list_args
        and (known.is_pointwise or known.op in _ELEMENTWISE)
    )

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        if not direct:
            if known.is_random and interpreter.randomness != "same":
                return _random_write(interpreter, known, op, args, kwargs)
            return mutate(interpreter, op, args, kwargs)
        args = strip_dead(args)
        target = args[0]
        if not interpreter.is_own(target):
            if any(_is_batched(interpreter, arg) for arg in args):
                raise captured_error(interpreter, known.name, target)
            return mutate(interpreter, op, args, kwargs)
        refuse_repeated(interpreter, known, target)
        level = max((_value_level(interpreter, arg) for arg in args[1:]), default=0)
        for arg in args[1:]:
            if isinstance(arg, torch.Tensor) and type(arg) not in _CLASSES:
                interpreter.look(arg)
        mixed = any(isinstance(arg, torch.Tensor) and arg.dtype != target.dtype for arg in args[1:])
        if (
            target.bdim is None
            or mixed
            or is_followed(interpreter)
            or not _can_store(interpreter, target, level)
        ):
            return mutate(interpreter, op, args, kwargs)
        rank = target.dim()
        values = [batch_first(target.value, target.bdim)]
        for arg in args[1:]:
            if _is_own(interpreter, arg):
                values.append(pad_rank(arg.value, arg.bdim, rank))
            else:
                values.append(arg)
        if any(isinstance(arg, torch.Tensor) and arg.dim() > rank for arg in args[1:]):
            raise interpreter.error(
                MutationError,
                f"{known.name} writes to a tensor of shape {list(target.shape)}, which the other "
                "operands do not broadcast to",
                "to fix: use the out-of-place form of the op",
            )
        op(*values, **kwargs)
        _wrote(interpreter, target)
        return target

    return handle


def _random_write(interpreter: Any, known: OpFacts, op: Any, args: Any, kwargs: Any) -> Any:
    """`x.normal_()` and the like: each example draws its own numbers, so `x` becomes batched."""
    first = known.mutated[0]
    target = args[first] if isinstance(first, int) else kwargs[first]
    if not interpreter.is_own(target):
        if interpreter.randomness == "different":
            raise captured_error(interpreter, known.name, target)
        return pass_down(interpreter, known.op, args, kwargs)
    return mutate(interpreter, op, args, kwargs)


def store(interpreter: Any, target: Any, new: Any) -> bool:
    """Copy `new` into the memory behind `target` where that is sound; say whether it was.

    Raises:
        MutationError: If `target` is an unmapped argument and `new` is batched: there is one tensor
            and as many values to write as there are examples.
    """
    if target.bdim is None and new.bdim is not None:
        if root_of(target).is_input:
            raise captured_error(interpreter, "an in-place op", target)
        return False
    if not _can_store(interpreter, target, level_of(new.value)):
        return False
    if is_followed(interpreter) and type(target.value) not in _CLASSES:
        with run_at(None):
            _copy(target, new)
    else:
        _copy(target, new)
    _wrote(interpreter, target)
    return True


def _copy(target: Any, new: Any) -> None:
    if target.bdim is None:
        target.value.copy_(new.value)
    else:
        value = pad_rank(new.value, new.bdim, target.dim())
        batch_first(target.value, target.bdim).copy_(value)


def _is_own(interpreter: Any, arg: Any) -> bool:
    return type(arg) is BatchedTensor and arg.interpreter is interpreter


def _is_batched(interpreter: Any, arg: Any) -> bool:
    return _is_own(interpreter, arg) and arg.bdim is not None


def _value_level(interpreter: Any, arg: Any) -> int:
    return level_of(arg.value) if _is_own(interpreter, arg) else level_of(arg)


def _can_store(interpreter: Any, target: Any, level: int) -> bool:
    """Whether writing into the value of `target` means what writing to `target` means.

    The caller's memory must be written. What was made inside is written only if nobody below keeps
    old values for a backward pass and if the value can carry what is written. Where the caller's
    own autograd follows, it does not know of views made here, so it is an argument as a whole that
    is written.
    """
    value = target.value
    if _is_copy(target):
        return False
    followed = type(value) not in _CLASSES and is_followed(interpreter)
    if followed and target.recipe is not None:
        return False
    if _shared(target):
        if root_of(target).is_input:
            raise interpreter.error(
                MutationError,
                "a write to an argument that is mapped over an expanded dim",
                f"all {interpreter.batch_size} examples are one place in memory",
                "to fix: pass a clone() of it, or do not write",
            )
        return False
    if root_of(target).is_input:
        return True
    if followed or shows_twice(target):
        return False
    return level_of(value) >= level and not interpreter.keeps_below


def _shared(target: Any) -> bool:
    """Whether the examples are one place in memory."""
    bdim, value = target.bdim, target.value
    return bdim is not None and value.shape[bdim] > 1 and not value.stride(bdim)


def _is_copy(view: Any) -> bool:
    """Whether a logical view could not be a view of the value, and was copied."""
    while view.recipe is not None:
        parent = view.recipe.parent
        if not shares_memory(view.value, parent.value):
            return True
        view = parent
    return False


def _wrote(interpreter: Any, target: Any) -> None:
    """Count the write, so that copies among the views are made again and old residuals noticed.

    Raises:
        MutationError: If `torch.jit.trace` is at work, which does not see it.
    """
    if interpreter.traced:
        raise interpreter.error(
            MutationError,
            "torch.jit.trace does not see what is written inside vmap",
            "to fix: use torch.export.export, or the out-of-place form of the op",
        )
    interpreter.mutated = True
    plain = target.value
    if type(plain) not in _CLASSES and not plain.is_inference():
        torch.autograd.graph.increment_version(plain)
    target.version += 1
    while target.recipe is not None:
        parent = target.recipe.parent
        parent.version += 1
        target.recipe.version = parent.version
        target = parent
