"""What happens to an op that an interpreter has nothing to say about.

Two routes lead an op to an interpreter:

1. From user code, `LevelMode.__torch_dispatch__` sends it to the top of the stack. An interpreter
   that finds none of its own wrappers calls `pass_down`, and adopts fresh outputs.
2. From inside a rule (torch has switched the mode off there), `LevelTensor.__torch_dispatch__`
   sends it to the interpreter of the highest level among its arguments.

At the bottom `native` runs it on plain tensors, under the user's own dispatch-key state where a
tensor requires grad or is written to, so that the user's autograd sees the op as if no transform
were there.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core import indexing as _indexing  # noqa: F401 - gives wrappers their door
from lamina_core import shortcuts as _shortcuts  # noqa: F401 - gives wrappers their operators
from lamina_core.interpreter import Interpreter
from lamina_core.mode import thread_mode
from lamina_core.outer import among_others, autocast_keys, regain
from lamina_core.schema import facts, reads_bits, resolved
from lamina_core.tensors import map_tensors, needs_guard, tensors_in
from lamina_core.torch_hooks.autograd import forward_ad, functorch_depth
from lamina_core.wrapper import LevelTensor, highest_interpreter, made_as_view, strip_dead

__all__ = [
    "INSTEAD",
    "call_first",
    "call_one",
    "call_two",
    "copied",
    "followed",
    "is_followed",
    "lower",
    "native",
    "pass_down",
    "under_autocast",
    "watched",
]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


def native(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op at level 0."""
    tensors = tensors_in(args, kwargs)
    if any(type(tensor) in _CLASSES for tensor in tensors):
        # Wrappers that outlived their transform, or that belong to a level of another thread.
        args = tuple([strip_dead(arg) for arg in args])
        kwargs = {key: strip_dead(value) for key, value in kwargs.items()}
        tensors = tensors_in(args, kwargs)
        if highest_interpreter(args, kwargs) is not None:
            return op(*args, **kwargs)
    outer = thread_mode().outer
    if outer is not None and (
        outer.sees_all or facts(op).mutated or any(needs_guard(tensor) for tensor in tensors)
    ):
        with outer.guard():
            return INSTEAD.get(id(op), op)(*args, **kwargs)
    return op(*args, **kwargs)


