"""A level whose meaning of an op is a handler, resolved once per op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from lamina_core import answers as _answers  # noqa: F401 - what wrappers say of themselves
from lamina_core import conversions as _conversions  # noqa: F401 - and what leaves them for Python
from lamina_core.dispatch import pass_down, watched
from lamina_core.errors import RuleError
from lamina_core.exchanges import exchanges_memory, refuse_exchange
from lamina_core.interpreter import Interpreter
from lamina_core.refusals import told
from lamina_core.scopes import run_at
from lamina_core.views import refresh_all
from lamina_core.wrapper import plain_of

__all__ = ["Handler", "HandlerInterpreter"]

# What ops raise. Others come from user code that ran on the way, such as hooks.
_OF_OPS = (RuntimeError, TypeError, ValueError, IndexError)

# `(interpreter, op, args, kwargs)` -> what the op gives at the level of the interpreter.
Handler = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]


class HandlerInterpreter(Interpreter):
    """What the transforms that have a table of rules share.

    A transform subclasses it with `resolve`.

    Attributes:
        handlers: The handlers found so far, by the id of their op.
    """

    handlers: ClassVar[dict[int, Handler]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a transform handlers of its own, unless it says where it keeps them."""
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "handlers"):
            cls.handlers = {}

    @staticmethod
    def resolve(op: Any) -> Handler:
        """Find the handler of an op: called for each op once."""
        raise RuleError("a HandlerInterpreter has to define resolve(op), which finds a handler")

    # HOT: every op of user code inside a transform comes through here (about 0.3 us under vmap).
    def process(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op by its handler.

        Raises:
            Exception: What the op raises alone, with a note; or what the handler raises.
        """
        handler = self.handlers.get(id(op))
        if handler is None:
            handler = self.handlers[id(op)] = _found(op) or self.resolve(op)
        try:
            if self.mutated:
                refresh_all(self, args, kwargs)
            if self.watch:
                return watched(self, handler, op, args, kwargs)
            return handler(self, op, args, kwargs)
        except _OF_OPS as error:
            own = told(self, op, args, kwargs, error)
            if own is error:
                raise
            raise own from None


def _found(op: Any) -> Handler | None:
    """The handler of an op that means the same at all levels."""
    if op in _BITS:
        return _resolve_bit
    return _exchange if exchanges_memory(op) else None


def _exchange(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
    refuse_exchange(op, args, kwargs, interpreter.where())
    return pass_down(interpreter, op, args, kwargs)


_BITS: dict[Any, Any] = {
    torch.ops.aten.resolve_conj.default: torch.Tensor.is_conj,
    torch.ops.aten.resolve_neg.default: torch.Tensor.is_neg,
}


def _resolve_bit(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
    """A copy if the value is lazily conjugated or negated, which no wrapper shows that it is."""
    x = args[0]
    if not interpreter.is_own(x):
        return pass_down(interpreter, op, args, kwargs)
    if not _BITS[op](plain_of(x)):
        return x
    with run_at(interpreter):
        return x.clone()
