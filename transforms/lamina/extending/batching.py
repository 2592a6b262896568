"""Batching rules that others give; what they answer is held against their contract."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lamina.batching.table import RULES
from lamina.batching.user_ops import need_answer, registered_rule
from lamina.extending.everywhere import Decorator, is_given
from lamina_core.errors import RuleError, message
from lamina_core.overloads import is_absent
from lamina_core.scopes import run_at
from lamina_core.signature import need_out_of_place, need_signature, overload_of

__all__ = ["batching_rule"]


def batching_rule(*ops: Any, replace: bool = False) -> Decorator:
    """Register the decorated function as the batched form of some overloads, for `vmap`.

    It has the parameters of the op behind `(info, in_dims)` and returns `(out, out_dims)`, the
    signature of `torch.library.register_vmap`. It is called if an argument is batched, and runs as
    code of the level below: ordinary torch calls, on values with the batch dim still in them.

    * `info.batch_size`, `info.randomness`; `info.kwarg_dims`, the batch dims of tensors among the
      keyword-only arguments.
    * `in_dims`: for each positional argument the batch dim or None; a list for a list of tensors.
    * `out_dims`: for each output the batch dim, or None for one that all examples share.

    It may return `NotImplemented`, to leave a call to the ops that the op is made of.

    Args:
        ops: The overloads, or ops made by `torch.library.custom_op`.
        replace: Whether the rule may take the place of another.

    Raises:
        RuleError: If there is a rule already, or the function cannot be called like the op.

    Example:
        >>> import torch
        >>> from lamina import vmap
        >>> from lamina.extend import batching_rule, dims
        >>> @torch.library.custom_op("lamina_docs::smoothed", mutates_args=())
        ... def smoothed(x: torch.Tensor) -> torch.Tensor:
        ...     return (x[:-1] + x[1:]) / 2
        >>> @batching_rule(smoothed)
        ... def rule(info, in_dims, x):
        ...     x = dims.batch_first(x, in_dims[0])
        ...     return (x[:, :-1] + x[:, 1:]) / 2, 0
        >>> vmap(smoothed)(torch.arange(6.0).reshape(2, 3))
        tensor([[0.5000, 1.5000],
                [3.5000, 4.5000]])
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for op in map(overload_of, ops):
            need_signature("batching rule", op, rule, ("info", "in_dims"))
            need_out_of_place("batching rule", op, "torch.library.register_vmap")
            if not is_absent(op) and registered_rule(op) is not None:
                raise RuleError(
                    message(
                        f"a second batching rule for {op}",
                        "first owner: torch.library.register_vmap",
                        "to fix: keep one of the two",
                    )
                )
            RULES.register(op, _batched(op, rule), replace=replace, given=True)
        return rule

    return register


def _batched(op: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(rule)
    def run(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        level = info.interpreter
        with run_at(level.below):
            answer = rule(info, in_dims, *args, **kwargs)
        return need_answer(level, str(op), answer) if is_given(op, rule, answer) else answer

    return run
