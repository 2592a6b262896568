"""`saved_residuals`: what reverse mode keeps of a function for the backward pass, and why."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from lamina.autodiff.api import vjp
from lamina.autodiff.checks import named_leaves
from lamina.autodiff.leaf import LeafTensor
from lamina.autodiff.saved import Packed
from lamina.autodiff.tape import Node
from lamina.checkpointing.kept import storage_of
from lamina.checkpointing.rematerialise import HOME, Recording
from lamina_core import pytree
from lamina_core.config import tensor_summary
from lamina_core.debug import calling_line
from lamina_core.level import stand_in
from lamina_core.mode import thread_mode
from lamina_core.schema import facts
from lamina_core.tensors import tensors_in
from lamina_core.wrapper import plain_of

__all__ = ["Residual", "print_saved_residuals", "saved_residuals"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Residual:
    """One tensor that is kept for the backward pass.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        bytes: The size of its storage, which is what is held.
        op: The op whose derivative needs it; None for what a checkpoint keeps.
        source: Where that op was called, as `file:line`.
        why: What it is: an argument, the output of an op, a captured tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    op: str | None
    source: str
    why: str

    def __str__(self) -> str:
        """One line, with the source shortened to the name of the file."""
        summary = tensor_summary(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        kept = "a checkpoint" if self.op is None else self.op
        return f"{summary}, {self.bytes} bytes: {self.why}, for {kept} at {_short(self.source)}"


def saved_residuals(func: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Residual]:
    """List what `vjp` of a function keeps until the backward pass, each storage once.

    It runs the function. Of regions under `lamina.checkpoint` their arguments are listed, and what
    the policy keeps. A checkpoint of `torch.utils.checkpoint`, called directly, does not say what
    it holds; the tensors that other saved-tensor hooks hold are listed as theirs.

    Args:
        func: Takes `*args` and `**kwargs`, returns a pytree of tensors.
        *args: What it is differentiated with respect to.
        **kwargs: Reach `func` and are not differentiated.

    Returns:
        Records in the order in which the ops were called.

    Raises:
        NotDifferentiableError: If no leaf of `args` is a floating-point or complex tensor.

    Example:
        >>> import torch
        >>> from lamina import saved_residuals
        >>> for residual in saved_residuals(lambda x: x.sin().exp().sum(), torch.zeros(3)):
        ...     print(residual.why, "for", residual.op)
        argument x for aten.sin.default
        output of aten.exp.default for aten.exp.default
    """
    watch = _Watch()
    names = {
        storage_of(plain_of(leaf)): f"argument {name}"
        for name, leaf in _named(func, args, kwargs)
        if isinstance(leaf, Tensor)
    }

    def watched(*given: Any, **named: Any) -> Any:
        with watch, watch.recording:
            out = func(*given, **named)
        watch.outs = pytree.leaves(out)
        return out

    # The function that pulls back keeps the tape alive until it has been read.
    _, pull = vjp(watched, *args, **kwargs)
    found = watch.residuals(names)
    del pull
    return found


def print_saved_residuals(
    func: Callable[..., Any], *args: Any, file: TextIO | None = None, **kwargs: Any
) -> None:
    """Print `saved_residuals`, one a line, below their number and size.

    Args:
        func: The function.
        *args: What it is differentiated with respect to.
        file: Where to print; the standard output by default.
        **kwargs: Reach `func`.
    """
    found = saved_residuals(func, *args, **kwargs)
    total = sum(residual.bytes for residual in found)
    count = f"{len(found)} residual{'' if len(found) == 1 else 's'}"
    lines = [f"{count}, {total} bytes", *(f"  {residual}" for residual in found)]
    (file or sys.stdout).write("\n".join(lines) + "\n")


def _named(func: Any, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
    """The leaves of the arguments by the names of the parameters."""
    try:
        bound = inspect.signature(func).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = {"args": args, "kwargs": kwargs}
    return [pair for name, value in bound.items() for pair in named_leaves(name, value)]


def _short(source: str) -> str:
    return os.path.basename(source)


class _Watch:
    """Notes what the ops of one level give, and where they are called, while it is entered."""

    outs: list[Any]

    def __init__(self) -> None:
        self.recording = Recording()
        self.made: dict[int, tuple[str, int]] = {}  # by storage: what it is, and when it was made
        self.sources: dict[int, str] = {}  # by node
        self.steps = 0

    def __enter__(self) -> None:
        interpreter: Any = thread_mode().top
        self.interpreter = interpreter
        self.stand_in = stand_in(interpreter, self._noting(interpreter.process), checks=True)
        self.stand_in.__enter__()
        interpreter.observer = self._observe

    def __exit__(self, *exc: object) -> None:
        self.stand_in.__exit__()
        self.interpreter.observer = None

    def _noting(self, process: Any) -> Any:
        def noting(op: Any, args: Any, kwargs: Any) -> Any:
            start = self.steps
            given = tensors_in(args, kwargs)
            for tensor in given:
                if not self.interpreter.is_own(tensor):
                    self._note(tensor, "captured tensor", start)
            out = process(op, args, kwargs)
            storages = {storage_of(plain_of(tensor)) for tensor in given}
            self._note_outputs(facts(op).name, tensors_in((out,), {}), storages, start)
            return out

        return noting

    def _observe(self, name: str, outs: list[Any]) -> None:
        self._note_outputs(name, tensors_in((outs,), {}), set(), self.steps)

    def _note_outputs(self, name: str, outs: list[Any], given: set[int], start: int) -> None:
        source = calling_line(HOME)
        for tensor in outs:
            if storage_of(plain_of(tensor)) not in given:
                self._note(tensor, f"output of {name}", start)
            node = getattr(tensor, "node", None)
            if node is not None:
                self.sources.setdefault(node.sequence, source)

    def _note(self, tensor: Any, what: str, start: int) -> None:
        """Say what a storage is, unless an op inside the present one has said so."""
        storage = storage_of(plain_of(tensor))
        known = self.made.get(storage)
        if what == "captured tensor" and known is not None:
            return
        if known is None or known[1] <= start:
            self.steps += 1
            self.made[storage] = what, self.steps
            self.recording.names.pop(storage, None)  # of a tensor that had this storage before

    def residuals(self, names: dict[int, str]) -> list[Residual]:
        """What the tape keeps, each storage once."""
        names = {
            **{storage: what for storage, (what, _) in self.made.items()},
            **names,
        }
        found: dict[int, Residual] = {}

        def add(tensor: Any, op: str | None, source: str, otherwise: str) -> None:
            plain = plain_of(tensor)
            storage = storage_of(plain)
            if storage in found:
                return
            what = names.get(storage, otherwise)
            if storage in self.recording.names:
                what += f" named {self.recording.names[storage]!r}"
            found[storage] = Residual(
                tuple(plain.shape), plain.dtype, plain.untyped_storage().nbytes(), op, source, what
            )

        packed = False
        for node in _nodes(self.outs):
            source = self.sources.get(node.sequence, "an unknown place")
            residuals, otherwise = node.residuals, f"computed for {node.name}"
            if isinstance(residuals, Packed):
                packed = packed or residuals.hooks.recomputes
                residuals, otherwise = residuals.held(), "held by saved-tensor hooks"
            for tensor in _tensors(residuals):
                add(tensor, str(node.name), source, otherwise)
        for region, arguments in self.recording.regions if packed else ():
            for tensor in _tensors(pytree.leaves(arguments)):
                add(tensor, None, region.source, "argument of the checkpoint")
            for name, tensor in region.tensors():
                add(tensor, None, region.source, f"output of {name}")
        return list(found.values())


def _nodes(outs: list[Any]) -> list[Node]:
    """The nodes that some outputs depend on, in the order in which they were made."""
    found: dict[int, Node] = {}
    stack = [out.node for out in outs if getattr(out, "node", None) is not None]
    while stack:
        node = stack.pop()
        if node.sequence not in found:
            found[node.sequence] = node
            stack.extend(parent[0] for parent in node.parents if parent is not None)
    return [found[sequence] for sequence in sorted(found)]


def _tensors(residual: Any) -> Iterator[Any]:
    """The tensors in a residual, those in the C++ graphs of borrowed formulas included."""
    if isinstance(residual, LeafTensor):
        yield residual.value
        yield from _saved_in(residual.grad_fn)
    elif isinstance(residual, Tensor):
        yield residual
    elif isinstance(residual, list | tuple):
        for item in residual:
            yield from _tensors(item)
    elif isinstance(residual, dict):
        yield from _tensors(list(residual.values()))


def _saved_in(function: Any) -> Iterator[Any]:
    """What a C++ graph has saved."""
    stack, seen = [function], set()
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        for name in dir(function):
            if name.startswith("_saved_"):
                saved = getattr(function, name)
                for item in saved if isinstance(saved, list | tuple) else (saved,):
                    if isinstance(item, LeafTensor):
                        yield item.value
        stack.extend(parent for parent, _ in function.next_functions)
