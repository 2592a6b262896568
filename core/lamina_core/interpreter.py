"""`Interpreter`: the object that owns one level, and the stack that the interpreters form.

The stack is a linked list: each interpreter knows the one `below` it, and the thread's `LevelMode`
knows the `top`. So "the stack as seen from level k" is just another top, which is what
`run_at` sets when code has to run at a level inside a rule.

A level is entered and left with `with`:

    with VmapInterpreter(batch_size=3) as interpreter:      # pushed; its level is one above
        ...                                                 # ops arrive at interpreter.process
    # popped; its wrappers are dead
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lamina_core.config import config
from lamina_core.errors import message
from lamina_core.outer import BELOW_AUTOGRAD, OuterState, autocast_keys, autograd_is_on
from lamina_core.wrapper import LevelTensor

__all__ = [
    "Interpreter",
    "LevelMode",
    "asleep",
    "current_stack",
    "derivatives_on",
    "mode_off",
    "run_at",
    "thread_mode",
]

_C = torch._C

# torch calls a handler with these two keys off, and an op then ignores that a plain tensor is a
# lazy conjugate: `x.conj() * 1j` would be `x * 1j`. Each door switches them on (0.3 us).
_see_lazy = _C._dispatch_tls_set_dispatch_key_excluded
_CONJUGATE = _C.DispatchKey.Conjugate
_NEGATIVE = _C.DispatchKey.Negative


_stack_length = _C._len_torch_dispatch_stack


class LevelMode(TorchDispatchMode):
    """The one dispatch mode of a thread: sends every op of user code to the top of the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.top: Interpreter | None = None
        self.outer: OuterState | None = None
        self.depth = 0  # of torch's stack of modes, this one included

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch otherwise wraps __torch_dispatch__, and an op costs 4 us where it costs 1.8.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """First route: an op of user code, top of the stack first."""
        _see_lazy(_CONJUGATE, False)
        _see_lazy(_NEGATIVE, False)
        return self.top.process(func, args, kwargs or {})  # type: ignore[union-attr]

    def is_on(self) -> bool:
        """Whether torch would send the next op to this mode: not so inside its own handler."""
        depth = _C._len_torch_dispatch_stack()
        return depth > 0 and any(
            _C._get_dispatch_stack_at(i) is self for i in range(depth - 1, -1, -1)
        )


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mode = LevelMode()


_thread = _Thread()  # also read by `shortcuts`, where a function call would cost too much


def thread_mode() -> LevelMode:
    """The mode of the calling thread; its `top` is the interpreter of the innermost transform."""
    return _thread.mode


def current_stack() -> list[Interpreter]:
    """The active interpreters of the calling thread, outermost first.

    Example:
        >>> current_stack()
        []
    """
    found = []
    top = _thread.mode.top
    while top is not None:
        found.append(top)
        top = top.below
    return found[::-1]


