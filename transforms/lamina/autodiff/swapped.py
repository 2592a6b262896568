"""Modules whose parameters stand for others at the moment, so that a second run sees them too.

`functional_call` puts the given tensors into a module for the time of one call. A checkpointed part
of the module runs again later, when they are out again; its hooks remember them (see
`lamina.autodiff.saved`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from lamina_core.torch_hooks.modules import with_tensors

__all__ = ["Swap", "in_place", "present", "swapping"]


class Swap(NamedTuple):
    """One active call: a module, its tensors by name, and the two options of the call."""

    module: torch.nn.Module
    tensors: dict[str, Any]
    tie_weights: bool
    strict: bool


class _Thread(threading.local):
    def __init__(self) -> None:
        self.swaps: tuple[Swap, ...] = ()


_thread = _Thread()


def present() -> tuple[Swap, ...]:
    """The swaps that are active in this thread, outermost first."""
    return _thread.swaps


@contextmanager
def swapping(swap: Swap) -> Iterator[None]:
    """Note that a module holds other tensors while the block runs."""
    before = _thread.swaps
    _thread.swaps = (*before, swap)
    try:
        yield
    finally:
        _thread.swaps = before


@contextmanager
def in_place(swaps: Sequence[Swap]) -> Iterator[None]:
    """Put the tensors of swaps into their modules again while the block runs."""
    with ExitStack() as stack:
        for swap in swaps:
            stack.enter_context(
                with_tensors(
                    swap.module,
                    dict(swap.tensors),
                    tie_weights=swap.tie_weights,
                    strict=swap.strict,
                )
            )
            stack.enter_context(swapping(swap))
        yield
