"""Finding the differentiable operands among the arguments of an op; shared by both modes."""

from __future__ import annotations

from typing import Any

import torch

from lamina.decompose.table import decomposition_of
from lamina_core.dispatch import lower, pass_down, watched
from lamina_core.overloads import aten
from lamina_core.rules import RuleTable
from lamina_core.schema import OpFacts, facts
from lamina_core.tensors import map_tensors, needs_guard
from lamina_core.torch_hooks.registry import has_kernel, has_kernel_for
from lamina_core.wrapper import LevelTensor, strip_dead

__all__ = [
    "Split",
    "constant_outputs",
    "derivative_state",
    "in_any_layout",
    "is_known",
    "operands_of",
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
        kind = type(arg)
        if kind is wrapper and arg.interpreter is interpreter:
            found.own = True
            values[position] = arg.value
        elif kind in _CLASSES:
            if not arg.interpreter.alive:  # it may stand for a value of this level
                arg = values[position] = strip_dead(arg)
                if interpreter.is_own(arg):
                    found.own = True
                    values[position] = arg.value
        elif isinstance(arg, Tensor) and needs_guard(arg):
            found.grads = True
        operands.append(arg)
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
        arg = strip_dead(arg)
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


def operands_of(known: OpFacts, args: Any, kwargs: Any) -> list[Any]:
    """The tensor operands of a call in the order of `Split.operands`."""
    found = [args[p] if p < len(args) else None for p in known.tensor_args]
    for position in known.list_args:
        if position < len(args) and args[position] is not None:
            found.extend(args[position])
    for name in known.tensor_kwargs:
        value = kwargs.get(name)
        if isinstance(value, (list, tuple)):
            found.extend(value)
        else:
            found.append(value)
    return found


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
    return map_tensors(interpreter.adopt, out)


# The memory of a tangent need not be laid out like that of its primal.
_IN_ANY_LAYOUT = {
    aten.view.default: aten.reshape.default._op,
    aten._unsafe_view.default: aten.reshape.default._op,
    aten.view_as_complex.default: lambda t: torch.view_as_complex(t.contiguous()),
}


def in_any_layout(known: OpFacts) -> Any:
    """What does to a tangent what a linear op does to its primal."""
    return _IN_ANY_LAYOUT.get(known.op, known.call)


def derivative_state(table: RuleTable, op: Any) -> str:
    """Which of the five states of `lamina_core.rules.STATES` an op is in for one mode's table."""
    known = facts(op)
    rule = table.lookup(op)
    if rule is not None:
        return rule.state
    if decomposition_of(op) is not None:
        return "decomposed"
    if known.mutated:
        counterpart = known.functional()
        return "missing" if counterpart is None else derivative_state(table, counterpart)
    if known.is_composite:
        return "decomposed"
    return "generic" if is_known(op) else "missing"


def is_known(op: Any) -> bool:
    """Whether PyTorch's autograd knows the op, if only as one whose result is constant."""
    name = op.name()
    return has_kernel(name) and any(has_kernel_for(name, key) for key in _AUTOGRAD_KEYS)


_AUTOGRAD_KEYS = ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd")
