"""The tape: nodes that remember how to pull a cotangent back, and the pass that walks them.

A tape is not a list. Each `TrackedTensor` refers to the node that made it, a node to its parents;
what no output depends on is freed at once. The pass visits nodes in decreasing sequence number, so
every node has received all its cotangents when its turn comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import torch

from lamina.autodiff import saved as _saved
from lamina.autodiff.hooks import GradFn
from lamina.autodiff.leaf import LeafTensor
from lamina.autodiff.likeness import Likeness
from lamina.autodiff.parts import Part, add_parts, whole
from lamina_core.config import config
from lamina_core.errors import AnomalyError, MutationError, RuleError, message
from lamina_core.outer import autocast_off
from lamina_core.torch_hooks.modes import disable_modes
from lamina_core.views import stamp
from lamina_core.wrapper import LevelTensor, plain_of, shares_memory

__all__ = ["Node", "accumulate", "backward", "move_residuals"]

_sequence = itertools.count(1)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_CLASSES = LevelTensor.classes
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
        hooks: What user code wants to be called with, or None.
        versions: What `stamp` says of the residuals that are tensors, to notice writes to them.
        primals: Under `config.debug` what is known of each output; else it is not set.
    """

    __slots__ = (
        "hooks",
        "name",
        "needs",
        "outputs",
        "parents",
        "primals",
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
        versions: Sequence[Any] | None = None,
    ) -> None:
        self.name = name
        self.pullback = pullback
        self.hooks: Any = None
        if _saved.active:
            residuals = _saved.pack(residuals)
            if isinstance(residuals, _saved.Packed):
                versions = ()
        self.residuals: Any = residuals
        self.needs = needs
        self.parents = parents
        self.outputs = outputs
        self.sequence = next(_sequence)
        self.versions = _versions(residuals) if versions is None else versions

    primals: dict[int, Likeness]

    def note(self, index: int, primal: Likeness) -> None:
        """Remember what an output is like, for `config.debug` to compare its cotangent with."""
        if not hasattr(self, "primals"):
            self.primals = {}
        self.primals[index] = primal


def _written_over(node: Node, residual: Any) -> MutationError:
    """The error for a residual that has been written to since it was saved."""
    return MutationError(
        message(
            f"a tensor that the gradient of {node.name} needs was written to in place",
            f"it has the shape {list(residual.shape)}",
            "to fix: write to a clone of it",
        )
    )


def _versions(residuals: Any) -> list[Any]:
    # HOT: for plain tensors, the stamp without a call.
    try:
        return [
            r._version if type(r) in _PLAIN else stamp(r) if type(r) in _CLASSES else None
            for r in residuals
        ]
    except RuntimeError:  # inference tensors have no version to ask for
        return [stamp(r) if type(r) in _PLAIN or type(r) in _CLASSES else None for r in residuals]


