"""Batching rules of activations that are not elementwise: they split a dim in two."""

from __future__ import annotations

from typing import Any

import torch

from lamina.vmap.dims import ensure_batched, physical
from lamina.vmap.table import batching_rule

aten = torch.ops.aten


@batching_rule(aten.glu.default)
def glu(info: Any, in_dims: Any, x: Any, dim: int = -1) -> Any:
    """[B, *S] -> [B, *S with dim halved]."""
    bdim = in_dims[0]
    return aten.glu.default(x, physical(dim, x, bdim)), bdim


@batching_rule(aten.glu_backward.default)
def glu_backward(info: Any, in_dims: Any, ct: Any, x: Any, dim: int) -> Any:
    """[B, *S with dim halved], [B, *S] -> [B, *S]."""
    ct_bdim, x_bdim = in_dims[:2]
    ct = ensure_batched(ct, ct_bdim, info.batch_size)
    x = ensure_batched(x, x_bdim, info.batch_size)
    return aten.glu_backward.default(ct, x, physical(dim, x, 0)), 0
