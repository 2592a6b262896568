"""Batching rules of softmax along one dim; a scalar counts as having one.

A masked softmax is one of scores that are -inf where the mask is True.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import align, at_least_1d, logical_rank, physical
from lamina.batching.table import batching_rule, decomposition
from lamina_core.overloads import aten


def _along(op: Any, x: Any, x_bdim: int, dim: int, *rest: Any) -> Any:
    scalar = logical_rank(x, x_bdim) == 0
    x = at_least_1d(x, x_bdim)
    at = physical(dim, x, x_bdim)
    out = op(x, at, *rest)
    return (out.squeeze(at) if scalar else out), x_bdim


def _register(op: Any) -> None:
    @batching_rule(op, state="family")
    def softmax(info: Any, in_dims: Any, x: Any, dim: int, *rest: Any) -> Any:
        """[B, *S] -> [B, *S]"""
        return _along(op, x, in_dims[0], dim, *rest)


def _register_backward(op: Any) -> None:
    @batching_rule(op, state="family")
    def softmax_backward(
        info: Any, in_dims: Any, ct: Any, out: Any, dim: int, input_dtype: Any
    ) -> Any:
        """[B, *S], [B, *S] -> [B, *S]"""
        (ct, out), bdim = align((ct, out), in_dims[:2], info.batch_size)
        scalar = logical_rank(out, bdim) == 0
        ct, out = at_least_1d(ct, bdim), at_least_1d(out, bdim)
        at = physical(dim, out, bdim)
        x_ct = op(ct, out, at, input_dtype)
        return (x_ct.squeeze(at) if scalar else x_ct), bdim


for _op in [
    aten._log_softmax.default,
    aten._safe_softmax.default,
    aten._softmax.default,
    aten.log_softmax.int,
    aten.softmax.int,
]:
    _register(_op)
for _op in [aten._log_softmax_backward_data.default, aten._softmax_backward_data.default]:
    _register_backward(_op)


@decomposition(aten._masked_softmax.default)
def _masked_softmax(x: Any, mask: Any, dim: int | None = None, mask_type: int | None = None) -> Any:
    """[N, H, L, S]. The mask is [L, S] in type 0, [N, S] in type 1, and of the shape of x else."""
    if mask_type == 1:
        mask = mask[:, None, None, :]
    return torch.softmax(x.masked_fill(mask, -torch.inf), -1 if dim is None else dim)


@decomposition(aten._masked_softmax_backward.default)
def _masked_softmax_backward(ct: Any, out: Any, mask: Any, dim: int | None = None) -> Any:
    """[*S], three times -> [*S]. Where all is masked the outputs are nan, and the result is 0."""
    total = (ct * out).masked_fill(mask, 0).sum(-1 if dim is None else dim, keepdim=True)
    return (out * (ct - total)).masked_fill(mask, 0)
