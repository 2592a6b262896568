"""The door of `torch.autograd.Function`: every call of `apply`, in whatever way it was come by.

# NOTE [Function.apply]
Up to torch 2.13 `Function.apply` is Python and ends in `_SingleLevelFunction.apply`, looked up on
every call: replacing that one catches all calls. From 2.14 on `Function.apply` is a method written
in C. Replacing it catches `Fn.apply`, but not an `apply` that was stored before we were imported
(`attention = Attention.apply`, as kernel libraries write). C then makes the context from
`Fn._backward_cls` and calls `Fn.forward`. So the former is watched, by a descriptor on the
metaclass, and while a transform is active a class whose context is asked for gets a forward that
hands the call to the caught `apply`. C takes outputs that are marked as non-differentiable as they
are, and adds no graph of its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lamina_core.torch_hooks.doors import door

__all__ = ["USUAL_APPLY", "catch_functions", "original_apply"]

Function: Any = door("torch.autograd.function.Function", "functions with a backward of their own")
_Base: Any = door("torch.autograd.function._SingleLevelFunction", "catching Function.apply")
_Meta: Any = door("torch.autograd.function.FunctionMeta", "catching a stored Function.apply")
USUAL_APPLY = Function.__dict__.get("apply", _Base.__dict__.get("apply"))
# A method of C cannot be replaced where it stands, and is found on `Function` itself.
_OF_C = not isinstance(USUAL_APPLY, classmethod)


def original_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`Function.apply` as PyTorch has it."""
    if not _OF_C:
        return super(_Base, cls).apply(*args, **kwargs)
    before, _here.original = _here.original, True
    try:
        return USUAL_APPLY.__get__(None, cls)(*args, **kwargs)
    finally:
        _here.original = before


def catch_functions(caught: Callable[..., Any], is_active: Callable[[], bool]) -> None:
    """Have every `Function.apply` call something else.

    Args:
        caught: Called as `caught(cls, *args, **kwargs)`; it may call `original_apply`.
        is_active: Whether calls through a stored `apply` concern us at the moment.
    """
    if not _OF_C:

        def once_bound(cls: Any, *args: Any, **kwargs: Any) -> Any:
            # Torch 2.11 and 2.12 bind keyword arguments for `setup_context`, and hand them on too.
            if kwargs and cls.setup_context is not _Base.setup_context:
                kwargs = {}
            return caught(cls, *args, **kwargs)

        _Base.apply = classmethod(once_bound)
        return
    Function.apply = classmethod(caught)
    _Meta._backward_cls = _BackwardClass(is_active)


class _Here(threading.local):
    """What the thread is at.

    Attributes:
        original: Whether `original_apply` is running, and has not reached `forward` yet.
        stored: The class whose stored `apply` is on its way to `forward`, and the grad mode there.
        outs: What that forward returned, for the `setup_context` that follows.
    """

    def __init__(self) -> None:
        self.original = False
        self.stored: tuple[Any, bool] | None = None
        self.outs: Any = None


_here = _Here()


class _BackwardClass:
    """Stands in for `_backward_cls` of all function classes: see NOTE [Function.apply]."""

    def __init__(self, is_active: Callable[[], bool]) -> None:
        self.is_active = is_active
        self.own: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def __get__(self, cls: Any, meta: Any = None) -> Any:
        if cls is None:
            return self
        if _here.original:
            _here.original = False  # what forward calls in its turn is not ours
        elif self.is_active():
            _listen(cls)
            _here.stored = cls, torch.is_grad_enabled()
        for base in cls.__mro__:
            if base in self.own:
                return self.own[base]
            if "_backward_cls" in base.__dict__:
                return base.__dict__["_backward_cls"]
        raise AttributeError("_backward_cls")

    def __set__(self, cls: Any, value: Any) -> None:
        self.own[cls] = value


def _listen(cls: Any) -> None:
    """Give a class, once, a forward that knows when it is called through a stored `apply`."""
    if getattr(cls.__dict__.get("forward"), "lamina_listens", False):
        return
    usual, set_up = cls.forward, cls.setup_context
    two_steps = set_up is not _Base.setup_context

    @functools.wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if _here.stored is None or _here.stored[0] is not cls:
            return usual(*args, **kwargs)
        enabled, _here.stored = _here.stored[1], None
        with torch.set_grad_enabled(enabled):
            outs = cls.apply(*(args if two_steps else args[1:]))
        if two_steps:
            _here.outs = outs
        else:
            _without_graph(args[0], outs)
        return outs

    @functools.wraps(set_up)
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        if _here.outs is None or _here.outs is not output:
            set_up(ctx, inputs, output)
        else:
            _here.outs = None
            _without_graph(ctx, output)

    listening: Any = staticmethod(forward)
    listening.lamina_listens = True
    cls.forward = listening
    if two_steps:
        cls.setup_context = staticmethod(setup_context)


def _without_graph(ctx: Any, outs: Any) -> None:
    """Have C take outputs, which have their place on our tapes, as they are."""
    several = outs if isinstance(outs, tuple) else (outs,)
    ctx.mark_non_differentiable(*[out for out in several if isinstance(out, torch.Tensor)])
