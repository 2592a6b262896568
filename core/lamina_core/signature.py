"""Whether a rule fits the op it is for: asked when somebody else registers one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lamina_core.errors import RuleError, message
from lamina_core.overloads import is_absent
from lamina_core.schema import facts
from lamina_core.torch_hooks.registry import CustomOp, OpOverload

__all__ = ["need_out_of_place", "need_signature", "overload_of"]


def overload_of(op: Any) -> Any:
    """The overload that is meant: of an op made by `torch.library.custom_op`, its only one.

    Raises:
        RuleError: If it could be several, or is no op.
    """
    if isinstance(op, CustomOp):
        return op._opoverload
    if isinstance(op, OpOverload) or is_absent(op):
        return op
    names = op.overloads() if callable(getattr(op, "overloads", None)) else []
    raise RuleError(
        message(
            "a rule is registered for an overload of an op",
            f"got: {type(op).__name__} {getattr(op, '__name__', op)}",
            f"its overloads: {', '.join(names)}" if names else "",
            "to fix: name the overload, such as torch.ops.aten.sum.dim_IntList",
        )
    )


def need_out_of_place(kind: str, op: Any, instead: str = "") -> None:
    """Refuse a rule for an op that writes to its arguments.

    Args:
        kind: What sort of rule it is, for messages.
        op: The overload it is for.
        instead: What to use for an op that has no form out of place.

    Raises:
        RuleError: If the op writes.
    """
    if is_absent(op):
        return
    known = facts(op)
    if known.mutated:
        counterpart = known.functional()
        advice = f"use {instead}, or define" if instead else "define"
        raise RuleError(
            message(
                f"a {kind} for {op}, which writes to its arguments",
                f"to fix: register it for {counterpart}, by which the write is interpreted"
                if counterpart is not None
                else f"to fix: {advice} an op that returns what it computes",
            )
        )


def need_signature(kind: str, op: Any, rule: Callable[..., Any], leading: Sequence[str]) -> None:
    """Refuse a rule that does not take the arguments of its op.

    Args:
        kind: What sort of rule it is, for messages.
        op: The overload it is for.
        rule: The rule.
        leading: The names of what the rule is given before the arguments of the op.

    Raises:
        RuleError: If there is a call of the op that the rule could not take.
    """
    if is_absent(op):
        return
    if not callable(rule):
        raise RuleError(
            message(
                f"a {kind} for {op} has to be a function",
                f"got: {type(rule).__name__} {rule!r}",
            )
        )
    try:
        signature = inspect.signature(rule)
    except (TypeError, ValueError):  # a function of C++ does not say what it takes
        return
    known = facts(op)
    schema = op._schema.arguments
    optional = {argument.name for argument in schema if argument.has_default_value()}
    needed = [name for name in known.positional if name not in optional]
    keywords = [name for name in known.arg_names if name not in known.positional]
    calls = (
        (needed, [name for name in keywords if name not in optional]),
        (known.positional, keywords),
    )
    for positional, named in calls:
        try:
            signature.bind(*leading, *positional, **dict.fromkeys(named))
        except TypeError as error:
            first = ", ".join(leading)
            raise RuleError(
                message(
                    f"a {kind} for {op} cannot be called like the op",
                    f"called with all arguments: {error}"
                    if positional is known.positional
                    else f"called with those that have no default: {error}",
                    f"the op:   {op._schema}",
                    f"the rule: {getattr(rule, '__qualname__', rule)}{signature}",
                    "to fix: give it the parameters of the op, with their defaults"
                    + (f", behind ({first})" if first else ""),
                )
            ) from None
