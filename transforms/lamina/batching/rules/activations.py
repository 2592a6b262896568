"""Batching rules of activations that are not elementwise: they split a dim in two."""

from __future__ import annotations

from typing import Any

from lamina.batching.dims import ensure_batched, physical
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten


@batching_rule(aten.glu.default)
def glu(info: Any, in_dims: Any, x: Any, dim: int = -1) -> Any:
    """[B, *S] -> [B, *S with dim halved]."""
    bdim = in_dims[0]
    return aten.glu.default(x, physical(dim, x, bdim)), bdim


def _register_of_glu(op: Any, count: int) -> None:
    @batching_rule(op, state="family")
    def of_glu(info: Any, in_dims: Any, *args: Any) -> Any:
        """[B, *S] or [B, *S with dim halved] each, dim -> [B, ...]"""
        values = [
            ensure_batched(x, bdim, info.batch_size)
            for x, bdim in zip(args[:count], in_dims[:count], strict=True)
        ]
        return op(*values, physical(args[count], values[-1], 0)), 0


# The derivatives of glu, and of its backward; the number of tensors in front of dim.
_register_of_glu(aten.glu_backward.default, 2)
_register_of_glu(aten.glu_backward_jvp.default, 5)
_register_of_glu(aten.glu_jvp.default, 3)
