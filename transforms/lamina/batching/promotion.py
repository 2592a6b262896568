"""Type promotion of elementwise ops with a batched operand that has no dims of its own.

PyTorch lets a tensor without dims yield to those with dims: `int64[] * float32[3]` is float32, and
so is `float64[] * float32[3]`. A batched one has a dim, and would not yield. So where dtypes differ
it is cast beforehand. What an op makes of its dtypes is asked of the op itself, once for each
choice of them, on tensors of one element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lamina_core.half import HALF
from lamina_core.logical import alone
from lamina_core.overloads import aten
from lamina_core.schema import OpFacts

__all__ = ["REFUSED", "Operand", "Plan", "Planner", "needs_plan"]

# An operand: its position among the arguments, its value, and the batch dim of that.
Operand = tuple[int, Any, int | None]

# The kernels of these read a second operand without dims as it is, not rounded to half precision.
_READ_WIDE = frozenset(
    str(op) for op in (aten.div.Tensor, aten.mul.Tensor, aten.true_divide.Tensor)
)
_WITHOUT_SAY = ("condition", "mask")  # the names of arguments that choose, and promote nothing


@dataclass(frozen=True)
class Plan:
    """What to cast the operands of a call to, by position, and then its result."""

    casts: dict[int, torch.dtype] = field(default_factory=dict)
    out: torch.dtype | None = None


REFUSED = Plan()


def needs_plan(operands: Sequence[Operand]) -> bool:
    """Whether dtypes differ, and an operand that user code sees without dims is batched."""
    first = operands[0][1].dtype
    return any(value.dtype is not first for _, value, _ in operands) and any(
        bdim is not None and value.dim() == 1 for _, value, bdim in operands
    )


class Planner:
    """The plans of one op, made once for each choice of dtypes and kinds of arguments."""

    def __init__(self, known: OpFacts) -> None:
        self.known = known
        self.plans: dict[Any, Plan] = {}

    def __call__(self, args: Any, kwargs: Any, operands: Sequence[Operand]) -> Plan:
        """The plan of a call; REFUSED if the op takes no such dtypes."""
        key = (
            torch.get_default_dtype(),
            tuple([(v.dtype, v.dim() > (d is not None), d is None) for _, v, d in operands]),
            tuple(map(type, args)),
            *[(name, type(value)) for name, value in kwargs.items()],
        )
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = _plan(self.known, args, kwargs, operands)
        return plan


def _plan(known: OpFacts, args: Any, kwargs: Any, operands: Sequence[Operand]) -> Plan:
    """The first way to cast that gives the dtype that the op gives alone."""
    op = known.op
    shown = {at: _one(v, int(v.dim() > (d is not None))) for at, v, d in operands}
    with alone():
        try:
            expected = op(*_filled(args, shown), **kwargs).dtype
        except Exception:  # whatever the op raises: it is raised again for the user's own call
            return REFUSED
        physical = {at: _one(v, shown[at].dim() + (d is not None)) for at, v, d in operands}
        for plan in _ways(known, operands, shown, expected):
            cast = {
                at: x.to(plan.casts[at]) if at in plan.casts else x for at, x in physical.items()
            }
            try:
                out = op(*_filled(args, cast), **kwargs)
            except Exception:  # then another way
                continue
            if (plan.out or out.dtype) == expected:
                return plan
    return Plan(out=expected)


def _one(like: Any, rank: int) -> Any:
    return torch.ones([1] * rank, dtype=like.dtype, device=like.device)


def _filled(args: Any, values: dict[int, Any]) -> list[Any]:
    return [values.get(at, arg) for at, arg in enumerate(args)]


def _ways(
    known: OpFacts, operands: Sequence[Operand], shown: dict[int, Any], expected: torch.dtype
) -> list[Plan]:
    voices = [at for at, _, _ in operands if known.arg_names[at] not in _WITHOUT_SAY]
    common = _common([shown[at] for at in voices])
    few = [at for at, v, d in operands if d is not None and v.dim() == 1 and at in voices]
    ways = [Plan(dict.fromkeys(voices, common)), Plan(dict.fromkeys(few, common))]
    if common in HALF and known.name in _READ_WIDE and voices[1] in few:
        ways.insert(0, Plan(dict.fromkeys(voices, torch.float32), expected))
    return ways


def _common(tensors: Sequence[Any]) -> torch.dtype:
    """What TensorIterator computes in: those without dims have a say in the kind of number only."""
    with_dims = _widest([t for t in tensors if t.dim()])
    without = _widest([t for t in tensors if not t.dim()])
    if with_dims is None or without is None:
        found = with_dims or without
        assert found is not None
        return found
    return torch.result_type(torch.ones(1, dtype=with_dims), torch.ones((), dtype=without))


def _widest(tensors: Sequence[Any]) -> torch.dtype | None:
    found = None
    for tensor in tensors:
        found = tensor.dtype if found is None else torch.promote_types(found, tensor.dtype)
    return found
