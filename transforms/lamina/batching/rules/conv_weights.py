"""The cotangent of a convolution's weight where each example has its own, and how it is computed.

    w_ct[i, j, k] = sum over n, s of still[n, i, s] * moving[n, j, stride * s + dilation * k]

`still` is the cotangent of the output and `moving` the padded input; a transposed convolution has
them the other way round. Three forms, of which the one that should cost least is taken:

* *grouped*: one convolution with as many groups as there are examples;
* *windows*: a copy of `moving` with the window of every output position, and one matrix product;
* *rows*: windows along all spatial dims but the first. Along the first a row of the kernel is an
  offset in that copy: a smaller copy, but a matrix product for each row.

The costs are those of a CPU. Elsewhere the grouped form is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Correlation", "Plan", "by_rows", "by_windows", "cheapest", "correlation", "run"]

# What an element that is written or copied costs, in multiply-adds of a matrix product, and how
# many columns of a product are computed at a time. On 1020 random layers what is chosen takes 1.08
# times what the best form takes; with 16 to 48 and 4 to 16 in place of these, 1.07 to 1.09 times.
_MOVE = 32
_VECTOR = 8
# Without oneDNN's blocked kernels, which take channels by eights, a grouped convolution loses to
# both other forms nearly everywhere; so it does to a plain product where the kernel has one place.
_BLOCK = 8
# For one channel in a group oneDNN has a kernel of its own, fast for this window.
_DEPTHWISE = (3, 3)
# Elements that a copy may have, more being done in chunks of examples: 4 MB stay in the cache.
_CHUNK = 2**20


class Correlation(NamedTuple):
    """Sizes of the sum above, for one example. Lists have one entry for each spatial dim.

    Attributes:
        images: how many n there are.
        rows: how many i, in all groups.
        columns: how many j, in all groups.
        groups: i and j are divided into these.
        kernel: how many k.
        places: how many s.
        stride: of the convolution.
        padding: in front of `moving`. Behind it there is what the last window needs.
        dilation: of the convolution.
    """

    images: int
    rows: int
    columns: int
    groups: int
    kernel: Sequence[int]
    places: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


Form = Callable[[Correlation, Any, Any], Any]


class Plan(NamedTuple):
    """A form, and how many examples it is to do at a time."""

    form: Form
    count: int


def correlation(still: Any, moving: Any, shape: Any, rest: Any, groups: int) -> Correlation:
    """The sizes for operands with their batch dim first, of which `moving` has no padding yet.

    `shape` is that of one example's weight; `rest` starts with stride, padding and dilation.
    """
    kernel = shape[2:]
    lists = (list(entries) * (len(kernel) // len(entries)) for entries in rest[:3])
    return Correlation(
        still.shape[1], still.shape[2], moving.shape[2], groups, kernel, still.shape[3:], *lists
    )


def cheapest(c: Correlation, like: Any, size: int) -> Plan | None:
    """The form that should cost least, or None for the grouped one.

    `like` is an operand of the `size` examples: its device and dtype are what counts.
    """
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return None
    rows, columns = c.rows // c.groups, c.columns // c.groups
    window, places = math.prod(c.kernel), math.prod(c.places)
    if not size * c.images * rows * columns * window * places:
        return None
    out = rows * columns * window
    blocked = False
    if like.dtype == torch.float32:
        if rows == columns == 1 and tuple(c.kernel) == _DEPTHWISE:
            return None
        blocked = window > 1 and rows % _BLOCK == 0 == columns % _BLOCK
    grouped = out * places * c.images + _MOVE * out if blocked else math.inf

    copy = columns * window * places
    if window == 1 and max(c.stride) == 1 and c.images == 1:
        copy = 0  # a view
    gathered = rows * places if c.images > 1 else 0
    windows = c.images * (rows * places * _whole(columns * window) + _MOVE * (copy + gathered))

    height = c.kernel[0]
    part = copy // height * c.stride[0]
    products = height * rows * places * _whole(columns * window // height)
    rowwise = c.images * (products + _MOVE * (part + out))

    if grouped <= min(windows, rowwise):
        return None
    form, copied = (by_windows, copy) if windows <= rowwise else (by_rows, part)
    count = _CHUNK // (copied * c.images * c.groups) if copied else size
    return Plan(form, max(count, 1))


def _whole(columns: int) -> int:
    """Columns with the idle ones of the last vector."""
    return -(-columns // _VECTOR) * _VECTOR


def run(plan: Plan, c: Correlation, still: Any, moving: Any) -> Any:
    """[B, N, I, *S], [B, N, J, *T] -> [B, I, J / groups, *K], as planned."""
    if plan.count >= still.shape[0]:
        return plan.form(c, still, moving)
    parts = zip(still.split(plan.count), moving.split(plan.count), strict=True)
    return torch.cat([plan.form(c, *part) for part in parts])


def by_windows(c: Correlation, still: Any, moving: Any) -> Any:
    """[B, N, I, *S], [B, N, J, *T] -> [B, I, J / groups, *K]: one product over all N and S."""
    size, rank = still.shape[0], len(c.kernel)
    windows = _unfolded(c, _padded(c, moving, _extents(c)), 0, 3)
    behind = range(3 + rank, 3 + 2 * rank)
    windows = windows.permute(0, 2, *behind, 1, *range(3, 3 + rank))
    batch, places, columns = size * c.groups, math.prod(c.places), c.columns // c.groups
    windows = _matrices(windows, batch, columns * math.prod(c.kernel), c.images * places)
    still = _matrices(still.transpose(1, 2), batch, c.rows // c.groups, c.images * places)
    return torch.bmm(still, windows.mT).reshape(size, c.rows, columns, *c.kernel)


def by_rows(c: Correlation, still: Any, moving: Any) -> Any:
    """[B, N, I, *S], [B, N, J, *T] -> [B, I, J / groups, *K]: a product for each row of K.

    With stride s the rows of `moving` are put in s phases, [0, s, 2s ...], [1, s + 1, ...] and so
    on: the rows that one row of the kernel meets are then next to each other.
    """
    size, rank = still.shape[0], len(c.kernel)
    stride, dilation = c.stride[0], c.dilation[0]
    extents = _extents(c)
    depth = -(-extents[0] // stride)
    moving = _padded(c, moving, [depth * stride, *extents[1:]])
    windows = _unfolded(c, moving, 1, 3).unflatten(3, (depth, stride))
    behind = range(4 + rank, 3 + 2 * rank)
    windows = windows.permute(0, 1, 2, *behind, 4, 3, *range(5, 4 + rank))
    width, places = math.prod(c.places[1:]), math.prod(c.places)
    batch, columns = size * c.images * c.groups, c.columns // c.groups
    height, *others = c.kernel
    windows = _matrices(windows, batch, columns * math.prod(others), stride * depth * width)
    still = _matrices(still, batch, c.rows // c.groups, places)
    outs = []
    for k in range(height):
        row, phase = divmod(k * dilation, stride)
        met = windows.narrow(2, (phase * depth + row) * width, places)
        out = torch.bmm(still, met.mT).reshape(size, c.images, c.rows, columns, *others)
        outs.append(out.sum(1) if c.images > 1 else out.squeeze(1))
    return torch.stack(outs, 3)


def _matrices(x: Any, *shape: int) -> Any:
    """A reshape that is never a view of overlapping windows, or of one number in many places.

    `bmm` copies such matrices one after the other.
    """
    return x.reshape(shape).contiguous()


def _extents(c: Correlation) -> list[int]:
    """How much of each spatial dim of the padded `moving` is met by any window."""
    return [
        (places - 1) * stride + (kernel - 1) * dilation + 1
        for places, stride, kernel, dilation in zip(
            c.places, c.stride, c.kernel, c.dilation, strict=True
        )
    ]


def _padded(c: Correlation, moving: Any, extents: Sequence[int]) -> Any:
    """`moving` with its padding, filled up to the extents or cut off there, which is a view."""
    amounts: list[int] = []
    for at, (padding, extent) in enumerate(zip(c.padding, extents, strict=True), 3):
        amounts = [padding, max(extent - padding - moving.shape[at], 0), *amounts]
    if any(amounts):
        moving = torch.nn.functional.pad(moving, amounts)
    for at, extent in enumerate(extents, 3):
        moving = moving.narrow(at, 0, extent)
    return moving


def _unfolded(c: Correlation, moving: Any, start: int, front: int) -> Any:
    """A view with the places in the spatial dims from `start` on, and their kernels at the end."""
    rank = len(c.kernel)
    for dim in range(start, rank):
        length = (c.kernel[dim] - 1) * c.dilation[dim] + 1
        moving = moving.unfold(front + dim, length, c.stride[dim])
        if c.dilation[dim] > 1:
            moving = moving[..., :: c.dilation[dim]]
    return moving
