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
from lamina_core.errors import RuleError, message
from lamina_core.level import Level
from lamina_core.mode import LevelMode, mode_on, thread_mode
from lamina_core.outer import OuterState, among_others
from lamina_core.tensors import needs_guard
from lamina_core.torch_hooks.autograd import functorch_is_active
from lamina_core.torch_hooks.doors import UNPROVED, require_proofs
from lamina_core.torch_hooks.keys import ExcludeKeys
from lamina_core.torch_hooks.modes import mode_count
from lamina_core.wrapper import LevelTensor, box

__all__ = ["Interpreter"]

_CLASSES = LevelTensor.classes
_STRIDED = torch.strided


class Interpreter(Level):
    """Owns one level: wraps values that enter it and says what an op on its wrappers means.

    A transform subclasses it with its own wrapper class, `process`, `constant` and `is_constant`.
    The attributes of `Level` are its state.
    """

    wrapper: ClassVar[type[LevelTensor]]
    # The name of the transform in logs and tables.
    transform: ClassVar[str] = ""
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
        if not self.alive:
            raise RuleError(
                message(
                    f"a level of {self} is entered a second time",
                    "to fix: make one for each run: its wrappers end with it",
                )
            )
        mode = thread_mode()
        below = self.below = mode.top
        try:
            if below is None:
                self.level = 1
                mode.outer = OuterState()
                self._enter(ExcludeKeys(mode.outer.off))
                self._enter(mode_on(mode))
                mode.depth = mode_count()
                if torch.is_autocast_cache_enabled():
                    # It would keep wrappers of casted weights for whoever casts them later.
                    torch.set_autocast_cache_enabled(False)
                    self._undo.append(_CACHE_AGAIN)
            else:
                if "nesting" in UNPROVED:
                    require_proofs("nesting")
                self.level = below.level + 1
                if not mode.is_on():
                    # User code called from inside a rule: torch has switched the mode off there.
                    self._enter(mode_on(mode))
                self.keeps_below = below.keeps_values or below.keeps_below
            outer: Any = mode.outer
            if outer is not None and outer.sees_all:
                self.watch = True
            elif functorch_is_active():
                raise among_others(self)
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

    def __str__(self) -> str:
        """The transform as the user wrote it."""
        return self.transform or type(self).__name__

    @classmethod
    def explain_op(cls, op: Any) -> str:
        """One line on how this transform handles an overload, for `lamina_core.debug.explain`."""
        return "as its `process` says"

    def constant(self, value: Any) -> LevelTensor:
        """Wrap a value that does not depend on what this level transforms."""
        raise self.error(
            RuleError,
            f"{type(self).__name__} does not say what a constant is",
            "to fix: define constant(self, value), which wraps a value from below",
        )

    def adopt(self, value: Any) -> Any:
        """A result that depends on nothing this level transforms, for user code.

        One that is not strided stays as it is: a wrapper would not show its layout.
        """
        return self.constant(value) if value.layout is _STRIDED else value

    def wrap(self, value: Any, **fields: Any) -> Any:
        """A wrapper of this level that shows the shape, dtype and device of a value from below.

        Args:
            value: A tensor of a lower level.
            fields: What the wrapper holds besides, one for each slot of its class.
        """
        cls = self.wrapper
        if not isinstance(value, torch.Tensor) or fields.keys() != set(cls.fields):
            raise self._bad_wrapper(value, fields)
        out = box(cls, value, value.shape, None if value.is_contiguous() else value.stride())
        out.interpreter = self
        out.value = value
        out.recipe = None
        self.look(value)
        for name, held in fields.items():
            setattr(out, name, held)
            if isinstance(held, torch.Tensor):
                self.look(held)
        return out

    def _bad_wrapper(self, value: Any, fields: dict[str, Any]) -> Exception:
        name = self.wrapper.__name__
        if not isinstance(value, torch.Tensor):
            return self.error(
                RuleError,
                f"{name} was to be made of something that is no tensor",
                f"got: {type(value).__name__} {value!r}",
                "to fix: give wrap() a tensor of a lower level, which says shape, dtype and device",
            )
        return self.error(
            RuleError,
            f"{name} was to be made with {', '.join(fields) or 'no fields'}",
            f"its fields, the slots of the class: {', '.join(self.wrapper.fields) or 'none'}",
            "to fix: give wrap() each of them by its name",
        )

    def look(self, value: Any) -> None:
        """Watch all ops from now on if a value from below needs it (see `needs_guard`)."""
        if type(value) not in _CLASSES and needs_guard(value):
            self.watch = True

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
