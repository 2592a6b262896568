"""`torch.autograd.forward_ad` inside a transform: its level is one of ours.

PyTorch's forward mode keeps tangents with C++ tensors, which wrappers are not: a dual made of one
would have no tangent, and nobody would say so. So while a transform is active, the functions of
that module push a level of forward mode like `jvp`, and give and take its duals.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from lamina.autodiff.forward import ForwardInterpreter
from lamina.autodiff.wrappers import dual
from lamina_core.errors import StructureError, message
from lamina_core.mode import thread_mode
from lamina_core.outer import autograd_is_on
from lamina_core.torch_hooks.autograd import forward_ad, functorch_is_active
from lamina_core.views import refresh_levels

__all__: list[str] = []


class _Thread(threading.local):
    def __init__(self) -> None:
        self.entered: list[ForwardInterpreter] = []


_thread = _Thread()


def _is_ours() -> bool:
    """Whether user code of a transform is running: not a borrowed formula, nor torch.func."""
    return thread_mode().top is not None and not autograd_is_on() and not functorch_is_active()


def _enter() -> int:
    level = ForwardInterpreter("torch.autograd.forward_ad")
    level.__enter__()
    _thread.entered.append(level)
    return len(_thread.entered) - 1


def _exit(*, level: int | None = None) -> None:
    found = _at(level)
    if found is not _thread.entered[-1] or found is not thread_mode().top:
        raise StructureError(
            message(
                "a level of torch.autograd.forward_ad is left before what was entered inside it",
                "to fix: leave it in the function, and in the order, in which it was entered",
            )
        )
    _thread.entered.pop()
    found.__exit__()


def _at(level: int | None) -> Any:
    entered = _thread.entered
    at = len(entered) - 1 if level is None else level
    if not 0 <= at < len(entered):
        raise StructureError(
            message(
                "a dual tensor is made and no level of torch.autograd.forward_ad has been entered",
                "to fix: enter dual_level() inside the transform, or use lamina.jvp",
            )
        )
    return entered[at]


def _make(tensor: Any, tangent: Any, *, level: int | None = None) -> Any:
    found = _at(level)
    # What has been made inside the level, as the tangent usually is, is a constant there.
    tensor, tangent = (t.value if found.is_own(t) else t for t in (tensor, tangent))
    for name, what in (("primal", tensor), ("tangent", tangent)):
        if not (what.is_floating_point() or what.is_complex()):
            raise ValueError(
                f"Expected {name} to be floating point or complex, but got: {what.dtype}"
            )
        found.look(what)
    if tensor.shape != tangent.shape:
        raise RuntimeError(
            f"the tangent has shape {list(tangent.shape)}, the primal {list(tensor.shape)}"
        )
    return dual(found, tensor, tangent.to(tensor.dtype))


def _unpack(tensor: Any, *, level: int | None = None) -> Any:
    refresh_levels([tensor])
    for entered in reversed(_thread.entered) if level is None else [_at(level)]:
        if entered.is_own(tensor):
            return forward_ad.UnpackedDualTensor(tensor.value, tensor.tangent)
    return forward_ad.UnpackedDualTensor(tensor, None)


def _hook(name: str, ours: Any) -> None:
    usual = getattr(forward_ad, name)

    @functools.wraps(usual)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (ours if _is_ours() else usual)(*args, **kwargs)

    setattr(forward_ad, name, chosen)


_hook("enter_dual_level", _enter)
_hook("exit_dual_level", _exit)
_hook("make_dual", _make)
_hook("unpack_dual", _unpack)
