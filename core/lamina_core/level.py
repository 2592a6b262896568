"""`Level`: what a wrapper must know of the interpreter that made it.

It is the ground floor of the core: an `Interpreter` is a level that can be entered and left, and
wrappers, modes and scopes need no more of it than what is written here.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lamina_core.errors import RuleError, message

__all__ = ["Level", "stand_in"]


class Level:
    """One level of the interpreter stack, as those see it who only meet it.

    Attributes:
        level: Depth on the stack, 1 for the outermost; 0 before it is pushed.
        below: The next lower level, or None.
        alive: False once it has been popped; its wrappers are then dead.
        grad_enabled: False while a level above was pushed under `torch.no_grad()`, which concerns
            reverse mode, and while a rule makes constants at this level.
        mutated: Whether a wrapper of this level has been rebound by a write, so that views have to
            be checked for staleness when they are met.
        watch: Whether a plain tensor that requires grad has been met at this level.
        keeps_below: Whether a level below keeps old values.
        asleep: The function whose rule runs below, see `lamina_core.scopes.asleep`.
        stood_in: Whether another function stands in for `process`, see `stand_in`.
    """

    # The class of the wrappers.
    wrapper: ClassVar[Any]
    # Whether a level of this kind differentiates: `detach` makes a constant there, and a wrapper
    # stands for its value once the level is gone.
    differentiates: ClassVar[bool] = False
    # Whether its values are no arguments that a rule for a whole function could be given: what they
    # carry below it is then no business of such a rule.
    opaque: ClassVar[bool] = False
    # Whether a level of this kind keeps old values (residuals), which nobody may overwrite then.
    keeps_values: ClassVar[bool] = False

    # Class-level defaults: a call pushes a level, and most levels never change these.
    level: int = 0
    below: Any = None
    alive: bool = True
    grad_enabled: bool = True
    mutated: bool = False
    watch: bool = False
    keeps_below: bool = False
    asleep: str | None = None
    stood_in: bool = False
    # Told `(name, outputs)` of each function with rules of its own that is applied at this level.
    observer: Any = None

    def process(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Say what `op` means at this level; called for every op that reaches it."""
        raise RuleError(f"{type(self).__name__} has to define process(op, args, kwargs)")

    def is_constant(self, wrapper: Any) -> bool:
        """Whether a wrapper of this level carries nothing but its value."""
        return False

    def rebind(self, target: Any, new: Any) -> None:
        """Make `target` stand for what `new` stands for (the end of an in-place write)."""
        target.value = new.value
        for name in target.fields:
            setattr(target, name, getattr(new, name))

    def grad_fn(self, wrapper: Any) -> Any:
        """What `wrapper.grad_fn` gives, at a level that keeps a tape; None for an input."""
        raise NotImplementedError

    def register_hook(self, wrapper: Any, hook: Any) -> Any:
        """Register a hook of a wrapper on the tape of this level; a handle to remove it."""
        raise NotImplementedError

    def hook_below(self, wrapper: Any, hook: Any) -> Any:
        """A hook for the value of a wrapper that does what `hook` does to the wrapper."""
        return hook

    def tracking(self) -> bool:
        """Whether a level that differentiates follows what is done now."""
        return False

    def keep_derivative(self, old: Any, new: Any) -> Any:
        """The value of one wrapper with the derivative that another has at this level."""
        return new

    def is_own(self, value: Any) -> bool:
        """Whether `value` is a wrapper of this very level."""
        return type(value) is self.wrapper and value.interpreter is self

    def path(self) -> list[Any]:
        """This level and those below it, outermost first."""
        return ([] if self.below is None else self.below.path()) + [self]

    def where(self) -> str:
        """The line of an error message that says at which level and transform it happened."""
        return f"while interpreting at level {self.level}: {self}"

    def error(self, kind: type[Exception], what: str, *lines: str) -> Exception:
        """Build an error whose second line says where it happened."""
        return kind(message(what, self.where(), *lines))


class stand_in:
    """Lets a function stand in for `level.process` in a block; such blocks may be nested.

    With `checks` it only looks at what the level does, and nobody need know of it.
    """

    __slots__ = ("before", "checks", "level", "process", "stood_in")

    def __init__(self, level: Level, process: Any, *, checks: bool = False) -> None:
        self.level = level
        self.process = process
        self.checks = checks

    def __enter__(self) -> None:
        level = self.level
        self.before = level.__dict__.get("process")
        self.stood_in = level.stood_in
        level.__dict__["process"] = self.process
        if not self.checks:
            level.stood_in = True

    def __exit__(self, *exc: object) -> None:
        level = self.level
        level.stood_in = self.stood_in
        if self.before is None:
            del level.__dict__["process"]
        else:
            level.__dict__["process"] = self.before
