"""What torch does to a tensor's memory below Python, where a wrapper has none.

These functions of C++ take a tensor for what it is there, and reading the memory of a wrapper ends
the process. They are replaced once by ones that ask first; plain tensors do not notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.dlpack

from lamina_core.torch_hooks.doors import door

__all__ = ["exchange", "guard_memory", "making_a_parameter"]

_make_subclass = door("torch.Tensor._make_subclass", "parameters made of values of a transform")
_to_dlpack = door("torch._C._to_dlpack", "wrappers are not exported")
_data: Any = door("torch.Tensor.data", "assignments to .data")
# The code from which `nn.Parameter` asks a tensor of an unknown class to require grad.
_PARAMETER: Any = door("torch.nn.Parameter.__new__", "parameters made inside a transform")


def exchange(tensor: Any, new: Any) -> None:
    """Let a tensor have the shape, dtype and memory of another, as an assignment to .data does."""
    _data.__set__(tensor, new)


def making_a_parameter(frame: Any) -> bool:
    """Whether a call comes from the constructor of `nn.Parameter`."""
    return frame.f_code is getattr(_PARAMETER, "__code__", None)


def guard_memory(is_wrapper: Callable[[Any], bool], plain_of: Callable[[Any, str], Any]) -> None:
    """Ask about wrappers wherever C++ would read their memory.

    Args:
        is_wrapper: Whether a tensor has no memory of its own.
        plain_of: The plain tensor that a wrapper stands for, or an error that names what was tried.
    """

    @functools.wraps(_make_subclass)
    def make_subclass(cls: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        if is_wrapper(data):
            data = plain_of(data, f"a {cls.__name__} is made")
        return _make_subclass(cls, data, *args, **kwargs)

    @functools.wraps(_to_dlpack)
    def to_dlpack(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if is_wrapper(tensor):
            return tensor.__dlpack__()
        return _to_dlpack(tensor, *args, **kwargs)

    def set_data(tensor: Any, new: Any) -> None:
        if is_wrapper(new):
            new = plain_of(new, "the memory of a captured tensor is exchanged by .data")
        exchange(tensor, new)

    owner: Any = torch.Tensor
    owner._make_subclass = staticmethod(make_subclass)
    owner.data = property(_data.__get__, set_data, _data.__delete__, _data.__doc__)
    for place in (torch, torch.utils.dlpack, torch._C):
        for name in ("to_dlpack", "_to_dlpack"):
            if getattr(place, name, None) is _to_dlpack:
                setattr(place, name, to_dlpack)
