"""The tape: nodes that remember how to pull a cotangent back, and the pass that walks them.

A tape is not a list. Each `TrackedTensor` refers to the node that made it, a node to its parents;
what no output depends on is freed at once. The pass visits nodes in decreasing sequence number, so
every node has received all its cotangents when its turn comes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lamina.autodiff.leaf import LeafTensor
from lamina_core.config import config
from lamina_core.errors import MutationError, RuleError, message
from lamina_core.wrapper import shares_memory

__all__ = ["Node", "accumulate", "backward", "move_residuals"]

_sequence = itertools.count(1)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
Tensor = torch.Tensor

# (residuals, needs, *cotangents) -> one cotangent or None per tensor operand
Pullback = Callable[..., Sequence[Any]]


class Node:
    """One op on the tape, or (without a pullback) an input.

    Attributes:
        name: The op, for messages.
        pullback: `(residuals, needs, *cotangents)` -> one entry per tensor operand of the op.
        residuals: What the pullback needs, explicitly: this is all the memory a node keeps.
        needs: Which tensor operands want a cotangent.
        parents: For each operand that does, `(node, output index)`; None for the others.
        outputs: How many outputs the op has.
        versions: Versions of the residuals that are plain tensors, to notice writes to them.
    """

    __slots__ = (
        "name",
        "needs",
        "outputs",
        "parents",
        "pullback",
        "residuals",
        "sequence",
        "versions",
    )

    def __init__(
        self,
        name: Any,
        pullback: Pullback | None,
        residuals: tuple[Any, ...],
        needs: tuple[bool, ...],
        parents: tuple[tuple[Node, int] | None, ...],
        outputs: int = 1,
    ) -> None:
        self.name = name
        self.pullback = pullback
        self.residuals: tuple[Any, ...] | None = residuals
        self.needs = needs
        self.parents = parents
        self.outputs = outputs
        self.sequence = next(_sequence)
        self.versions = _versions(residuals)

    def check_residuals(self) -> None:
        """Raise where a residual has been written to since it was saved."""
        for position, (residual, version) in enumerate(
            zip(self.residuals or (), self.versions, strict=True)
        ):
            if version is not None and residual._version != version:
                raise MutationError(
                    message(
                        f"a tensor that the gradient of {self.name} needs was written to in place",
                        f"residual {position} of shape {list(residual.shape)}: version "
                        f"{residual._version}, saved at version {version}",
                        "to fix: write to a clone of it",
                    )
                )


def _versions(residuals: Any) -> list[int | None]:
    try:
        return [r._version if type(r) in _PLAIN else None for r in residuals]
    except RuntimeError:
        # Inference tensors keep no version; nothing can be noticed for them.
        return [
            r._version if type(r) in _PLAIN and not r.is_inference() else None for r in residuals
        ]


def accumulate(into: list[Any], index: int, ct: Any, owned: set[int]) -> None:
    """Add a cotangent to what an output has received; in place once the sum's buffer is ours."""
    known = into[index]
    if known is None:
        into[index] = ct
    elif id(known) in owned and type(ct) is Tensor and not ct.requires_grad:
        known.add_(ct)
    else:
        total = known + ct
        into[index] = total
        if type(total) is Tensor and not total.requires_grad:
            owned.add(id(total))


def backward(
    outputs: Sequence[tuple[Node, int] | None],
    cotangents: Sequence[Any],
    inputs: Sequence[Node],
    *,
    release: bool,
) -> list[Any]:
    """Pull cotangents of outputs back to inputs; None where an input has no influence.

    Args:
        outputs: The tape position of each output, None for one that is constant.
        cotangents: One per output, None for zero.
        inputs: The nodes whose cotangents are wanted.
        release: Whether to drop residuals as the pass goes; the tape cannot be walked again then.
    """
    results: dict[int, Any] = dict.fromkeys(node.sequence for node in inputs)
    pending: dict[int, tuple[Node, list[Any]]] = {}
    heap: list[int] = []
    owned: set[int] = set()

    def send(position: tuple[Node, int], ct: Any) -> None:
        node, index = position
        entry = pending.get(node.sequence)
        if entry is None:
            received: list[Any] = [None] * node.outputs
            received[index] = ct
            pending[node.sequence] = (node, received)
            heapq.heappush(heap, -node.sequence)
        else:
            accumulate(entry[1], index, ct, owned)

    for position, ct in zip(outputs, cotangents, strict=True):
        if position is not None and ct is not None:
            send(position, ct)
    position = ct = None
    while heap:
        sequence = -heapq.heappop(heap)
        node, received = pending.pop(sequence)
        if node.pullback is None:
            if sequence in results:
                results[sequence] = received[0]
            continue
        residuals = node.residuals
        if residuals is None:
            raise RuleError(f"the tape of {node.name} has been released by an earlier pass")
        if node.versions:
            node.check_residuals()
        cts = node.pullback(residuals, node.needs, *received)
        # The sums whose buffer is ours end here: an id may be used again from now on.
        for ct in received:
            owned.discard(id(ct))
        received = ct = None  # type: ignore[assignment]
        if release:
            node.residuals = residuals = None
        if config.debug:
            _check(node, cts)
        for parent, ct in zip(node.parents, cts, strict=True):
            if parent is not None and ct is not None:
                send(parent, ct)
        cts = ct = None  # type: ignore[assignment]
    return [results[node.sequence] for node in inputs]


def _check(node: Node, cts: Sequence[Any]) -> None:
    """What LAMINA_DEBUG=1 holds against every answer of a pullback."""
    if len(cts) != len(node.needs):
        raise RuleError(
            f"the pullback of {node.name} gave {len(cts)} cotangents for {len(node.needs)} operands"
        )


def move_residuals(outputs: Sequence[tuple[Node, int] | None], target: Any) -> None:
    """Clone the residuals that share memory with `target`, which is about to be overwritten."""
    seen: set[int] = set()
    stack = [position[0] for position in outputs if position is not None]
    while stack:
        node = stack.pop()
        if node.sequence in seen:
            continue
        seen.add(node.sequence)
        stack.extend(parent[0] for parent in node.parents if parent is not None)
        if node.residuals:
            node.residuals = tuple([_moved(r, target) for r in node.residuals])
            node.versions = _versions(node.residuals)


def _moved(residual: Any, target: Any) -> Any:
    if isinstance(residual, (list, tuple)):
        moved = [_moved(item, target) for item in residual]
        return moved if type(residual) is list else tuple(moved)
    if not isinstance(residual, Tensor):
        return residual
    if isinstance(residual, LeafTensor):
        # C++ autograd holds the leaf itself, so the value inside is what can be moved.
        residual.value = _moved(residual.value, target)
        return residual
    return residual.clone() if shares_memory(residual, target) else residual
