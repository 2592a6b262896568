"""`torch.autograd.Function` under `vjp` and `jvp`: its own backward becomes the pullback."""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.forward import ForwardInterpreter
from lamina.autodiff.reverse import ReverseInterpreter
from lamina.autodiff.tape import Node, backward
from lamina_core.function import Applied, Custom, Needs, apply_custom, applying
from lamina_core.interpreter import asleep, run_at, thread_mode
from lamina_core.wrapper import strip_dead

__all__: list[str] = []

Tensor = torch.Tensor


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _values(interpreter: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([arg.value if interpreter.is_own(arg) else arg for arg in args])


# -- reverse mode ----------------------------------------------------------------------------------


@applying(ReverseInterpreter)
def _apply_vjp(interpreter: Any, custom: Custom, args: tuple[Any, ...], needs: Needs) -> Applied:
    """Hand a function down, and put one node on the tape for it."""
    positions = tuple(
        [
            (arg.node, arg.index)
            if interpreter.is_own(arg) and arg.node is not None and _is_differentiable(arg)
            else None
            for arg in args
        ]
    )
    if not interpreter.tracking():
        positions = (None,) * len(args)
    mine = tuple([position is not None for position in positions])
    below = tuple([need or own for need, own in zip(needs, mine, strict=True)])
    applied = apply_custom(custom, _values(interpreter, args), below)
    node = None
    if any(mine):
        residuals = (custom, applied.rest, *applied.tensors)
        node = Node(custom.name, _pullback, residuals, mine, positions, len(applied.outs))
    outs = []
    for i, out in enumerate(applied.outs):
        if isinstance(out, Tensor):
            wrapped = interpreter.constant(out)
            if _is_differentiable(out) and i not in applied.constant:
                wrapped.node, wrapped.index = node, i
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


# -- forward mode ----------------------------------------------------------------------------------


@applying(ForwardInterpreter)
def _apply_jvp(interpreter: Any, custom: Custom, args: tuple[Any, ...], needs: Needs) -> Applied:
    """Hand a function down, and push the tangents through it."""
    tangents = [arg.tangent if interpreter.is_own(arg) else None for arg in args]
    if not (interpreter.grad_enabled and torch.is_grad_enabled()):
        tangents = [None] * len(args)
    mine = tuple([tangent is not None for tangent in tangents])
    below = tuple([need or own for need, own in zip(needs, mine, strict=True)])
    applied = apply_custom(custom, _values(interpreter, args), below)
    out_ts: list[Any] = [None] * len(applied.outs)
    if any(mine):
        with asleep(interpreter, custom.name), run_at(interpreter.below):
            if custom.has_jvp:
                out_ts = custom.jvp(applied.tensors, applied.rest, tangents)
            else:
                out_ts = _transposed(custom, applied, mine, tangents)
            out_ts = [strip_dead(out_t) for out_t in out_ts]
    outs = []
    for i, (out, out_t) in enumerate(zip(applied.outs, out_ts, strict=True)):
        if isinstance(out, Tensor):
            wrapped = interpreter.constant(out)
            if out_t is not None and _is_differentiable(out) and i not in applied.constant:
                wrapped.tangent = out_t
            out = wrapped
        outs.append(out)
    return applied.lifted(args, outs)


def _transposed(custom: Custom, applied: Applied, mine: Needs, tangents: list[Any]) -> list[Any]:
    """J t as the transpose of ct -> J^T ct, which is linear: pull t back through the backward."""
    zeros = [
        torch.zeros_like(out) if _is_differentiable(out) and i not in applied.constant else None
        for i, out in enumerate(applied.outs)
    ]
    if all(zero is None for zero in zeros):
        return zeros
    with ReverseInterpreter("jvp by two vjps") as inner, torch.enable_grad():
        cts = [None if zero is None else inner.leaf(zero) for zero in zeros]
        pulled = custom.backward(applied.tensors, applied.rest, mine, cts)
        pulled = [strip_dead(ct) for ct in pulled]
        positions = [
            (ct.node, ct.index) if inner.is_own(ct) and ct.node is not None else None
            for ct in pulled
        ]
    leaves = [ct.node for ct in cts if ct is not None]
    found = iter(backward(positions, tangents, leaves, release=True))
    return [None if ct is None else next(found) for ct in cts]
