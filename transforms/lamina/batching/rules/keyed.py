"""Batching rules of draws from a key: the same key gives the same numbers, so nothing is random.

A key is [2]; a batch of keys for an output of rank n is [*K, 2] of rank n + 1, where a size of 1
shares a key. Of the tensor that is drawn for only the shape and dtype count.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import batch_first, ensure_batched, logical_shape
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten


def _register_draw(op: Any) -> None:
    @batching_rule(op)
    def draw(info: Any, in_dims: Any, x: Any, key: Any, *args: Any) -> Any:
        """[B, *S], [B, *K, 2] -> [B, *S]"""
        shape, keys = logical_shape(x, in_dims[0]), logical_shape(key, in_dims[1])
        if in_dims[1] is None:  # the examples draw the same
            return op(x.new_empty(shape), key, *args), None
        key = batch_first(key, in_dims[1])
        if len(keys) == 1:
            key = key.reshape(key.shape[0], *[1] * len(shape), 2)
        return op(x.new_empty([info.batch_size, *shape]), key, *args), 0


for _op in (
    aten._philox_normal.default,
    aten._philox_randint.default,
    aten._philox_uniform.default,
):
    _register_draw(_op)


@batching_rule(aten._philox_key_split.default)
def split(info: Any, in_dims: Any, key: Any, num_splits: int) -> Any:
    """[B, *K, 2] -> [n, B, *K, 2]"""
    return aten._philox_key_split.default(batch_first(key, in_dims[0]), num_splits), 1


@batching_rule(aten._philox_key_fold_in.default)
def fold_in(info: Any, in_dims: Any, key: Any, data: int) -> Any:
    """[B, *K, 2], number -> [B, *K, 2]"""
    return aten._philox_key_fold_in.default(batch_first(key, in_dims[0]), data), 0


@batching_rule(aten._philox_key_fold_in.Tensor)
def fold_in_tensor(info: Any, in_dims: Any, key: Any, data: Any) -> Any:
    """[B, *K, 2], [B] -> [B, *K, 2]. It takes one number, so there is a call for each."""
    if in_dims[1] is None:
        return aten._philox_key_fold_in.Tensor(batch_first(key, in_dims[0]), data), 0
    key = ensure_batched(key, in_dims[0], info.batch_size)
    data = batch_first(data, in_dims[1])
    folded = [
        aten._philox_key_fold_in.Tensor(one, number)
        for one, number in zip(key.unbind(), data.unbind(), strict=True)
    ]
    return torch.stack(folded) if folded else key, 0