class Interpreter:
    """Owns one level: wraps values that enter it and says what an op on its wrappers means.

    A transform subclasses it with its own wrapper class, `process`, `constant` and `__str__`.

    Attributes:
        level: Depth on the stack, 1 for the outermost; 0 before it is pushed.
        below: The interpreter of the next lower level, or None.
        alive: False once it has been popped; its wrappers are then dead.
        grad_enabled: False while a level above was pushed under `torch.no_grad()`.
        mutated: Whether a wrapper of this level has been rebound by a write, so that views have to
            be checked for staleness when they are met.
    """

    wrapper: ClassVar[type[LevelTensor]]
    # The name of the transform in logs and tables.
    transform: ClassVar[str] = ""
    # Whether `detach` makes a constant at a level of this kind.
    differentiates: ClassVar[bool] = False
    # Whether a level of this kind keeps old values (residuals), which nobody may overwrite then.
    keeps_values: ClassVar[bool] = False
    # What `config.debug` 2 and 3 print of a level; set by `lamina_core.debug`, which imports us.
    observed: ClassVar[Any] = nullcontext

    # Class-level defaults: a call pushes a level, and most levels never change these.
    level: int = 0
    below: Interpreter | None = None
    alive: bool = True
    grad_enabled: bool = True
    mutated: bool = False
    watch: bool = False  # a plain tensor that requires grad has been met at this level
    keeps_below: bool = False  # a level below keeps old values
    asleep: str | None = None  # the function whose rule runs below, see `asleep`
    # Told `(name, outputs)` of each function with rules of its own that is applied at this level.
    observer: Any = None

    def __init__(self) -> None:
        self.written: list[LevelTensor] = []  # arguments that have been rebound by a write
        self._undo: list[Any] = []

    # -- the stack ---------------------------------------------------------------------------------

    def __enter__(self) -> Any:
        """Push: become the top of the calling thread's stack."""
        mode = _thread.mode
        below = self.below = mode.top
        try:
            if below is None:
                self.level = 1
                mode.outer = OuterState()
                self._enter(_C._ExcludeDispatchKeyGuard(BELOW_AUTOGRAD))
                # Not through `with mode`: it counts in globals that threads would race for.
                self._enter(_ModeOn(mode))
                mode.depth = _C._len_torch_dispatch_stack()
                if torch.is_autocast_cache_enabled():
                    # It would keep wrappers of casted weights for whoever casts them later.
                    torch.set_autocast_cache_enabled(False)
                    self._undo.append(_CACHE_AGAIN)
            else:
                self.level = below.level + 1
                if not mode.is_on():
                    # User code called from inside a rule: torch has switched the mode off there.
                    self._enter(_ModeOn(mode))
                self.keeps_below = below.keeps_values or below.keeps_below
            if not torch.is_grad_enabled():
                self._disable_below(mode)
            mode.top = self
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
        mode = _thread.mode
        mode.top = self.below
        while self._undo:
            self._undo.pop().__exit__(None, None, None)
        if self.below is None:
            mode.outer = None

    def _disable_below(self, mode: LevelMode) -> None:
        """`torch.no_grad()` around a transform concerns every level below the new one."""
        lower = self.below
        while lower is not None:
            if lower.grad_enabled:
                lower.grad_enabled = False
                self._undo.append(_EnableAgain(lower))
            lower = lower.below
        if mode.outer is not None and mode.outer.grad_enabled:
            mode.outer.grad_enabled = False
            self._undo.append(_EnableAgain(mode.outer))

    def path(self) -> list[Interpreter]:
        """This interpreter and those below it, outermost first."""
        return ([] if self.below is None else self.below.path()) + [self]

    # -- what a transform defines ------------------------------------------------------------------

    def process(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Say what `op` means at this level; called for every op that reaches it."""
        raise NotImplementedError

    @classmethod
    def explain_op(cls, op: Any) -> str:
        """One line on how this transform handles an overload, for `lamina_core.debug.explain`."""
        raise NotImplementedError

    def constant(self, value: Any) -> LevelTensor:
        """Wrap a value that does not depend on what this level transforms."""
        raise NotImplementedError

    def is_constant(self, wrapper: LevelTensor) -> bool:
        """Whether a wrapper of this level carries nothing but its value."""
        raise NotImplementedError

    def rebind(self, target: LevelTensor, new: LevelTensor) -> None:
        """Make `target` stand for what `new` stands for (the end of an in-place write)."""
        raise NotImplementedError

    def store(self, target: LevelTensor, new: LevelTensor) -> bool:
        """Write `new` into the memory of `target` where that is sound; say whether it was."""
        return False

    def is_own(self, value: Any) -> bool:
        """Whether `value` is a wrapper of this very interpreter."""
        return type(value) is self.wrapper and value.interpreter is self

    def where(self) -> str:
        """The line of an error message that says at which level and transform it happened."""
        return f"while interpreting at level {self.level}: {self}"

    def error(self, kind: type[Exception], what: str, *lines: str) -> Exception:
        """Build an error whose second line says where it happened."""
        return kind(message(what, self.where(), *lines))


class asleep:
    """Let a level and those above it be as if they had been popped, for a block of a user's rule.

    The rule runs below them while the function it belongs to has not returned. Constants of these
    levels that it may have captured then stand for their values.
    """

    __slots__ = ("levels", "name", "upto")

    def __init__(self, interpreter: Interpreter, name: str) -> None:
        self.upto = interpreter.level
        self.name = name

    def __enter__(self) -> None:
        self.levels: list[Interpreter] = []
        lower = _thread.mode.top
        while lower is not None and lower.level >= self.upto:
            if lower.alive:
                self.levels.append(lower)
            lower = lower.below
        for interpreter in self.levels:
            interpreter.alive, interpreter.asleep = False, self.name

    def __exit__(self, *exc: object) -> None:
        for interpreter in self.levels:
            interpreter.alive, interpreter.asleep = True, None


class _EnableAgain:
    """Undoes one `grad_enabled = False`; shaped like a context manager for the undo list."""

    __slots__ = ("owner",)

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __exit__(self, *exc: object) -> None:
        self.owner.grad_enabled = True


class derivatives_on:
    """Run a block as if no `torch.no_grad()` were in force, at a level and those below it."""

    __slots__ = ("enabled", "interpreter", "off")

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter

    def __enter__(self) -> None:
        owners: list[Any] = [*self.interpreter.path(), _thread.mode.outer]
        self.off = [owner for owner in owners if owner is not None and not owner.grad_enabled]
        for owner in self.off:
            owner.grad_enabled = True
        self.enabled = torch.is_grad_enabled()
        _C._set_grad_enabled(True)

    def __exit__(self, *exc: object) -> None:
        _C._set_grad_enabled(self.enabled)
        for owner in self.off:
            owner.grad_enabled = False


class _CacheAgain:
    """Undoes `set_autocast_cache_enabled(False)`, as an entry of the undo list."""

    def __exit__(self, *exc: object) -> None:
        torch.set_autocast_cache_enabled(True)


_CACHE_AGAIN = _CacheAgain()


class _ModeOn:
    """Switches the thread's mode on inside a handler, where torch has switched it off."""

    __slots__ = ("mode",)

    def __init__(self, mode: LevelMode) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        _C._push_on_torch_dispatch_stack(self.mode)

    def __exit__(self, *exc: object) -> None:
        _C._pop_torch_dispatch_stack(None)


class mode_off:
    """Take the thread's mode off torch's stack for a block of rule code; other modes stay.

    The backward pass runs so: its ops go straight to the wrappers they meet (the second route),
    which saves a microsecond an op.
    """

    __slots__ = ("others", "was_on")

    def __enter__(self) -> None:
        mode = _thread.mode
        self.was_on = mode.top is not None and mode.is_on()
        if self.was_on:
            self.others = []
            while (popped := _C._pop_torch_dispatch_stack(None)) is not mode:
                self.others.append(popped)
            for other in reversed(self.others):
                _C._push_on_torch_dispatch_stack(other)

    def __exit__(self, *exc: object) -> None:
        if self.was_on:
            for _ in self.others:
                _C._pop_torch_dispatch_stack(None)
            _C._push_on_torch_dispatch_stack(_thread.mode)
            for other in reversed(self.others):
                _C._push_on_torch_dispatch_stack(other)


class run_at:
    """Run a block as user code of the given level: its ops take the first route from there.

    With None the block runs at level 0, under the dispatch-key state of the outermost caller.
    A rule needs this around code that is not a rule: a decomposition, a user's function or hook.
    With `autocast` set, `torch.autocast` acts on the block as it acts on the user's code: so on
    what a composite op is made of, but not on what stands for a kernel.
    """

    __slots__ = ("autocast", "depth", "guard", "interpreter", "outer", "saved", "switch")

    guard: Any

    def __init__(self, interpreter: Interpreter | None, *, autocast: bool = False) -> None:
        self.interpreter = interpreter
        self.autocast = autocast

    def __enter__(self) -> None:
        mode = _thread.mode
        self.saved = mode.top
        self.outer = mode.outer
        self.guard = None
        if self.interpreter is not None:
            self.switch: Any = None if mode.is_on() else _ModeOn(mode)
            if self.switch is not None:
                self.switch.__enter__()
            mode.top = self.interpreter
            autocast = autocast_keys() if self.autocast else None
            if autocast is not None or autograd_is_on():
                # Autograd is on where the caller's keys are in force, for the sake of a plain
                # tensor; but here are wrappers, which C++ autograd must not see.
                exclude = _C._dispatch_tls_local_exclude_set() | BELOW_AUTOGRAD
                if autocast is not None:
                    exclude = exclude - autocast
                include = _C._dispatch_tls_local_include_set()
                self.guard = _C._ForceDispatchKeyGuard(include, exclude)
                self.guard.__enter__()
            return
        self.depth = mode.depth
        autocast = autocast_keys() if self.autocast else None
        off = mode_off()
        off.__enter__()
        self.switch = off
        mode.top = mode.outer = None
        if self.outer is not None:
            self.guard = self.outer.guard(autocast, modes=True)
            self.guard.__enter__()

    def __exit__(self, *exc: object) -> None:
        mode = _thread.mode
        if self.guard is not None:
            self.guard.__exit__(None, None, None)
        if self.interpreter is None:
            # Back before the switch, which asks the mode whether it is in use.
            mode.top, mode.outer, mode.depth = self.saved, self.outer, self.depth
        if self.switch is not None:
            self.switch.__exit__()
        mode.top = self.saved
