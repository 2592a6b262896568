"""Assertions: they hold for a batch if they hold for every example.

`torch.distributions` asks `_is_all_true` whether parameters and values are valid, and then for a
Python bool. One that all examples share is the answer to that, as it is in `torch.func`.
"""

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


def _shared_answer(op: Any) -> Any:
    def rule(info: Any, in_dims: Any, x: Any) -> Any:
        """[B, *S] -> []: the op itself, for the levels below."""
        return op(x), None

    return rule


for _op in (aten._is_all_true.default, aten._is_any_true.default):
    batching_rule(_op)(_shared_answer(_op))
