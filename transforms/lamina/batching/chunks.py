"""How the outputs of chunks become one: in one tensor that is filled, where that is sound.

Parts that are kept until the last is there, and then concatenated, take twice the room of the
result, which for gradients per example is most of the memory there is.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.errors import StructureError, message
from lamina_core.wrapper import LevelTensor

__all__ = ["Gathered"]

_CLASSES = LevelTensor.classes


class Gathered:
    """One output, chunk after chunk.

    Args:
        dim: Where the batch dim of the output is; None for one that all examples share.
        size: The batch size of all chunks together.
    """

    __slots__ = ("dim", "filled", "parts", "size", "whole")

    def __init__(self, dim: int | None, size: int) -> None:
        self.dim, self.size = dim, size
        self.parts: list[Any] = []
        self.whole: Any = None
        self.filled = 0

    def add(self, part: Any) -> None:
        """Take the output of the next chunk.

        Raises:
            StructureError: If it is no tensor, and another value than for the first chunk.
        """
        if self.dim is None or not isinstance(part, torch.Tensor):
            self.parts = self.parts or [part]
            if not isinstance(part, torch.Tensor) and not _is_same(part, self.parts[0]):
                raise StructureError(
                    message(
                        f"an output that is no tensor differs between chunks: {self.parts[0]!r} "
                        f"and {part!r}",
                        "to fix: return a tensor, or leave chunk_size out",
                    )
                )
            return
        if self.whole is None and not self.parts and _is_plain(part):
            shape = list(part.shape)
            shape[self.dim] = self.size
            self.whole = part.new_empty(shape)
        if self.whole is None:
            self.parts.append(part)
            return
        count = part.shape[self.dim]
        place = self.whole.narrow(self.dim, self.filled, count)
        if not _is_plain(part) or place.shape != part.shape or place.dtype != part.dtype:
            # A function of more than its arguments: `cat` tells what fits, and what does not.
            self.parts = [self.whole.narrow(self.dim, 0, self.filled), part]
            self.whole = None
            return
        place.copy_(part)
        self.filled += count

    def result(self) -> Any:
        """The output of all chunks."""
        if self.whole is not None:
            return self.whole
        if self.dim is None or not isinstance(self.parts[0], torch.Tensor):
            return self.parts[0]
        return torch.cat(self.parts, self.dim)


def _is_same(part: Any, first: Any) -> bool:
    """Whether two numbers or strings are the same; of other objects nobody knows."""
    if not isinstance(part, (int, float, complex, str)):
        return True
    return type(part) is type(first) and (part == first or part != part)


def _is_plain(part: Any) -> bool:
    """Whether nothing follows what happens to a tensor, so that writing into another is a copy."""
    return type(part) not in _CLASSES and not part.requires_grad
