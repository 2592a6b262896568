"""Our rule of an op for the user's own autograd, where PyTorch's formula is not the whole one.

Some results count as constants in PyTorch's formulas: the mean and the deviation that a norm hands
out, and what its `*_backward` op is given of them. Rules use them as values like any others. A few
other formulas are wrong, or missing for complex values. So where plain tensors require grad, such
an op is run as a `torch.autograd.Function`: forward is the op, and backward the pullback of the
rule, on tensors that autograd follows, for every order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from lamina.autodiff.declared import hand_rule
from lamina.autodiff.leaf import LeafTensor
from lamina_core.dispatch import INSTEAD
from lamina_core.mode import thread_mode
from lamina_core.outer import autograd_is_on
from lamina_core.overloads import is_absent
from lamina_core.schema import facts
from lamina_core.torch_hooks.autograd import forward_ad, functorch_is_active
from lamina_core.torch_hooks.functions import original_apply
from lamina_core.wrapper import LevelTensor

__all__ = ["whole", "whole_in"]

Tensor = torch.Tensor
_CLASSES = LevelTensor.classes


def whole(*ops: Any, when: Callable[..., bool] | None = None) -> Callable[[Any], Any]:
    """Have the user's autograd follow the given overloads by the decorated rule.

    The rule is one for `vjp_rule`, of ops without keyword arguments or lists of tensors. What it
    keeps must be operands, results, or values without a derivative: all else is a constant when the
    pullback is differentiated.

    Args:
        ops: The overloads.
        when: Whether it is needed, given the arguments of a call; else PyTorch's formula will do.
    """

    def register(rule: Any) -> Any:
        for op in ops:
            if not is_absent(op):
                INSTEAD[id(op)] = functools.partial(_run, op, hand_rule(facts(op), rule), when)
        return rule

    return register


def whole_in(*ops: Any) -> Callable[[Any], Any]:
    """Have the user's autograd follow the given overloads by what they are made of."""

    def register(function: Any) -> Any:
        for op in ops:
            if not is_absent(op):
                INSTEAD[id(op)] = functools.partial(_run_parts, op, function)
        return function

    return register


def _run_parts(op: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or not _is_followed(args):
        return op(*args, **kwargs)
    return function(*args)


def _run(op: Any, rule: Any, when: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or not _is_followed(args) or (when is not None and not when(args)):
        return op(*args, **kwargs)
    return original_apply(_Outside, op, rule, *args)


def _is_followed(args: Any) -> bool:
    """Whether reverse mode follows plain operands, and nothing but reverse mode does.

    A `Function` has no tangent, and torch.func asks more of one.
    """
    # HOT: a flat loop, for the usual case that none requires grad.
    for arg in args:
        if isinstance(arg, Tensor) and type(arg) not in _CLASSES and arg.requires_grad:
            break
    else:
        return False
    if forward_ad._current_level >= 0 or not (torch.is_grad_enabled() and autograd_is_on()):
        return False
    outer = thread_mode().outer
    if functorch_is_active() if outer is None else outer.sees_all:
        return False
    return not any(type(arg) in _CLASSES or type(arg) is LeafTensor for arg in args)


class _Outside(torch.autograd.Function):
    """One op with the pullback of a rule."""

    @staticmethod
    def forward(ctx: Any, op: Any, rule: Any, *args: Any) -> Any:
        """Run the op as its rule does."""
        places = facts(op).tensor_args
        ctx.set_materialize_grads(False)
        ctx.needs = tuple([p < len(args) and ctx.needs_input_grad[2 + p] for p in places])
        ctx.places, ctx.count = places, len(args)
        out, residuals, ctx.pullback = rule(ctx.needs, *args)
        saved = [r for r in residuals if isinstance(r, Tensor)]
        ctx.save_for_backward(*saved)
        ctx.rest = [None if isinstance(r, Tensor) else (r,) for r in residuals]
        return out if isinstance(out, Tensor) else tuple(out)

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        """Pull back, by ops that autograd follows in its turn."""
        saved = iter(ctx.saved_tensors)
        residuals = tuple([next(saved) if kept is None else kept[0] for kept in ctx.rest])
        found: list[Any] = [None] * ctx.count
        if ctx.pullback is not None:
            pulled = ctx.pullback(residuals, ctx.needs, *cts)
            for place, need, ct in zip(ctx.places, ctx.needs, pulled, strict=True):
                if need:
                    found[place] = ct
        return (None, None, *found)
