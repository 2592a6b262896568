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

__all__ = [
    "Swap",
    "given_back",
    "in_place",
    "present",
    "reached_twice",
    "swapping",
    "under_one_name",
]


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


def reached_twice(module: torch.nn.Module) -> list[Any]:
    """The parts of a module that it reaches by several paths, itself included."""
    seen: set[int] = set()
    twice: list[Any] = []
    pending: list[Any] = [module]
    while pending:
        part = pending.pop()
        if part is None:
            continue
        if id(part) in seen:
            twice.append(part)
            continue
        seen.add(id(part))
        pending.extend(part._modules.values())
    return twice


@contextmanager
def given_back(twice: Sequence[Any]) -> Iterator[None]:
    """See that parts which a module reaches by several paths get back what they held.

    PyTorch swaps their tensors once for each path, and the second time takes the first one's for
    what was there before.
    """
    kept = [(held, dict(held)) for part in twice for held in (part._parameters, part._buffers)]
    try:
        yield
    finally:
        for held, before in kept:
            held.update(before)


def under_one_name(module: torch.nn.Module, tensors: dict[str, Any]) -> dict[str, str]:
    """For each name that means the same place as an earlier one, the earlier one."""
    first: dict[tuple[int, str], str] = {}
    again: dict[str, str] = {}
    for name in tensors:
        path, _, attribute = name.rpartition(".")
        try:
            place = id(module.get_submodule(path)), attribute
        except AttributeError:
            continue  # an unknown name, which PyTorch has its own error for
        if place in first:
            again[name] = first[place]
        else:
            first[place] = name
    return again


@contextmanager
def in_place(swaps: Sequence[Swap]) -> Iterator[None]:
    """Put the tensors of swaps into their modules again while the block runs."""
    with ExitStack() as stack:
        for swap in swaps:
            stack.enter_context(given_back(reached_twice(swap.module)))
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
