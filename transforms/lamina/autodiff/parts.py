"""Cotangents of parts: what a view such as `x[i]` sends back to `x`, without all the zeros.

The transpose of `x[i]` puts its cotangent into zeros of the shape of `x`. A loop over the n rows of
`x` would make n tensors of that size and add them up: n^2 work. A `Part` says instead where its
cotangent belongs, and a sum of parts is written into one buffer.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.overloads import aten

__all__ = ["PARTS", "Part", "add_parts", "part_pullback", "whole"]

Tensor = torch.Tensor

# Views of one region each, whose elements lie apart.
PARTS = frozenset(
    (
        aten.diagonal.default,
        aten.select.int,
        aten.slice.Tensor,
    )
)


class Part:
    """A cotangent that is zero outside a region.

    Attributes:
        ct: The cotangent of the region, a plain tensor.
        view: `view(whole, *rest)` is the region.
        rest: Its further arguments.
        transpose: Puts a cotangent of the region into zeros.
        saved: What that needs besides.
    """

    __slots__ = ("ct", "rest", "saved", "transpose", "view")

    def __init__(self, ct: Any, view: Any, rest: Any, transpose: Any, saved: Any) -> None:
        self.ct = ct
        self.view = view
        self.rest = rest
        self.transpose = transpose
        self.saved = saved


def part_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    """Residuals: view, its arguments, the transpose, what that needs."""
    view, rest, transpose, *saved = residuals
    if type(ct) is Tensor and not ct.requires_grad:
        return (Part(ct, view, rest, transpose, saved),)
    return (transpose(ct, *saved),)


def whole(ct: Any) -> Any:
    """A cotangent as a tensor."""
    return ct.transpose(ct.ct, *ct.saved) if type(ct) is Part else ct


def add_parts(known: Any, ct: Any, owned: set[int]) -> Any:
    """The sum of two cotangents, of which one is a part at least; its buffer is ours if it can be.

    Args:
        known: What has been received so far.
        ct: What is added.
        owned: The ids of sums whose buffer is ours to write to.
    """
    if type(known) is not Part and type(ct) is Part and id(known) not in owned:
        known, ct = ct, known
    total = whole(known)
    if type(ct) is Part:
        ct.view(total, *ct.rest).add_(ct.ct)
    elif type(ct) is Tensor and not ct.requires_grad:
        total.add_(ct)
    else:
        return total + ct
    owned.add(id(total))
    return total