def accumulate(into: list[Any], index: int, ct: Any, owned: set[int]) -> None:
    """Add a cotangent to what an output has received; in place once the sum's buffer is ours."""
    known = into[index]
    if known is None:
        into[index] = ct
    elif type(ct) is Part or type(known) is Part:
        into[index] = add_parts(known, ct, owned)
    elif id(known) in owned and type(ct) is Tensor and not ct.requires_grad:
        known.add_(ct)
    else:
        total = known + ct
        owned.discard(id(known))
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

    Autocast does not act on the ops of the pass: each has the dtypes of the op it belongs to.

    Args:
        outputs: The tape position of each output, None for one that is constant.
        cotangents: One per output, None for zero.
        inputs: The nodes whose cotangents are wanted.
        release: Whether to drop residuals as the pass goes; the tape cannot be walked again then.
    """
    with autocast_off():
        return _walk(outputs, cotangents, inputs, release)


def _walk(
    outputs: Sequence[tuple[Node, int] | None],
    cotangents: Sequence[Any],
    inputs: Sequence[Node],
    release: bool,
) -> list[Any]:
    results: dict[int, Any] = dict.fromkeys(node.sequence for node in inputs)
    pending: dict[int, tuple[Node, list[Any]]] = {}
    heap: list[int] = []
    owned: set[int] = set()

    def send(node: Node, index: int, ct: Any) -> None:
        sequence = node.sequence
        entry = pending.get(sequence)
        if entry is not None:
            accumulate(entry[1], index, ct, owned)
            return
        if node.outputs == 1:
            received = [ct]
        else:
            received = [None] * node.outputs
            received[index] = ct
        pending[sequence] = (node, received)
        heappush(heap, -sequence)

    for position, ct in zip(outputs, cotangents, strict=True):
        if position is not None and ct is not None:
            send(*position, ct)
    group = None
    watches = torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()
    checks = config.debug or watches
    ct = received = residuals = cts = None  # whatever is named here would live through the pass
    while heap:
        sequence = -heappop(heap)
        node, received = pending.pop(sequence)
        pullback = node.pullback
        if pullback is None:
            if sequence in results:
                ct = whole(received[0])
                results[sequence] = ct if node.hooks is None else node.hooks.on_outputs([ct])[0]
                ct = None
            owned.discard(id(received[0]))
            continue
        residuals = node.residuals
        if residuals is None:
            raise RuleError(f"the tape of {node.name} has been released by an earlier pass")
        if type(residuals) is _saved.Packed:
            group = group or _saved.new_group()
            residuals = residuals.unpack(group)
        for residual, version in zip(residuals, node.versions):  # noqa: B905 - HOT
            if version is not None and version != (
                residual._version if type(residual) in _PLAIN else stamp(residual)
            ):
                raise _written_over(node, residual)
        residual = None
        for i, ct in enumerate(received):
            if type(ct) is Part:
                received[i] = whole(ct)
        if node.hooks is not None:
            received = node.hooks.on_outputs(received)
        cts = pullback(residuals, node.needs, *received)
        if node.hooks is not None:
            cts = node.hooks.on_operands(cts, received)
        if owned:
            # The sums whose buffer is ours end here: an id may be used again from now on.
            for ct in received:
                owned.discard(id(ct))
        received = None
        if release:
            node.residuals = residuals = None
        if checks:
            if config.debug:
                _check(node, cts)
            if watches:
                _look_for_nan(node, cts)
        for parent, ct in zip(node.parents, cts):  # noqa: B905 - HOT
            if parent is not None and ct is not None:
                send(*parent, ct)
        cts = ct = None
    return [results[node.sequence] for node in inputs]


def _check(node: Node, cts: Sequence[Any]) -> None:
    """What LAMINA_DEBUG=1 holds against every answer of a pullback."""
    if len(cts) != len(node.needs):
        raise RuleError(
            f"the pullback of {node.name} gave {len(cts)} cotangents for {len(node.needs)} operands"
        )
    for i, (parent, ct) in enumerate(zip(node.parents, cts, strict=True)):
        if parent is None or ct is None:
            continue
        primal = getattr(parent[0], "primals", {}).get(parent[1])
        if primal is not None and type(ct) is not Part:  # which would have to be filled with zeros
            fault = primal.fault(ct)
            if fault is not None:
                raise RuleError(
                    message(
                        f"a wrong answer of the pullback of {node.name}",
                        f"the cotangent of operand {i} {fault}",
                    )
                )


def _look_for_nan(node: Node, cts: Sequence[Any]) -> None:
    """What `torch.autograd.detect_anomaly` asks of every answer of a pullback.

    What has no elements has no NaN, and what a mode traces or counts is not its affair.
    """
    for i, ct in enumerate(cts):
        plain: Any = None if ct is None else plain_of(whole(ct))
        if type(plain) not in _PLAIN or plain.is_meta:
            continue
        with disable_modes():
            found = bool(plain.isnan().any())
        if found:
            raise AnomalyError(
                message(
                    f"the pullback of {node.name} ({GradFn(node).name()}) gave NaN",
                    f"for operand {i}, of shape {list(ct.shape)}",
                    "to fix: keep its operand away from where the derivative is not finite, "
                    "or mask it before the op (a mask behind it multiplies by 0 too late)",
                )
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
