"""What rules that ask for symbolic zeros are told: `SymbolicZero`, `Primal`."""

from __future__ import annotations

from typing import Any, NamedTuple

from lamina_core.user_function import Meta

__all__ = ["Primal", "SymbolicZero", "filled", "returned"]


class SymbolicZero:
    """Stands for a tangent or cotangent that is zero; a rule returns one, or None, for its own.

    Attributes:
        shape: The shape it would have.
        dtype: The dtype it would have.
        device: The device it would be on.

    Example:
        >>> import torch
        >>> from lamina import SymbolicZero
        >>> SymbolicZero(torch.ones(2))
        SymbolicZero(shape=[2], dtype=torch.float32)
    """

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, like: Any) -> None:
        self.shape = like.shape
        self.dtype = like.dtype
        self.device = like.device

    def __repr__(self) -> str:
        return f"SymbolicZero(shape={list(self.shape)}, dtype={self.dtype})"


class Primal(NamedTuple):
    """What a `fwd` that asks for symbolic zeros gets for each leaf of its arguments.

    Attributes:
        value: The leaf.
        perturbed: Whether anything is differentiated with respect to it.
    """

    value: Any
    perturbed: bool


def filled(given: Any, meta: Meta | None, *, symbolic: bool) -> Any:
    """A cotangent or tangent as a rule gets it: zero in the form that it wants."""
    if given is not None or meta is None or not meta.differentiable:
        return given
    return SymbolicZero(meta) if symbolic else meta.zeros()


def returned(leaf: Any) -> Any:
    """One leaf that a rule returned, None for a symbolic zero."""
    return None if isinstance(leaf, SymbolicZero) else leaf