def followed(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an op of a rule that may have to be another one for the user's autograd."""
    return INSTEAD.get(id(op), op)(*args, **kwargs)


def copied(x: Any, src: Any, non_blocking: bool = False) -> Any:
    """`aten.copy`: `src` in the shape, strides, dtype and device of `x`.

    Writing in place ends in this op, and PyTorch has no formula for it. So where the user's own
    autograd is to follow, it is run as ops that have one.
    """
    if not (needs_guard(src) or needs_guard(x)):
        return _COPY(x, src, non_blocking)
    src = src.to(device=x.device, dtype=x.dtype, non_blocking=non_blocking).expand(x.shape)
    return followed(torch.ops.aten.slice_scatter.default, x, src) if x.dim() else src.clone()


_COPY = torch.ops.aten.copy.default

# What is run in place of an op that PyTorch has no derivative for, or not the whole of it, where
# the user's own autograd is to follow: transforms that know better add to it. Each looks whether it
# is to, and else calls the op.
INSTEAD: dict[int, Any] = {
    id(_COPY): copied,
    id(torch.ops.aten.zero.default): torch.zeros_like,
}


def call_one(op: Any, call: Any, value: Any) -> Any:
    """Run a one-operand op of a rule on a value, without a round trip through C++ for a wrapper.

    HOT: saves 2.5 us an op where levels are nested.
    """
    if type(value) in _CLASSES and value.interpreter.alive:
        return value.interpreter.process(op, (value,), {})
    return call(value)


def call_first(op: Any, call: Any, value: Any, rest: Any, kwargs: Any) -> Any:
    """`call_one` for an op whose further arguments are no tensors."""
    if type(value) in _CLASSES and value.interpreter.alive:
        return value.interpreter.process(op, (value, *rest), kwargs)
    return call(value, *rest, **kwargs)


def call_two(op: Any, call: Any, first: Any, second: Any) -> Any:
    """`call_one` for an op with two operands, the second of which may be a Python number."""
    if type(first) in _CLASSES:
        interpreter = first.interpreter
        if interpreter.alive and (
            second.interpreter is interpreter
            if type(second) in _CLASSES
            else not isinstance(second, Tensor)
        ):
            return interpreter.process(op, (first, second), {})
    return call(first, second)


def lower(interpreter: Interpreter, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op at the level below `interpreter`.

    For ops that the levels below must see although no argument belongs to them: random ops and
    factories. Any other op of a rule is simply called.
    """
    below = interpreter.below
    if below is not None:
        return below.process(op, args, kwargs)
    if reads_bits(op):
        args = (resolved(args[0]), *args[1:])
    return native(op, args, kwargs)


def pass_down(
    interpreter: Interpreter, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Hand an op without own wrappers to the level below, and adopt the outputs if it is user code.

    Adopting wraps a fresh output as a constant of the level, so that values of that level can later
    be written to it in place. Views and written arguments keep their identity.
    """
    below = interpreter.below
    mode = thread_mode()
    if mode.top is not interpreter:
        return native(op, args, kwargs) if below is None else below.process(op, args, kwargs)
    if below is None:
        out = native(op, args, kwargs)
    else:
        # The op is user code of the level below as well, which adopts in its turn.
        mode.top = below
        try:
            out = below.process(op, args, kwargs)
        finally:
            mode.top = interpreter
    known = facts(op)
    if known.is_view or known.mutated:
        return out
    if known.may_be_view and made_as_view(out, args[0]):
        return out
    taken = {id(tensor) for tensor in tensors_in(args, kwargs)}
    return map_tensors(
        lambda tensor: tensor if id(tensor) in taken else interpreter.adopt(tensor), out
    )


def is_followed(interpreter: Interpreter) -> bool:
    """Whether the user's own autograd sees the ops on plain values of a level."""
    outer = thread_mode().outer
    return interpreter.watch and outer is not None and _asks(outer)


def _asks(outer: Any) -> bool:
    return bool(outer.sees_all or outer.grad_enabled or forward_ad._current_level >= 0)


def watched(
    interpreter: Interpreter,
    handler: Any,
    op: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a handler at a level that has met a plain tensor which requires grad.

    Where all values below are plain, the whole rule runs under the user's dispatch-key state.
    Where some are wrappers of a lower level, the plain ones that require grad are lifted to that
    level as constants, so that every op of the rule is seen there and ends in the first case.
    """
    outer = thread_mode().outer
    if outer is not None and outer.sees_all and functorch_depth() != outer.depth:
        raise among_others(interpreter)
    if outer is None or not _asks(outer):
        # Under no_grad around the transforms nobody outside asks, and the guard would switch off
        # this level as well, whose handler looks at the same flag.
        return handler(interpreter, op, args, kwargs)
    own: list[tuple[Any, str]] = []
    guarded = False
    highest: Interpreter | None = None
    for tensor in tensors_in(args, kwargs):
        mine = interpreter.is_own(tensor)
        held = tensor.holds if mine else ("",)
        for name in held:
            value = getattr(tensor, name) if name else tensor
            if type(value) in _CLASSES:
                if value.interpreter.alive and (
                    highest is None or value.interpreter.level > highest.level
                ):
                    highest = value.interpreter
            elif isinstance(value, Tensor) and (outer.sees_all or needs_guard(value)):
                guarded = True
                if mine:
                    own.append((tensor, name))
    if not guarded:
        return handler(interpreter, op, args, kwargs)
    if highest is None:
        with outer.guard():
            return handler(interpreter, op, args, kwargs)
    level = highest

    def lift(tensor: Any) -> Any:
        if type(tensor) in _CLASSES or not (outer.sees_all or needs_guard(tensor)):
            return tensor
        wrapped = level.constant(tensor)
        wrapped.is_input = wrapped.is_lifted = True
        return wrapped

    for wrapper, name in own:
        setattr(wrapper, name, lift(getattr(wrapper, name)))
    args = tuple([map_tensors(lift, arg) for arg in args])
    kwargs = {key: map_tensors(lift, value) for key, value in kwargs.items()}
    return handler(interpreter, op, args, kwargs)


# Composite ops with rules of their own, inside which autocast acts: it does not know them by name.
_CAST_INSIDE = frozenset(
    f"aten::{name}"
    for name in ("cross_entropy_loss", "einsum", "gru", "lstm", "rnn_relu", "rnn_tanh")
)


def under_autocast(op: Any, handler: Any) -> Any:
    """The handler of an op, with autocast switched on again where it acts inside the op."""
    if op._schema.name not in _CAST_INSIDE:
        return handler

    def cast_inside(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        autocast = autocast_keys()
        if autocast is None:
            return handler(interpreter, op, args, kwargs)
        if not interpreter.watch and any(
            type(tensor) not in _CLASSES and needs_guard(tensor)
            for tensor in tensors_in(args, kwargs)
        ):
            # Before autocast is on again: the caller's keys, which then come first, are without it.
            interpreter.watch = True
            return watched(interpreter, cast_inside, op, args, kwargs)
        with regain(autocast):
            return handler(interpreter, op, args, kwargs)

    return cast_inside
