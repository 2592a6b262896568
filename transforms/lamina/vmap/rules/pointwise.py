"""Batching rules of elementwise ops that the family does not cover.

The family (see `lamina.vmap.handlers`) takes every op that is tagged as elementwise and gives one
tensor. Here is what gives several, gives a Python value, or has its random numbers to itself.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.vmap.dims import ensure_batched, logical_shape
from lamina.vmap.table import batching_rule, decomposition
from lamina_core.errors import DataDependentError

aten = torch.ops.aten


@batching_rule(aten.equal.default)
def equal(info: Any, in_dims: Any, x: Any, y: Any) -> Any:
    """[B, *S], [B, *S] -> one bool for all examples. Where they disagree there is none to give."""
    if logical_shape(x, in_dims[0]) != logical_shape(y, in_dims[1]):
        return False, None
    size = info.batch_size
    x, y = (ensure_batched(v, d, size) for v, d in zip((x, y), in_dims, strict=True))
    same = (x == y).reshape(size, x[:1].numel()).all(1)
    for answer in (True, False):
        if torch.equal(same, torch.full_like(same, answer)):
            return answer, None
    raise info.interpreter.error(
        DataDependentError,
        f"aten.equal.default gives one Python value, and the {size} examples disagree",
        "to fix: use (x == y).all(), which stays a tensor",
    )


@batching_rule(aten.frexp.Tensor)
def frexp(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *S] -> mantissa [B, *S], exponent [B, *S]"""
    return tuple(torch.frexp(x)), (in_dims[0], in_dims[0])


@decomposition(aten.rrelu_with_noise_functional.default)
def rrelu_with_noise_functional(
    x: Any,
    noise: Any,
    lower: float = 0.125,
    upper: float = 1.0 / 3,
    training: bool = False,
    generator: Any = None,
) -> Any:
    """A slope drawn for each element below 0; only training draws."""
    if not training or not x.numel():
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2), noise
    slope = lower + (upper - lower) * torch.rand_like(x)
    return torch.where(x <= 0, x * slope, x), torch.where(x <= 0, slope, 1)
