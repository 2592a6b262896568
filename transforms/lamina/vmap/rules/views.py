"""Batching rules of view ops: shift the dims past the batch dim, keep the memory."""

from __future__ import annotations

from typing import Any

import torch

from lamina.vmap.dims import physical
from lamina.vmap.table import batching_rule

aten = torch.ops.aten


@batching_rule(aten.select.int)
def select(info: Any, in_dims: Any, x: Any, dim: int, index: int) -> Any:
    """[B, *S] -> [B, *S without dim]."""
    bdim = in_dims[0]
    at = physical(dim, x, bdim)
    return x.select(at, index), bdim - (at < bdim)
