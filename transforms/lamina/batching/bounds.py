"""Indices that have to lie in a range: those whose rule hands them to an op that takes more.

A rule that lays the tables of all examples end to end, or that reads by an op which counts negative
numbers from the end, would find an element for an index that the op itself refuses: one of another
example.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.overloads import aten
from lamina_core.torch_hooks.autograd import functorch_is_active
from lamina_core.torch_hooks.modes import disable_modes, mode_count
from lamina_core.views import refresh_levels
from lamina_core.wrapper import plain_of

__all__ = ["require", "require_all"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def require(index: Any, low: int, high: int, what: str = "index") -> None:
    """Refuse integers outside `low <= index < high`, at whatever level.

    On a device that runs behind, the error comes with the next synchronisation, as it does for the
    op alone. Nothing is asked of what has no elements to show: meta and fake tensors, and wrappers
    of `torch.func`.

    Raises:
        IndexError: If there is one.
    """
    plain = _readable(index)
    if plain is None:
        return
    if mode_count():
        with disable_modes():
            _require(plain, low, high, what)
    else:
        _require(plain, low, high, what)


def _require(plain: Any, low: int, high: int, what: str) -> None:
    if plain.device.type != "cpu":
        held = ((plain >= low) & (plain < high)).all()
        aten._assert_async.msg(held, f"{what} out of range [{low}, {high})")
        return
    least, most = map(int, torch.aminmax(plain))
    if least < low or most >= high:
        at_fault = least if least < low else most
        raise IndexError(f"{what} {at_fault} is out of range: it has to be in [{low}, {high})")


def require_all(conditions: Any, text: str) -> None:
    """Refuse a call for which one of some bools does not hold, at whatever level.

    Raises:
        RuntimeError: If there is one, with the text.
    """
    plain = _readable(conditions)
    if plain is None:
        return
    with disable_modes():
        if plain.device.type != "cpu":
            aten._assert_async.msg(plain.all(), text)
        elif not plain.all():
            raise RuntimeError(text)


def _readable(tensor: Any) -> Any:
    refresh_levels([tensor])
    plain = plain_of(tensor)
    if type(plain) not in _PLAIN or plain.is_meta or not plain.numel() or functorch_is_active():
        return None
    return plain
