"""`torch.autograd.Function` under `vjp`: its own backward becomes the pullback."""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.checks import is_differentiable
from lamina.autodiff.reverse import ReverseInterpreter
from lamina.autodiff.tape import Node
from lamina_core.config import config
from lamina_core.function import Applied, Custom, Needs, apply_custom, applying
from lamina_core.mode import thread_mode
from lamina_core.scopes import run_at

__all__ = ["values_of"]

Tensor = torch.Tensor


def values_of(interpreter: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments as the level below has them."""
    return tuple([arg.value if interpreter.is_own(arg) else arg for arg in args])


@applying(ReverseInterpreter)
def _apply_vjp(interpreter: Any, custom: Custom, args: tuple[Any, ...], needs: Needs) -> Applied:
    """Hand a function down, and put one node on the tape for it."""
    positions = tuple(
        [
            (arg.node, arg.index)
            if interpreter.is_own(arg) and arg.node is not None and is_differentiable(arg)
            else None
            for arg in args
        ]
    )
    if not interpreter.tracking():
        positions = (None,) * len(args)
    mine = tuple([position is not None for position in positions])
    below = tuple([need or own for need, own in zip(needs, mine, strict=True)])
    applied = apply_custom(custom, values_of(interpreter, args), below)
    node = None
    if any(mine):
        residuals = (custom, applied.rest, *applied.tensors)
        node = Node(custom.name, _pullback, residuals, mine, positions, len(applied.outs))
    outs = []
    for i, out in enumerate(applied.outs):
        if isinstance(out, Tensor):
            wrapped = interpreter.constant(out)
            if is_differentiable(out) and i not in applied.constant:
                wrapped.node, wrapped.index = node, i
                if config.debug:
                    wrapped.fault()
            out = wrapped
        outs.append(out)
    return applied.lifted(args, outs)


def _pullback(residuals: Any, needs: Any, *cts: Any) -> Any:
    """The user's backward, as code of the level that pulls back."""
    custom, rest, *tensors = residuals
    if all(ct is None for ct in cts):
        return [None] * len(needs)
    with run_at(thread_mode().top):
        return custom.backward(tensors, rest, needs, cts)
