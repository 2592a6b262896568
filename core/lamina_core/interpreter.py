"""`Interpreter`: the object that owns one level.

A level is entered and left with `with`:

    with VmapInterpreter(batch_size=3) as interpreter:      # pushed; its level is one above
        ...                                                 # ops arrive at interpreter.process
    # popped; its wrappers are dead
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch

from lamina_core.config import config
from lamina_core.level import Level
from lamina_core.mode import LevelMode, mode_on, thread_mode
from lamina_core.outer import BELOW_AUTOGRAD, OuterState
from lamina_core.torch_hooks.keys import ExcludeKeys
from lamina_core.torch_hooks.modes import mode_count
from lamina_core.wrapper import LevelTensor

__all__ = ["Interpreter"]


class Interpreter(Level):
    """Owns one level: wraps values that enter it and says what an op on its wrappers means.

    A transform subclasses it with its own wrapper class, `process`, `constant`, `is_constant`,
    `rebind` and `__str__`. The attributes of `Level` are its state.
    """

    wrapper: ClassVar[type[LevelTensor]]
    # The name of the transform in logs and tables.
    transform: ClassVar[str] = ""
    # Whether `detach` makes a constant at a level of this kind.
    differentiates: ClassVar[bool] = False
    # Set by modules that import us. What `config.debug` 2 and 3 print: see `lamina_core.debug`.
    observed: ClassVar[Any] = nullcontext
    # What `config.debug` checks: see `lamina_core.checking`.
    checked: ClassVar[Any] = nullcontext

    def __init__(self) -> None:
        self.written: list[LevelTensor] = []  # arguments that have been rebound by a write
        self._undo: list[Any] = []

    # -- the stack ---------------------------------------------------------------------------------

    def __enter__(self) -> Any:
        """Push: become the top of the calling thread's stack."""
        mode = thread_mode()
        below = self.below = mode.top
        try:
            if below is None:
                self.level = 1
                mode.outer = OuterState()
                self._enter(ExcludeKeys(BELOW_AUTOGRAD))
                self._enter(mode_on(mode))
                mode.depth = mode_count()
                if torch.is_autocast_cache_enabled():
                    # It would keep wrappers of casted weights for whoever casts them later.
                    torch.set_autocast_cache_enabled(False)
                    self._undo.append(_CACHE_AGAIN)
            else:
                self.level = below.level + 1
                if not mode.is_on():
                    # User code called from inside a rule: torch has switched the mode off there.
                    self._enter(mode_on(mode))
                self.keeps_below = below.keeps_values or below.keeps_below
            if not torch.is_grad_enabled():
                self._disable_below(mode)
            mode.top = self
            if config.debug:
                self._enter(Interpreter.checked(self))
                if config.debug > 1:
                    self._enter(Interpreter.observed(self))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _enter(self, guard: Any) -> None:
        guard.__enter__()
        self._undo.append(guard)

    def __exit__(self, *exc: object) -> None:
        """Pop, whatever happened; the wrappers of this level are dead from now on."""
        self.alive = False
        mode = thread_mode()
        mode.top = self.below
        while self._undo:
            self._undo.pop().__exit__(None, None, None)
        if self.below is None:
            mode.outer = None

    def _disable_below(self, mode: LevelMode) -> None:
        """`torch.no_grad()` around a transform concerns every tape below the new level."""
        lower = self.below
        while lower is not None:
            if lower.grad_enabled and lower.keeps_values:
                lower.grad_enabled = False
                self._undo.append(_EnableAgain(lower))
            lower = lower.below
        if mode.outer is not None and mode.outer.grad_enabled:
            mode.outer.grad_enabled = False
            self._undo.append(_EnableAgain(mode.outer))

    # -- what a transform defines ------------------------------------------------------------------

    @classmethod
    def explain_op(cls, op: Any) -> str:
        """One line on how this transform handles an overload, for `lamina_core.debug.explain`."""
        raise NotImplementedError

    def constant(self, value: Any) -> LevelTensor:
        """Wrap a value that does not depend on what this level transforms."""
        raise NotImplementedError

    def store(self, target: LevelTensor, new: LevelTensor) -> bool:
        """Write `new` into the memory of `target` where that is sound; say whether it was."""
        return False


class _EnableAgain:
    """Undoes one `grad_enabled = False`; shaped like a context manager for the undo list."""

    __slots__ = ("owner",)

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __exit__(self, *exc: object) -> None:
        self.owner.grad_enabled = True


class _CacheAgain:
    """Undoes `set_autocast_cache_enabled(False)`, as an entry of the undo list."""

    def __exit__(self, *exc: object) -> None:
        torch.set_autocast_cache_enabled(True)


_CACHE_AGAIN = _CacheAgain()
