"""The debug kit: see the stack, the ops at every level, and which rule serves an op.

| call | shows |
|---|---|
| `print_stack()` | the active transforms, outermost first |
| `with trace_log(): vmap(grad(f))(x)` | one line per op and level |
| `explain("aten.mul")` | what each transform does with the overloads of an op |

Importing this module also makes `config.debug` check (see `lamina_core.checking`) and print.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, TextIO

import torch

from lamina_core import checking as _checking  # noqa: F401 - what `config.debug` 1 checks
from lamina_core.config import config, tensor_summary
from lamina_core.errors import RuleError, message
from lamina_core.interpreter import Interpreter
from lamina_core.mode import current_stack
from lamina_core.torch_hooks.registry import OpOverload

__all__ = ["calling_line", "explain", "print_stack", "stack_text", "trace_log"]


def stack_text() -> str:
    """The active transforms of this thread, outermost first, one per line.

    Example:
        >>> stack_text()
        'level 0: plain PyTorch'
    """
    lines = ["level 0: plain PyTorch"]
    lines += [f"level {interpreter.level}: {interpreter}" for interpreter in current_stack()]
    return "\n".join(lines)


def print_stack(file: TextIO | None = None) -> None:
    """Print `stack_text()`, to the standard output unless a file is given."""
    (file or sys.stdout).write(stack_text() + "\n")


_LIBRARIES = tuple(os.path.join(os.path.dirname(path), "") for path in (torch.__file__, __file__))


def calling_line(home: str) -> str:
    """The innermost line of the present call that is a user's, as `file:line`.

    Args:
        home: The folder of a package whose lines are not, as those of torch and the core are not.
    """
    libraries = (*_LIBRARIES, os.path.join(home, ""))
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(libraries):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"


class _Names:
    """Numbers values in the order in which they are met: `$1`, `$2`, ..."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}
        self.kept: list[Any] = []  # keeps the values alive, so that an id stays its own

    def __call__(self, tensor: Any) -> str:
        name = self.known.get(id(tensor))
        if name is None:
            name = self.known[id(tensor)] = f"${len(self.known) + 1}"
            self.kept.append(tensor)
        return name

    def show(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return self(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.show(item) for item in value)}]"
        return str(value)

    def define(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{self(value)}: {tensor_summary(value)}"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self.define(item) for item in value)})"
        return repr(value)


@contextmanager
def trace_log(file: TextIO | None = None) -> Iterator[list[str]]:
    """Log every op at every level while the block runs: `L2 vmap  $4: f32[3, 5] = aten.mul(...)`.

    Lines appear when an op is done, so those of the levels it was lowered to come first. The log
    concerns all threads and keeps all values it names alive; it is for small examples.

    Args:
        file: Where to print; the standard output by default.

    Yields:
        The list of lines so far.
    """
    lines: list[str] = []
    names = _Names()
    sink = file or sys.stdout
    classes = [cls for cls in _all_interpreters() if "process" in cls.__dict__]
    originals = {cls: cls.__dict__["process"] for cls in classes}

    def logged(original: Any) -> Any:
        def process(self: Any, op: Any, args: Any, kwargs: Any) -> Any:
            given = [names.show(arg) for arg in args]
            given += [f"{key}={names.show(value)}" for key, value in kwargs.items()]
            out = original(self, op, args, kwargs)
            line = f"L{self.level} {self.transform}  {names.define(out)} = {op}({', '.join(given)})"
            lines.append(line)
            sink.write(line + "\n")
            return out

        return process

    for cls in classes:
        cls.process = logged(originals[cls])  # type: ignore[method-assign]
    try:
        yield lines
    finally:
        for cls in classes:
            cls.process = originals[cls]  # type: ignore[method-assign]


@contextmanager
def _observed(interpreter: Interpreter) -> Iterator[None]:
    """What `config.debug` 2 and 3 print on the standard error while a level is active."""
    sys.stderr.write(f"push level {interpreter.level}: {interpreter}\n")
    outermost = config.debug > 2 and interpreter.below is None
    try:
        with trace_log(sys.stderr) if outermost else nullcontext():
            yield
    finally:
        sys.stderr.write(f"pop level {interpreter.level}: {interpreter}\n")


Interpreter.observed = _observed


def _all_interpreters() -> list[type[Interpreter]]:
    found: list[type[Interpreter]] = []
    pending = Interpreter.__subclasses__()
    while pending:
        cls = pending.pop(0)
        found.append(cls)
        pending += cls.__subclasses__()
    return found


def explain(op: Any) -> str:
    """What each transform does with an op: its state, and the rule that serves it.

    Args:
        op: An overload, an op with all its overloads, or its name such as "aten.mul.Tensor".

    Returns:
        One line per overload and transform.

    Raises:
        RuleError: If there is no such op.
    """
    lines = []
    for overload in _overloads(op):
        lines.append(str(overload))
        for cls in _all_interpreters():
            if cls.transform:
                lines += [f"  {cls.transform:<6} {cls.explain_op(overload)}"]
    return "\n".join(lines)


def _overloads(op: Any) -> list[Any]:
    if isinstance(op, str):
        found: Any = torch.ops
        for part in op.split("."):
            try:
                found = getattr(found, part)
            except AttributeError as error:
                raise RuleError(
                    message(
                        f"there is no op named {op!r}",
                        "to fix: name it as torch.ops does, such as 'aten.mul.Tensor'",
                    )
                ) from error
        op = found
    if isinstance(op, OpOverload):
        return [op]
    return [getattr(op, name) for name in op.overloads()]
