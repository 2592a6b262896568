"""Finding the differentiable operands among the arguments of an op; shared by both modes."""

from __future__ import annotations

from typing import Any

import torch

from lamina.decompositions import decomposition_of
from lamina_core.dispatch import lower, map_tensors, needs_guard, pass_down, tensors_in, watched
from lamina_core.interpreter import run_at
from lamina_core.rules import RuleTable
from lamina_core.schema import OpFacts, facts
from lamina_core.wrapper import LevelTensor

__all__ = [
    "Split",
    "constant_outputs",
    "decompose_handler",
    "derivative_state",
    "pass_through",
    "split",
]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


class Split:
    """The arguments of one call, taken apart.

    Attributes:
        args: Positional arguments with own wrappers replaced by their values.
        kwargs: Keyword arguments likewise.
        operands: The tensor operands as they came (wrappers of this level among them), in schema
            order, lists flattened; None for an optional tensor that is absent.
        own: Whether any operand belongs to this level.
        grads: Whether a plain operand requires grad.
    """

    __slots__ = ("args", "grads", "kwargs", "operands", "own")

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self) -> None:
        self.operands: list[Any] = []
        self.own = False
        self.grads = False


# HOT: a flat loop; with a helper function per operand it costs twice as much.
def split(interpreter: Any, known: OpFacts, args: Any, kwargs: Any) -> Split:
    """Take the arguments of a call apart."""
    wrapper = interpreter.wrapper
    found = Split()
    operands = found.operands
    values = list(args)
    count = len(values)
    for position in known.tensor_args:
        if position >= count:
            operands.append(None)
            continue
        arg = values[position]
        operands.append(arg)
        kind = type(arg)
        if kind is wrapper and arg.interpreter is interpreter:
            found.own = True
            values[position] = arg.value
        elif kind not in _CLASSES and isinstance(arg, Tensor) and needs_guard(arg):
            found.grads = True
    if known.list_args or known.tensor_kwargs:
        kwargs = _split_rest(interpreter, known, found, values, kwargs)
    found.args = tuple(values)
    found.kwargs = kwargs
    return found


def _split_rest(
    interpreter: Any, known: OpFacts, found: Split, values: list[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The operands in lists and keyword-only arguments; returns the new keyword arguments."""

    def unbox(arg: Any) -> Any:
        found.operands.append(arg)
        if interpreter.is_own(arg):
            found.own = True
            return arg.value
        if isinstance(arg, Tensor) and type(arg) not in _CLASSES and needs_guard(arg):
            found.grads = True
        return arg

    for position in known.list_args:
        if position < len(values) and values[position] is not None:
            values[position] = [unbox(item) for item in values[position]]
    kwargs = dict(kwargs)
    for name in known.tensor_kwargs:
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            kwargs[name] = unbox(value)
        elif isinstance(value, (list, tuple)):
            kwargs[name] = [unbox(item) for item in value]
        else:
            found.operands.append(None)
    return kwargs


def pass_through(interpreter: Any, handle: Any, op: Any, args: Any, kwargs: Any, cut: Split) -> Any:
    """What both modes do first; `NotImplemented` means "go on, some operand is ours"."""
    if cut.grads and not interpreter.watch:
        interpreter.watch = True
        return watched(interpreter, handle, op, args, kwargs)
    if not cut.own:
        return pass_down(interpreter, op, args, kwargs)
    return NotImplemented


def constant_outputs(interpreter: Any, known: OpFacts, args: Any, cut: Split) -> Any:
    """Run an op whose outputs carry no derivative."""
    out = lower(interpreter, known.op, cut.args, cut.kwargs)
    if isinstance(out, Tensor) and cut.args and out is cut.args[0]:
        return args[0]
    return map_tensors(interpreter.constant, out)


def decompose_handler(decomposition: Any) -> Any:
    """The handler of an op that is run as the ops it is made of."""

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        if not any(interpreter.is_own(t) for t in tensors_in(args, kwargs)):
            return pass_down(interpreter, op, args, kwargs)
        with run_at(interpreter):
            return decomposition(*args, **kwargs)

    return handle


def derivative_state(table: RuleTable, op: Any) -> str:
    """Which of the five states of `lamina_core.rules.STATES` an op is in for one mode's table."""
    known = facts(op)
    rule = table.lookup(op)
    if rule is not None:
        return rule.state
    if known.mutated:
        counterpart = known.functional()
        return "missing" if counterpart is None else derivative_state(table, counterpart)
    if known.is_composite or decomposition_of(op) is not None:
        return "decomposed"
    return "generic"
