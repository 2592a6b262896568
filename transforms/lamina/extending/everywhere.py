"""What an op is made of, for every transform; and rules for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lamina.decompose.table import DECOMPOSED, made_of
from lamina_core.errors import RuleError, message
from lamina_core.rules import RuleTable
from lamina_core.signature import need_signature, overload_of

__all__ = ["Decorator", "decomposition", "is_given", "temporary_rules"]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def decomposition(*ops: Any, replace: bool = False) -> Decorator:
    """Register the decorated function as what some overloads are made of, for every transform.

    It has the parameters of the op and runs in its place, as code of the level, wherever a
    transform has no rule of its own for the op.

    Args:
        ops: The overloads, or ops made by `torch.library.custom_op`.
        replace: Whether it may take the place of another.

    Raises:
        RuleError: If there is one already, or the function cannot be called like the op.

    Example:
        >>> import torch
        >>> from lamina import grad, vmap
        >>> from lamina.extend import decomposition
        >>> @torch.library.custom_op("lamina_docs::distance", mutates_args=())
        ... def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ...     return (x - y).abs().sum()
        >>> @decomposition(distance)
        ... def parts(x, y):
        ...     return (x - y).abs().sum()
        >>> vmap(grad(distance))(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for op in map(overload_of, ops):
            need_signature("decomposition", op, function, ())
            DECOMPOSED.register(op, function, state="decomposed", replace=replace, given=True)
        RuleTable.forget_handlers()
        return function

    return register


@contextmanager
def temporary_rules() -> Iterator[None]:
    """Take back at the end of a block what has been registered in it; for tests and experiments.

    Example:
        >>> import torch
        >>> from lamina.extend import batching_rule, explain, temporary_rules
        >>> with temporary_rules():
        ...
        ...     @batching_rule(torch.ops.aten._int_mm.default)
        ...     def rule(info, in_dims, self, mat2):
        ...         return torch.bmm(self.int(), mat2.int()), 0
        ...
        ...     print("rule" in explain("aten._int_mm.default"))
        True
        >>> "rule" in explain("aten._int_mm.default")
        False
    """
    restore = [table.kept() for table in RuleTable.tables]
    try:
        yield
    finally:
        for undo in restore:
            undo()


def is_given(op: Any, rule: Any, answer: Any) -> bool:
    """Whether a rule did not leave the call to the ops that the op is made of, if there are any."""
    if answer is not NotImplemented:
        return True
    if made_of(op) is None:
        raise RuleError(
            message(
                f"a rule of {op} returned NotImplemented, and the op is not made of others",
                f"the rule: {rule.__module__}.{getattr(rule, '__qualname__', rule)}",
                "to fix: give an answer in every case, or register a @decomposition",
            )
        )
    return False
