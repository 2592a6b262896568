"""The dispatch mode of a thread, and the stack of levels that it leads to.

The stack is a linked list: each level knows the one `below` it, and the thread's `LevelMode` knows
the `top`. So "the stack as seen from level k" is just another top, which is what `run_at` sets when
code has to run at a level inside a rule.
"""

from __future__ import annotations

import threading
from typing import Any

from lamina_core.outer import OuterState
from lamina_core.torch_hooks.keys import CONJUGATE, NEGATIVE, set_excluded
from lamina_core.torch_hooks.modes import DispatchMode, mode_at, mode_count, pop_mode, push_mode

__all__ = ["LevelMode", "current_stack", "mode_off", "mode_on", "thread_mode"]


class LevelMode(DispatchMode):
    """The one dispatch mode of a thread: sends every op of user code to the top of the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.top: Any = None
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
        set_excluded(CONJUGATE, False)
        set_excluded(NEGATIVE, False)
        return self.top.process(func, args, kwargs or {})

    def is_on(self) -> bool:
        """Whether torch would send the next op to this mode: not so inside its own handler."""
        depth = mode_count()
        return depth > 0 and any(mode_at(i) is self for i in range(depth - 1, -1, -1))


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mode = LevelMode()


_thread = _Thread()  # also read by `shortcuts`, where a function call would cost too much


def thread_mode() -> LevelMode:
    """The mode of the calling thread; its `top` is the interpreter of the innermost transform."""
    return _thread.mode


def current_stack() -> list[Any]:
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


class mode_on:
    """Switches the thread's mode on inside a handler, where torch has switched it off."""

    __slots__ = ("mode",)

    def __init__(self, mode: LevelMode) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        push_mode(self.mode)

    def __exit__(self, *exc: object) -> None:
        pop_mode(None)


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
            while (popped := pop_mode(None)) is not mode:
                self.others.append(popped)
            for other in reversed(self.others):
                push_mode(other)

    def __exit__(self, *exc: object) -> None:
        if self.was_on:
            for _ in self.others:
                pop_mode(None)
            push_mode(_thread.mode)
            for other in reversed(self.others):
                push_mode(other)
