"""Which way an op goes under vmap, told from its schema and tags: see `handlers.resolve`."""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.table import RULES
from lamina.decompose.table import decomposition_of, made_of
from lamina_core.overloads import aten
from lamina_core.schema import OpFacts, facts

__all__ = [
    "depends_on_data",
    "is_plain_pointwise",
    "of_fixed_shape",
    "random_decomposition",
    "state_of",
]


def state_of(op: Any) -> str:
    """Which of the five states of `lamina_core.rules.STATES` an op is in under vmap."""
    known = facts(op)
    rule = RULES.lookup(op)
    if rule is not None:
        return rule.state
    if known.mutated and decomposition_of(op) is None:
        counterpart = known.functional()
        return "missing" if counterpart is None else state_of(counterpart)
    if known.is_random:
        return "family" if random_decomposition(op) is None else "decomposed"
    if known.is_pointwise and is_plain_pointwise(known):
        return "family"
    if depends_on_data(op):
        return "missing"
    return "generic" if made_of(op) is None else "decomposed"


def depends_on_data(op: Any) -> bool:
    """Whether the result is a Python value, or of a shape, that examples need not share."""
    return torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags


_MASKED = "torch.where, a masked reduction or torch.nonzero_static"
_SORTED = (
    "s = x.sort().values and s[1:] != s[:-1], which marks where a new value starts, or count "
    "integers below n with zeros(n).scatter_add(0, x, ones)"
)
_NEIGHBOURS = "x[1:] != x[:-1], which marks where a new value starts"
_ROWS = "(x[1:] != x[:-1]).any(1), which marks where a new row starts"
_FIXED_SHAPE = {
    aten._unique.default: _SORTED,
    aten._unique2.default: _SORTED,
    aten.argwhere.default: _MASKED,
    aten.nonzero.default: _MASKED,
    aten.unique_consecutive.default: _NEIGHBOURS,
    aten.unique_dim.default: f"{_ROWS}, behind a sort of the rows",
    aten.unique_dim_consecutive.default: _ROWS,
}


def of_fixed_shape(op: Any) -> str:
    """What to use in place of an op whose output has a shape that depends on values."""
    return _FIXED_SHAPE.get(op, "an op whose output shape does not depend on values")


def random_decomposition(op: Any) -> Any:
    """What a random op is made of, if not of a draw."""
    return decomposition_of(op) or (op.decompose if facts(op).is_composite else None)


def is_plain_pointwise(known: OpFacts) -> bool:
    """Whether all that an elementwise op asks for is operands that broadcast."""
    return (
        bool(known.tensor_args)
        and not known.list_args
        and not known.tensor_kwargs
        and known.returns == ("tensor",)
    )
