"""Running a block at another level, with derivatives on, or as if levels had been popped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lamina_core.level import Level
from lamina_core.mode import mode_off, mode_on, thread_mode
from lamina_core.outer import (
    BELOW_AUTOGRAD,
    OuterState,
    autocast_keys,
    autograd_is_on,
)
from lamina_core.torch_hooks.autograd import set_grad_enabled
from lamina_core.torch_hooks.keys import ExcludeKeys, ForceKeys, excluded_keys, included_keys
from lamina_core.torch_hooks.modes import mode_count

__all__ = ["asleep", "derivatives_on", "revived", "run_at"]


class asleep:
    """Let a level and those above it be as if they had been popped, for a block of a user's rule.

    The rule runs below them while the function it belongs to has not returned. Constants of these
    levels that it may have captured then stand for their values.
    """

    __slots__ = ("levels", "name", "upto")

    def __init__(self, interpreter: Level, name: str) -> None:
        self.upto = interpreter.level
        self.name = name

    def __enter__(self) -> None:
        self.levels: list[Level] = []
        lower = thread_mode().top
        while lower is not None and lower.level >= self.upto:
            if lower.alive:
                self.levels.append(lower)
            lower = lower.below
        for interpreter in self.levels:
            interpreter.alive, interpreter.asleep = False, self.name

    def __exit__(self, *exc: object) -> None:
        for interpreter in self.levels:
            interpreter.alive, interpreter.asleep = True, None


class derivatives_on:
    """Run a block as if no `torch.no_grad()` were in force, at a level and those below it."""

    __slots__ = ("enabled", "interpreter", "off")

    def __init__(self, interpreter: Level) -> None:
        self.interpreter = interpreter

    def __enter__(self) -> None:
        owners: list[Any] = [*self.interpreter.path(), thread_mode().outer]
        self.off = [owner for owner in owners if owner is not None and not owner.grad_enabled]
        for owner in self.off:
            owner.grad_enabled = True
        self.enabled = torch.is_grad_enabled()
        set_grad_enabled(True)

    def __exit__(self, *exc: object) -> None:
        set_grad_enabled(self.enabled)
        for owner in self.off:
            owner.grad_enabled = False


class run_at:
    """Run a block as user code of the given level: its ops take the first route from there.

    With None the block runs at level 0, under the dispatch-key state of the outermost caller.
    A rule needs this around code that is not a rule: a decomposition, a user's function or hook.
    With `autocast` set, `torch.autocast` acts on the block as it acts on the user's code: so on
    what a composite op is made of, but not on what stands for a kernel.
    """

    __slots__ = ("autocast", "depth", "guard", "interpreter", "outer", "saved", "switch")

    guard: Any

    def __init__(self, interpreter: Level | None, *, autocast: bool = False) -> None:
        self.interpreter = interpreter
        self.autocast = autocast

    def __enter__(self) -> None:
        mode = thread_mode()
        self.saved = mode.top
        self.outer = mode.outer
        self.guard = None
        if self.interpreter is not None:
            self.switch: Any = None if mode.is_on() else mode_on(mode)
            if self.switch is not None:
                self.switch.__enter__()
            mode.top = self.interpreter
            autocast = autocast_keys() if self.autocast else None
            if autocast is not None or autograd_is_on():
                # Autograd is on where the caller's keys are in force, for the sake of a plain
                # tensor; but here are wrappers, which C++ autograd must not see, nor others that
                # trace or transform for the caller.
                exclude = excluded_keys() | (
                    BELOW_AUTOGRAD if self.outer is None else self.outer.off
                )
                if autocast is not None:
                    exclude = exclude - autocast
                include = included_keys()
                self.guard = ForceKeys(include, exclude)
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
        mode = thread_mode()
        if self.guard is not None:
            self.guard.__exit__(None, None, None)
        if self.interpreter is None:
            # Back before the switch, which asks the mode whether it is in use.
            mode.top, mode.outer, mode.depth = self.saved, self.outer, self.depth
        if self.switch is not None:
            self.switch.__exit__()
        mode.top = self.saved


@contextmanager
def revived(top: Level | None, outer: OuterState | None) -> Iterator[None]:
    """Let a popped level, and those below it, take part again for a block of user code."""
    if top is None:
        yield
        return
    mode = thread_mode()
    dead = [interpreter for interpreter in top.path() if not interpreter.alive]
    saved = mode.outer, mode.depth
    mode.outer = outer
    for interpreter in dead:
        interpreter.alive = True
    try:
        with ExcludeKeys(BELOW_AUTOGRAD if outer is None else outer.off):
            mode.depth = mode_count() + (not mode.is_on())
            yield
    finally:
        mode.outer, mode.depth = saved
        for interpreter in dead:
            interpreter.alive = False
