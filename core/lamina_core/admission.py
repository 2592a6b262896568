"""Which calls of an op are answered at a level: those that the op takes alone.

A batching rule puts a dim in front of what the op sees, so the op no longer notices that an example
has too few: `torch.linalg.inv` of a mapped vector would invert the matrix that the examples form.
And an op that is computed by others takes what these take. So such a call is tried on one example
too, by the op itself, once for all calls that differ in elements alone.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from lamina_core.dispatch import pass_down
from lamina_core.handlers import Handler
from lamina_core.overloads import aten
from lamina_core.refusals import is_pullback, refused
from lamina_core.schema import OpFacts
from lamina_core.scopes import run_at
from lamina_core.tensors import tensors_in
from lamina_core.wrapper import LevelTensor

__all__ = ["admitting", "decompose_handler"]

_CLASSES = LevelTensor.classes
_KEPT = 10_000
_VIEWS_IN_EFFECT = (aten._unsafe_view.default,)

# HOT: what programs are made of is asked less. These take operands of any rank, and their rules
# speak of logical dims.
_OF_ANY_RANK = frozenset(
    f"aten::{name}"
    for name in (
        *("_to_copy", "clone", "contiguous", "copy", "to"),
        *("empty_like", "full_like", "ones_like", "zeros_like"),
        *("new_empty", "new_full", "new_ones", "new_zeros"),
        *("amax", "amin", "cumsum", "logsumexp", "mean", "sum"),
        *("_log_softmax", "_softmax", "log_softmax", "softmax"),
    )
)
# And these take operands of one rank alone, and their kernels see to the rest.
_RANKS: dict[Any, tuple[int, int]] = {
    aten.bmm.default: (3, 3),
    aten.dot.default: (1, 1),
    aten.mm.default: (2, 2),
    aten.mv.default: (2, 1),
}
Tensor = torch.Tensor


def admitting(known: OpFacts, handle: Handler) -> Handler:
    """A handler that refuses what the op refuses, made of one that might answer it.

    Left out are ops without a rank to keep: the rule of a view speaks of logical dims only, and an
    elementwise op takes any; pullbacks, which `refusal` does not ask; and ops of users, which may
    do more than they return. The error of the handler itself goes first, for it says more.
    """
    if (
        known.op.namespace != "aten"
        or known.is_view
        or known.is_pointwise
        or is_pullback(known)
        or known.op in _VIEWS_IN_EFFECT
        or known.op._schema.name in _OF_ANY_RANK
    ):
        return handle
    if known.op in _RANKS:
        return _admitting_ranks(*_RANKS[known.op], handle)
    taken: set[Any] = set()

    @wraps(handle)
    def admit(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        out = handle(interpreter, op, args, kwargs)
        key = _signature((*args, *kwargs, *kwargs.values()) if kwargs else args)
        try:
            if key in taken:
                return out
        except TypeError:  # a symbolic size
            return out
        own = refused(interpreter, op, args, kwargs)
        if own is not None:
            raise own
        if len(taken) >= _KEPT:
            taken.clear()
        taken.add(key)
        return out

    return admit


def _admitting_ranks(first: int, second: int, handle: Handler) -> Handler:
    @wraps(handle)
    def admit(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        x, y = args[0], args[1]
        x_rank = len(x.logical) if type(x) in _CLASSES and x.logical is not None else x.dim()
        y_rank = len(y.logical) if type(y) in _CLASSES and y.logical is not None else y.dim()
        if x_rank != first or y_rank != second:
            own = refused(interpreter, op, args, kwargs)
            if own is not None:
                raise own
        return handle(interpreter, op, args, kwargs)

    return admit


def _signature(args: Any) -> tuple[Any, ...]:
    """All of the arguments but the elements of tensors."""
    # HOT: what is neither a view nor elementwise comes through here, at 0.3 us a tensor.
    parts: list[Any] = []
    add = parts.append
    for arg in args:
        kind = type(arg)
        if kind in _CLASSES:
            add(arg.logical or arg.shape)
            add(arg.value.dtype)
        elif kind is Tensor:
            add(arg.shape)
            add(arg.dtype)
        elif kind is int or arg is None or kind is bool:
            add(arg)
        elif kind is list or kind is tuple:
            add(_signature(arg) if arg and type(arg[0]) is not int else tuple(arg))
        elif isinstance(arg, Tensor):  # a parameter
            add(arg.shape)
            add(arg.dtype)
        else:  # 2 and 2.0 are equal, and not the same to an op
            add(kind)
            add(arg)
    return tuple(parts)


def decompose_handler(known: OpFacts, decomposition: Any) -> Handler:
    """The handler of an op that is run as the ops it is made of, at the same level.

    What PyTorch composes itself refuses what it has to; other decompositions need not.
    """
    composite = known.is_composite

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        if not (args and interpreter.is_own(args[0])) and not any(
            interpreter.is_own(t) for t in tensors_in(args, kwargs)
        ):
            return pass_down(interpreter, op, args, kwargs)
        with run_at(interpreter, autocast=composite):
            return decomposition(*args, **kwargs)

    return handle if decomposition == known.op.decompose else admitting(known, handle)
