"""Outputs that are no pytrees: do they hold tensors, which then nobody unwraps?"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from lamina_core import pytree

__all__ = ["holds_mapped"]

# What they hold is shared with all who call them.
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def holds_mapped(interpreter: Any, value: Any) -> bool:
    """Whether a set, or an object by its attributes, holds a mapped tensor of a level.

    A constant of the level stands for its value afterwards, and may be held.
    """
    return any(
        interpreter.is_own(tensor) and not interpreter.is_constant(tensor)
        for item in _held(value)
        for tensor in pytree.leaves(item)
    )


def _held(value: Any) -> Iterable[Any]:
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, _CODE):
        return []
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    held = [getattr(value, name, None) for name in slots if isinstance(name, str)]
    return [*held, *getattr(value, "__dict__", {}).values()]
