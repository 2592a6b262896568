"""Methods and operators of wrappers that reach their interpreter without a trip through C++.

`x * y` on a wrapper normally goes through PyTorch's argument parser and dispatcher before it comes
back to Python as `aten.mul.Tensor`: 2.1 us. Where it is plain which interpreter that will be, and
no other mode is active inside the transforms, the operator calls the interpreter itself, with the
thread's mode off as torch has it in a handler. User code does not get so past ops that autocast may
cast, because autocast works above the dispatch modes. Arguments in any but their plainest form are
left to the usual method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina_core.mode import _thread
from lamina_core.torch_hooks.modes import function_mode_count, mode_count, pop_mode, push_mode
from lamina_core.wrapper import LevelTensor

__all__: list[str] = []

aten = torch.ops.aten
Tensor = torch.Tensor
_CLASSES = LevelTensor.classes
_PLAIN_OPERANDS = frozenset((Tensor, torch.nn.Parameter, float, int))
_SIZES = frozenset((tuple, list, torch.Size))


def _as(method: Any, usual: Any) -> Any:
    method.__name__ = usual.__name__
    method.__doc__ = usual.__doc__
    return method


def _unary(op: Any, usual: Any) -> Any:
    def method(self: Any) -> Any:
        mode: Any = _thread.mode
        interpreter = self.interpreter
        length = mode_count()
        if length < mode.depth and not (length and mode.is_on()):
            # Rule code: an op goes to the interpreter of its operand (the second route).
            if interpreter.alive:
                return interpreter.process(op, (self,), {})
        elif interpreter is mode.top and length == mode.depth and not function_mode_count():
            # User code: the innermost transform owns the operand (the first route).
            popped = pop_mode(None)
            try:
                # Inside a handler the length may be the same by another mode of the user's code.
                if popped is mode:
                    return interpreter.process(op, (self,), {})
            finally:
                push_mode(popped)
        return usual(self)

    return _as(method, usual)


def _binary(op: Any, usual: Any, reflected: bool = False, cast: bool = False) -> Any:
    def method(self: Any, other: Any) -> Any:
        mode: Any = _thread.mode
        interpreter = self.interpreter
        length = mode_count()
        kind = type(other)
        # `plain + wrapper` comes here first. The order is kept: a result is laid out like its first
        # operand, and from a transposed one all that follows would inherit rows out of order.
        swap = reflected and isinstance(other, Tensor)
        if length < mode.depth and not (length and mode.is_on()):
            if interpreter.alive and (
                other.interpreter is interpreter if kind in _CLASSES else kind in _PLAIN_OPERANDS
            ):
                return interpreter.process(op, (other, self) if swap else (self, other), {})
        elif (
            not cast
            and interpreter is mode.top
            and length == mode.depth
            and not function_mode_count()
            and (kind in _CLASSES or kind in _PLAIN_OPERANDS)
        ):
            popped = pop_mode(None)
            try:
                if popped is mode:
                    return interpreter.process(op, (other, self) if swap else (self, other), {})
            finally:
                push_mode(popped)
        return op(other, self) if swap else usual(self, other)

    return _as(method, usual)


def _parsed(op: Any, usual: Any, parse: Callable[[Any, Any], Any], cast: bool = False) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode: Any = _thread.mode
        interpreter = self.interpreter
        length = mode_count()
        if not kwargs:
            if length < mode.depth and not (length and mode.is_on()):
                if interpreter.alive and (parsed := parse(self, args)) is not None:
                    return interpreter.process(op, parsed, {})
            elif (
                not cast
                and interpreter is mode.top
                and length == mode.depth
                and not function_mode_count()
                and (parsed := parse(self, args)) is not None
            ):
                popped = pop_mode(None)
                try:
                    if popped is mode:
                        return interpreter.process(op, parsed, {})
                finally:
                    push_mode(popped)
        return usual(self, *args, **kwargs)

    return _as(method, usual)


# The arguments of the op for a call `self.method(*args)`; None is left to the usual method.


def _one_int(self: Any, args: Any) -> Any:
    """`(dim)`."""
    return (self, *args) if len(args) == 1 and type(args[0]) is int else None


def _two_ints(self: Any, args: Any) -> Any:
    """`(dim0, dim1)`."""
    if len(args) == 2 and type(args[0]) is int and type(args[1]) is int:
        return (self, *args)
    return None


def _ints(self: Any, args: Any) -> Any:
    """`(*sizes)` or `(sizes)`."""
    sizes = args[0] if len(args) == 1 and type(args[0]) in _SIZES else args
    for size in sizes:
        if type(size) is not int:
            return None
    return (self, list(sizes)) if args else None


def _index(self: Any, args: Any) -> Any:
    """`x[index]` with an int, which picks from the first dim."""
    return (self, 0, args[0]) if type(args[0]) is int else None


def _dims(self: Any, args: Any) -> Any:
    """`(dims)` or `(dims, keepdim)`."""
    if 1 <= len(args) <= 2 and type(args[0]) is list:
        return (self, *args)
    return None


_UNARY = {
    "__neg__": aten.neg.default,
    "abs": aten.abs.default,
    "cos": aten.cos.default,
    "neg": aten.neg.default,
    "relu": aten.relu.default,
    "sigmoid": aten.sigmoid.default,
    "sin": aten.sin.default,
    "sqrt": aten.sqrt.default,
    "t": aten.t.default,
    "tanh": aten.tanh.default,
}
_BINARY = {
    "__add__": aten.add.Tensor,
    "__mul__": aten.mul.Tensor,
    "__radd__": aten.add.Tensor,
    "__rmul__": aten.mul.Tensor,
    "__sub__": aten.sub.Tensor,
    "__truediv__": aten.div.Tensor,
}
_PARSED = {
    "__getitem__": (aten.select.int, _index),
    "expand": (aten.expand.default, _ints),
    "permute": (aten.permute.default, _ints),
    "reshape": (aten.reshape.default, _ints),
    "select": (aten.select.int, _two_ints),
    "squeeze": (aten.squeeze.dim, _one_int),
    "transpose": (aten.transpose.int, _two_ints),
    "unsqueeze": (aten.unsqueeze.default, _one_int),
    "view": (aten.view.default, _ints),
}

# What autocast may cast: shortcuts for rules alone, in which it is off.
_CAST = {
    "bmm": aten.bmm.default,
    "matmul": aten.matmul.default,
    "mm": aten.mm.default,
}

for _name, _op in _UNARY.items():
    setattr(LevelTensor, _name, _unary(_op, getattr(Tensor, _name)))
for _name, _op in _BINARY.items():
    _method = _binary(_op, getattr(Tensor, _name), reflected=_name.startswith("__r"))
    setattr(LevelTensor, _name, _method)
for _name, _op in _CAST.items():
    setattr(LevelTensor, _name, _binary(_op, getattr(Tensor, _name), cast=True))
for _name, (_op, _parse) in _PARSED.items():
    setattr(LevelTensor, _name, _parsed(_op, getattr(Tensor, _name), _parse))
LevelTensor.sum = _parsed(aten.sum.dim_IntList, Tensor.sum, _dims, cast=True)  # type: ignore[method-assign]
