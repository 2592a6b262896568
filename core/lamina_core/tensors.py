"""Finding the tensors among the arguments of an op, whatever they are."""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.torch_hooks.autograd import forward_ad

__all__ = ["map_tensors", "needs_guard", "tensors_in"]

Tensor = torch.Tensor


def tensors_in(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """All tensors among the arguments of an op, wrappers included."""
    found: list[Any] = []
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, Tensor):
            found.append(arg)
        elif type(arg) is list or type(arg) is tuple:
            found.extend(item for item in arg if isinstance(item, Tensor))
    return found


def map_tensors(fn: Any, arg: Any) -> Any:
    """Apply `fn` to every tensor of one argument or of one output."""
    if isinstance(arg, Tensor):
        return fn(arg)
    if isinstance(arg, (list, tuple)):
        mapped = [map_tensors(fn, item) for item in arg]
        return mapped if type(arg) is list else tuple(mapped)
    return arg


def needs_guard(plain: Any) -> bool:
    """Whether the user's own autograd wants to see ops on this plain tensor."""
    return bool(plain.requires_grad) or forward_ad._current_level >= 0
