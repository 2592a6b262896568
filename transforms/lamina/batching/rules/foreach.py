"""The `_foreach` ops, as the op that each applies to every tensor of its lists.

A name says which: `_foreach_add.ScalarList` adds the k-th number to the k-th tensor. The tensors of
a list may be batched or not, one by one, so there is nothing to gain from handling them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina.batching.table import decomposition
from lamina_core.overloads import aten
from lamina_core.schema import facts
from lamina_core.schema_record import is_recorded
from lamina_core.torch_hooks.registry import all_op_names

__all__: list[str] = []

# Where the op of one tensor has another name or other arguments.
_EACH: dict[str, Callable[..., Any]] = {
    "addcdiv": lambda x, y, z, value=1: x + value * (y / z),
    "addcmul": lambda x, y, z, value=1: x + value * (y * z),
    "clamp_max": torch.clamp_max,
    "clamp_min": torch.clamp_min,
    "copy": aten.copy,
    "maximum": lambda x, y: torch.maximum(x, y) if isinstance(y, torch.Tensor) else x.clamp(min=y),
    "minimum": lambda x, y: torch.minimum(x, y) if isinstance(y, torch.Tensor) else x.clamp(max=y),
    "norm": lambda x, ord=2, dtype=None: torch.linalg.vector_norm(x, ord, dtype=dtype),
    "powsum": lambda x, ord=2, dtype=None: aten.linalg__powsum(x, ord, dtype=dtype),
    "zero": torch.zeros_like,
}


def _register(op: Any) -> None:
    name = op._schema.name.removeprefix("aten::_foreach_")
    each = _EACH.get(name) or getattr(torch, name)
    known = facts(op)
    lists = set(known.list_args)
    lists |= {i for i, a in enumerate(op._schema.arguments) if str(a.type) == "List[number]"}
    # One tensor of numbers, a number for each tensor of the lists.
    names = [argument.name for argument in op._schema.arguments]
    numbers = names.index("scalars") if op._overloadname == "Tensor" and "scalars" in names else -1
    lists.add(numbers)

    @decomposition(op)
    def foreach(*args: Any, **kwargs: Any) -> Any:
        """The same of every tensor."""
        columns = [arg.unbind() if i == numbers else arg for i, arg in enumerate(args)]
        over = [i for i in range(len(args)) if i in lists]
        outs = []
        for row in zip(*[columns[i] for i in over], strict=True):
            for i, value in zip(over, row, strict=True):
                columns[i] = value
            outs.append(each(*columns, **kwargs))
        return outs


def _overloads() -> list[Any]:
    prefix = "aten::_foreach_"
    names = sorted(n for n in all_op_names() if n.startswith(prefix))
    found = []
    for full in names:
        base, _, overload = full.removeprefix("aten::").partition(".")
        op = getattr(getattr(aten, base), overload or "default")
        if is_recorded(op) and not facts(op).mutated:
            found.append(op)
    return found


for _op in _overloads():
    _register(_op)
