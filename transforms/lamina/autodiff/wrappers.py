"""`TrackedTensor` (reverse mode) and `DualTensor` (forward mode)."""

from __future__ import annotations

from typing import Any

from lamina.autodiff.tape import Node
from lamina_core.wrapper import LevelTensor, box

__all__ = ["DualTensor", "TrackedTensor", "dual", "track"]


class TrackedTensor(LevelTensor):
    """A value and the place on the tape where it was computed.

    Attributes:
        node: The node that made it, or None for a constant.
        index: Which output of the node it is.
    """

    node: Node | None
    index: int

    def describe(self) -> str:
        """Level and op, for the repr."""
        made_by = "constant" if self.node is None else f"by={self.node.name}"
        return f"level={self.interpreter.level}, {made_by}"


class DualTensor(LevelTensor):
    """A primal (`value`) and a tangent of the same shape; None is the zero tangent."""

    tangent: Any

    def describe(self) -> str:
        """Level, and whether there is a tangent, for the repr."""
        kind = "constant" if self.tangent is None else "dual"
        return f"level={self.interpreter.level}, {kind}"


def track(interpreter: Any, value: Any, node: Node | None, index: int = 0) -> TrackedTensor:
    """Box a value at the level of a reverse-mode interpreter."""
    stride = None if value.is_contiguous() else value.stride()
    out = box(TrackedTensor, value, value.shape, stride)
    out.interpreter = interpreter
    out.value = value
    out.node = node
    out.index = index
    return out  # type: ignore[no-any-return]


def dual(interpreter: Any, value: Any, tangent: Any) -> DualTensor:
    """Box a primal and its tangent at the level of a forward-mode interpreter."""
    stride = None if value.is_contiguous() else value.stride()
    out = box(DualTensor, value, value.shape, stride)
    out.interpreter = interpreter
    out.value = value
    out.tangent = tangent
    return out  # type: ignore[no-any-return]
