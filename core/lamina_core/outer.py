"""The dispatch keys of the caller: what is off in a transform, and how to get it back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from lamina_core.errors import StructureError
from lamina_core.torch_hooks import keys
from lamina_core.torch_hooks.autograd import functorch_depth, functorch_is_active, set_grad_enabled
from lamina_core.torch_hooks.modes import mode_count

__all__ = [
    "AUTOCAST",
    "BELOW_AUTOGRAD",
    "OuterState",
    "among_others",
    "autocast_keys",
    "autocast_off",
    "autograd_is_on",
    "regain",
]

# Autograd and ADInplaceOrView are off while a transform is active: composite ops then reach Python
# whole, no C++ graph grows on wrappers, and a view op does not chain its output to its input.
_outside = keys.excluded_keys()
with keys.BelowADInplaceOrView():
    BELOW_AUTOGRAD = keys.excluded_keys() - _outside

# Those of torch.func, and of tracing before dispatch, off where we are called inside one of them:
# an op of user code is ours first, and what it comes to on plain tensors is theirs.
# The keys of its tensors too: they come before Python's, and what they lead to takes a tensor for
# one that has outlived its transform, and drops what is followed.
_BELOW_TRACING = BELOW_AUTOGRAD
for _name in (
    "FuncTorchBatched",
    "FuncTorchDynamicLayerBackMode",
    "FuncTorchDynamicLayerFrontMode",
    "FuncTorchGradWrapper",
    "PreDispatch",
):
    _BELOW_TRACING = _BELOW_TRACING | keys.DispatchKeySet(keys.parse_key(_name))

_is_excluded = keys.is_excluded
_exclude_set = keys.excluded_keys
_AUTOGRAD = keys.DispatchKey.AutogradFunctionality
_INSIDE_HANDLER: Any = keys.parse_key("PythonTLSSnapshot")  # torch excludes it there
_AsOutside: Any = keys.OutsideHandler
_MODES = keys.DispatchKeySet(keys.DispatchKey.Python) | keys.DispatchKeySet(_INSIDE_HANDLER)
AUTOCAST = keys.DispatchKeySet(keys.DispatchKey.AutocastCPU)
for _name in dir(keys.DispatchKey):
    if _name.startswith("Autocast"):
        AUTOCAST = AUTOCAST | keys.DispatchKeySet(getattr(keys.DispatchKey, _name))


def autograd_is_on() -> bool:
    """Whether C++ autograd would look at the next op."""
    return not _is_excluded(_AUTOGRAD)


def autocast_keys() -> Any:
    """The autocast keys that are on for user code; None if there are none.

    Torch switches them off inside a handler, where an op has been cast already. The count of nested
    `autocast` blocks, which has no getter, tells in 0.2 us that there is none.
    """
    nested = torch.autocast_increment_nesting() > 1
    torch.autocast_decrement_nesting()
    if not nested:
        return None
    if not _is_excluded(_INSIDE_HANDLER):
        return AUTOCAST - _exclude_set()
    with _AsOutside():
        return AUTOCAST - _exclude_set()


def autocast_off() -> Any:
    """A guard under which autocast leaves ops alone: those of rules outside a handler."""
    return _NO_GUARD if autocast_keys() is None else keys.ExcludeKeys(AUTOCAST)


_NO_GUARD = nullcontext()


def regain(autocast: Any) -> Any:
    """A guard that switches autocast keys on again for code that runs inside a handler."""
    include = keys.included_keys()
    return keys.ForceKeys(include, _exclude_set() - autocast)


class OuterState:
    """The dispatch-key state in force when the outermost transform was entered, less autocast.

    `guard` brings it back around an op on plain tensors that the user's own autograd must see. By
    then the op has been cast where it was met.
    """

    __slots__ = (
        "_inside",
        "_uncast",
        "depth",
        "exclude",
        "grad_enabled",
        "include",
        "off",
        "sees_all",
    )

    def __init__(self) -> None:
        self.include = keys.included_keys()
        self.exclude = _exclude_set()
        # Worked out on first use, which most transforms never come to.
        self._uncast: Any = None
        self._inside: Any = None
        self.grad_enabled = True  # cleared while a level is pushed under no_grad
        # Whether the caller has to see every op on plain tensors: its own are hidden among them.
        self.sees_all = functorch_is_active() or self.include.has(keys.DispatchKey.PreDispatch)
        self.depth = functorch_depth() if self.sees_all else 0
        # The keys that are off for user code inside.
        self.off = _BELOW_TRACING if self.sees_all else BELOW_AUTOGRAD

    def guard(self, autocast: Any = None, *, modes: bool = False) -> _Guard:
        """Run a block under this state (1 us, so only where a plain tensor requires grad).

        Args:
            autocast: The autocast keys that shall be on, for user code.
            modes: Whether the block is user code, which the modes on torch's stack have to see, and
                others that it enters: torch switches their keys on for the first mode alone.
        """
        include = self.include
        if modes and mode_count():
            include = include | _MODES
        if self._uncast is None:
            self._uncast = self.exclude | AUTOCAST
            self._inside = self._uncast | keys.DispatchKeySet(_INSIDE_HANDLER)
        if autocast is not None:
            return _Guard(self, include, self._uncast - autocast)
        exclude = self._inside if _is_excluded(_INSIDE_HANDLER) else self._uncast
        return _Guard(self, include, exclude)


class _Guard:
    """Brings an outer state back for a block."""

    __slots__ = ("exclude", "grad_enabled", "include", "keys", "outer")

    def __init__(self, outer: OuterState, include: Any, exclude: Any) -> None:
        self.outer = outer
        self.include = include
        self.exclude = exclude

    def __enter__(self) -> None:
        self.keys = keys.ForceKeys(self.include, self.exclude)
        self.keys.__enter__()
        self.grad_enabled = torch.is_grad_enabled()
        if not self.outer.grad_enabled:
            set_grad_enabled(False)

    def __exit__(self, *exc: object) -> None:
        set_grad_enabled(self.grad_enabled)
        self.keys.__exit__(None, None, None)


def among_others(level: Any) -> Exception:
    """The error for levels of torch.func and ours that take turns."""
    error: Exception = level.error(
        StructureError,
        "transforms of torch.func and of Lamina are nested in turns",
        "torch.func inside Lamina works, and Lamina inside torch.func, but not both at once",
        "to fix: import all of them from lamina, whose interface is that of torch.func",
    )
    return error
