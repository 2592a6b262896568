"""What most tests of one op under `vmap` say: the same as the examples one by one, stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import lamina


def assert_stacked(f: Callable[..., Any], *args: torch.Tensor) -> None:
    """Fails unless `vmap(f)` gives what `f` gives for each example, without a loop."""
    before = lamina.config.fallback
    lamina.config.fallback = "error"
    try:
        actual = tree_leaves(lamina.vmap(f)(*args))
    finally:
        lamina.config.fallback = before
    rows = [tree_leaves(f(*example)) for example in zip(*args, strict=True)]
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)
