"""The elementwise family: ops that need no rule, only operands of one rank with the batch in front.

It is made from the op's schema: see `is_plain_pointwise` in `states.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.batched import BatchedTensor, wrap, wrap_like
from lamina.batching.dims import pad_rank
from lamina.batching.operands import pass_unbatched
from lamina.batching.promotion import REFUSED, Planner, needs_plan
from lamina_core.dispatch import call_one, call_two, watched
from lamina_core.handlers import Handler
from lamina_core.refusals import refused
from lamina_core.schema import OpFacts
from lamina_core.scopes import run_at
from lamina_core.tensors import needs_guard
from lamina_core.torch_hooks.registry import has_kernel_for
from lamina_core.wrapper import LevelTensor, strip_dead

__all__ = ["elementwise_handler"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


def elementwise_handler(known: OpFacts) -> Handler:
    """The handler of an elementwise op, with a short cut for those of one operand."""
    return _unary_handler(known) if known.tensor_args == (0,) else _nary_handler(known)


def _unary_handler(known: OpFacts) -> Handler:
    call = known.call

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: the most frequent op of all.
        x = args[0]
        if type(x) is BatchedTensor and x.interpreter is interpreter:
            if len(args) == 1 and not kwargs:
                value = x.value
                out = call_one(op, call, value)
                return x if out is value else wrap_like(x, out)  # `+x` is x
            return wrap_like(x, call(x.value, *args[1:], **kwargs))
        return pass_unbatched(interpreter, op, args, kwargs)

    return handle


def _nary_handler(known: OpFacts) -> Handler:
    call = known.call
    positions = known.tensor_args
    first_two = positions[:2] == (0, 1)
    planner = Planner(known)
    # Some have a kernel of their own beside a formula in other ops.
    made_of_others = known.is_composite and not has_kernel_for(known.op.name(), "CPU")

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: two operands of one shape and dtype, one batched at least, or one and a number.
        if first_two and len(args) == 2 and not kwargs:
            x, y = args
            if type(x) is BatchedTensor and x.interpreter is interpreter:
                bdim = x.bdim
                if type(y) is BatchedTensor and y.interpreter is interpreter:
                    if (
                        bdim is not None
                        and x.logical == y.logical
                        and y.strides is None
                        and (
                            bdim == y.bdim
                            or (bdim == 0 and y.bdim is None and x.value.dtype is y.value.dtype)
                        )
                    ):
                        return wrap_like(x, call_two(op, call, x.value, y.value))
                elif type(y) is Tensor:
                    if (
                        bdim == 0
                        and x.logical == y.shape
                        and x.value.dtype is y.dtype
                        and y.is_contiguous()
                        and not needs_guard(y)
                    ):
                        return wrap_like(x, call_two(op, call, x.value, y))
                elif type(y) is float or type(y) is int:
                    return wrap_like(x, call_two(op, call, x.value, y))
            elif (
                type(x) is Tensor
                and type(y) is BatchedTensor
                and y.interpreter is interpreter
                and y.bdim == 0
                and y.logical == x.shape
                and y.value.dtype is x.dtype
                and x.is_contiguous()
                and not needs_guard(x)
            ):
                return wrap_like(y, call(x, y.value))
        values = list(args)
        operands = []
        rank = 0
        for position in positions:
            if position >= len(args):
                break
            arg = args[position]
            if arg is None:
                continue
            if type(arg) in _CLASSES and not arg.interpreter.alive:
                arg = strip_dead(arg)  # it may stand for a value of this level
            if type(arg) is BatchedTensor and arg.interpreter is interpreter:
                operands.append((position, arg.value, arg.bdim))
            elif isinstance(arg, Tensor):
                if type(arg) not in _CLASSES and not interpreter.watch and needs_guard(arg):
                    interpreter.watch = True
                    return watched(interpreter, handle, op, args, kwargs)
                operands.append((position, arg, None))
            else:
                continue
            rank = max(rank, arg.dim())
        if all(bdim is None for _, _, bdim in operands):
            return pass_unbatched(interpreter, op, args, kwargs)
        for position, value, bdim in operands:
            values[position] = pad_rank(value, bdim, rank)
        if not needs_plan(operands):
            return wrap(interpreter, call(*values, **kwargs), 0)
        if made_of_others:
            with run_at(interpreter, autocast=True):
                return op.decompose(*args, **kwargs)
        plan = planner(args, kwargs, operands)
        if plan is REFUSED:
            own = refused(interpreter, op, args, kwargs)
            if own is not None:
                raise own
        for position, dtype in plan.casts.items():
            values[position] = values[position].to(dtype)
        out = call(*values, **kwargs)
        return wrap(interpreter, out if plan.out is None else out.to(plan.out), 0)

    return handle
