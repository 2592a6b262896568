"""The table of batching rules, and what a rule may ask about the transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lamina.batching.batched import wrap
from lamina_core.dispatch import lower
from lamina_core.interpreter import Interpreter
from lamina_core.rules import RuleTable
from lamina_core.scopes import run_at

__all__ = ["RULES", "Info", "batching_rule", "decomposition"]

RULES = RuleTable("batching")


class Info:
    """What a batching rule may ask about the transform; first argument of every rule.

    Attributes:
        batch_size: How many examples there are.
        randomness: "error", "same" or "different".
        kwarg_dims: Batch dims of tensors among the keyword-only arguments, by name.
    """

    __slots__ = ("batch_size", "interpreter", "kwarg_dims", "randomness")

    def __init__(self, interpreter: Interpreter, batch_size: int, randomness: str) -> None:
        self.interpreter = interpreter
        self.batch_size = batch_size
        self.randomness = randomness
        self.kwarg_dims: dict[str, int | None] = {}

    def lower(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a random op or a factory at the level below, which has to see it."""
        return lower(self.interpreter, op, args, kwargs)

    def at_level(self, function: Callable[..., Any], args: Any, in_dims: Any) -> Any:
        """The answer of a rule that leaves this case to ops: `function` on wrapped arguments.

        `args` and `in_dims` are those of the rule; the outputs are a tuple of tensors.
        """

        def box(x: Any, bdim: Any) -> Any:
            if isinstance(bdim, list):
                return [box(item, at) for item, at in zip(x, bdim, strict=True)]
            return x if bdim is None else wrap(self.interpreter, x, bdim)

        with run_at(self.interpreter, autocast=True):
            outs = function(*(box(x, bdim) for x, bdim in zip(args, in_dims, strict=True)))
        pairs = [
            (out.value, out.bdim) if self.interpreter.is_own(out) else (out, None) for out in outs
        ]
        return tuple(out for out, _ in pairs), tuple(bdim for _, bdim in pairs)


def batching_rule(*ops: Any, state: str = "rule") -> Callable[[Any], Any]:
    """Register the decorated function as the batching rule of the given overloads.

    A rule has the signature of the op behind `(info, in_dims)` and returns `(out, out_dims)`, the
    signature of `torch.library.register_vmap`: `in_dims` has one entry per positional argument, a
    physical dim or None (a list for a list of tensors). It is called when at least one argument is
    batched, with values of the level below, and calls ordinary torch functions on them.
    """

    def register(rule: Any) -> Any:
        for op in ops:
            RULES.register(op, rule, state=state)
        return rule

    return register


def decomposition(*ops: Any) -> Callable[[Any], Any]:
    """Register the decorated function as what the given overloads are made of.

    It has the op's own signature and runs as code of the level, on the wrappers themselves: for ops
    that write to their arguments unsaid, draw random numbers, or have no batched form of their own.
    """

    def register(function: Any) -> Any:
        for op in ops:
            RULES.register(op, function, state="decomposed")
        return function

    return register
