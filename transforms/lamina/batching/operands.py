"""What a handler of an op begins with: operands taken apart, and ops that have none batched."""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.batched import BatchedTensor
from lamina_core.dispatch import lower, pass_down
from lamina_core.schema import OpFacts, facts
from lamina_core.tensors import map_tensors, needs_guard, tensors_in
from lamina_core.views import record_views
from lamina_core.wrapper import LevelTensor, made_as_view, strip_dead

__all__ = ["pass_unbatched", "unwrap"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


# HOT: a flat loop; with a helper function per operand it costs twice as much.
def unwrap(interpreter: Any, known: OpFacts, args: Any, kwargs: Any) -> Any:
    """Values and in_dims of the arguments; `batched` says whether any is, `own` likewise."""
    values, dims = list(args), [None] * len(args)
    batched = own = grads = False
    count = len(values)
    for position in known.tensor_args:
        if position >= count:
            break
        arg = values[position]
        kind = type(arg)
        if kind is BatchedTensor and arg.interpreter is interpreter:
            own = True
            values[position] = arg.value
            if arg.bdim is not None:
                batched = True
                dims[position] = arg.bdim
        elif kind in _CLASSES:
            if not arg.interpreter.alive:  # it may stand for a value of this level
                arg = values[position] = strip_dead(arg)
                if interpreter.is_own(arg):
                    own, batched = True, batched or arg.bdim is not None
                    values[position], dims[position] = arg.value, arg.bdim
        elif isinstance(arg, Tensor) and needs_guard(arg):
            grads = True
    kwarg_dims: dict[str, int | None] = {}
    if known.list_args or known.tensor_kwargs:
        more: list[Any] = []
        kwargs = _unwrap_rest(interpreter, known, values, dims, kwargs, kwarg_dims, more)
        own = own or any(interpreter.is_own(arg) for arg in more)
        batched = batched or any(interpreter.is_own(arg) and arg.bdim is not None for arg in more)
        grads = grads or any(
            isinstance(arg, Tensor) and type(arg) not in _CLASSES and needs_guard(arg)
            for arg in more
        )
    return values, tuple(dims), kwargs, kwarg_dims, batched, own, grads


def _unwrap_rest(
    interpreter: Any,
    known: OpFacts,
    values: list[Any],
    dims: list[Any],
    kwargs: dict[str, Any],
    kwarg_dims: dict[str, int | None],
    more: list[Any],
) -> dict[str, Any]:
    """Values and dims in lists and keyword-only arguments; `more` collects what was found."""

    def one(arg: Any) -> tuple[Any, int | None]:
        arg = strip_dead(arg)
        more.append(arg)
        return (arg.value, arg.bdim) if interpreter.is_own(arg) else (arg, None)

    for position in known.list_args:
        if position < len(values) and values[position] is not None:
            pairs = [one(item) for item in values[position]]
            values[position] = [value for value, _ in pairs]
            dims[position] = [bdim for _, bdim in pairs]
    if known.tensor_kwargs:
        kwargs = dict(kwargs)
        for name in known.tensor_kwargs:
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name], kwarg_dims[name] = one(kwargs[name])
    return kwargs


def pass_unbatched(
    interpreter: Any, op: Any, args: Any, kwargs: Any, own: bool | None = None
) -> Any:
    """An op without batched arguments: run it below; its result is the same for every example."""
    if own is None:
        own = any(interpreter.is_own(t) for t in tensors_in(args, kwargs))
    if not own:
        return pass_down(interpreter, op, args, kwargs)

    def unbox(tensor: Any) -> Any:
        return tensor.value if interpreter.is_own(tensor) else tensor

    values = [map_tensors(unbox, arg) for arg in args]
    inner = {key: map_tensors(unbox, value) for key, value in kwargs.items()}
    out = lower(interpreter, op, tuple(values), inner)
    if values and out is values[0]:
        return args[0]
    wrapped = map_tensors(interpreter.adopt, out)
    known = facts(op)
    is_view = known.is_view or (known.may_be_view and made_as_view(out, values[0]))
    if is_view and interpreter.is_own(args[0]):
        return record_views(wrapped, op, args, kwargs)
    return wrapped
