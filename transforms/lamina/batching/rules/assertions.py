"""Assertions: they hold for a batch if they hold for every example."""

from __future__ import annotations

from typing import Any

from lamina.batching.table import batching_rule
from lamina_core.overloads import aten

__all__: list[str] = []


@batching_rule(aten._assert_async.default, aten._assert_async.msg)
def assert_async(info: Any, in_dims: Any, x: Any, *text: str) -> Any:
    """[B] -> nothing"""
    op = aten._assert_async.msg if text else aten._assert_async.default
    return op(x.all(), *text), None


@batching_rule(aten._assert_tensor_metadata.default)
def assert_tensor_metadata(info: Any, in_dims: Any, x: Any, *expected: Any, **kwargs: Any) -> Any:
    """[B, *S] -> nothing. Examples are alike in what is asserted, and one stands for all."""
    if info.batch_size:
        aten._assert_tensor_metadata.default(x.select(in_dims[0], 0), *expected, **kwargs)
    return None, None
