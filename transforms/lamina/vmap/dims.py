"""All arithmetic on batch dims.

Words: a *logical* dim counts the dims that user code sees, a *physical* one those of the value. In
names, `x_bdim` is the physical position of the batch dim of `x`, or None if `x` is not batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "batch_first",
    "batch_size_of",
    "ensure_batched",
    "fold",
    "logical_rank",
    "logical_shape",
    "move_batch",
    "normalize",
    "pad_rank",
    "physical",
    "physical_dims",
    "unfold",
]


def normalize(dim: int, rank: int) -> int:
    """A dim counted from the front; a 0-d tensor is treated as having one dim, as ATen does.

    Raises:
        IndexError: If the tensor has no such dim, with PyTorch's own words.
    """
    limit = max(rank, 1)
    if not -limit <= dim < limit:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-limit}, {limit - 1}], "
            f"but got {dim})"
        )
    return dim % limit


def logical_rank(x: Any, x_bdim: int | None) -> int:
    """How many dims user code sees."""
    rank: int = x.dim()
    return rank if x_bdim is None else rank - 1


def logical_shape(x: Any, x_bdim: int | None) -> tuple[int, ...]:
    """The shape that user code sees."""
    shape = tuple(x.shape)
    return shape if x_bdim is None else shape[:x_bdim] + shape[x_bdim + 1 :]


def physical(dim: int, x: Any, x_bdim: int | None) -> int:
    """The dim of the value that a logical dim stands for."""
    dim = normalize(dim, logical_rank(x, x_bdim))
    return dim if x_bdim is None or dim < x_bdim else dim + 1


def physical_dims(dims: Sequence[int], x: Any, x_bdim: int | None) -> list[int]:
    """`physical` for several dims."""
    return [physical(dim, x, x_bdim) for dim in dims]


def batch_first(x: Any, x_bdim: int | None) -> Any:
    """A value with its batch dim first; an unbatched one as it is."""
    return x if x_bdim is None or x_bdim == 0 else x.movedim(x_bdim, 0)


def move_batch(x: Any, x_bdim: int | None, to: int) -> Any:
    """A value with its batch dim at physical position `to`."""
    return x if x_bdim is None or x_bdim == to else x.movedim(x_bdim, to)


def ensure_batched(x: Any, x_bdim: int | None, size: int) -> Any:
    """A value with a batch dim at the front, expanded (not copied) if it had none."""
    return x.expand(size, *x.shape) if x_bdim is None else batch_first(x, x_bdim)


def pad_rank(x: Any, x_bdim: int | None, rank: int) -> Any:
    """A value ready for broadcasting: batch dim first, then 1s, then the logical dims up to `rank`."""
    if x_bdim is None:
        return x
    x = batch_first(x, x_bdim)
    missing = rank + 1 - x.dim()
    if missing <= 0:
        return x
    return x.reshape(x.shape[0], *([1] * missing), *x.shape[1:])


def batch_size_of(values: Sequence[Any], in_dims: Sequence[int | None]) -> int:
    """The batch size that the batched values share."""
    for value, bdim in zip(values, in_dims, strict=True):
        if bdim is not None:
            return int(value.shape[bdim])
    raise AssertionError("no batched value")


def fold(x: Any, x_bdim: int | None, into: int, size: int) -> Any:
    """Merge the batch dim into logical dim `into`: [B, *S] -> [*S with S[into] * B].

    The batch varies slowest inside the merged dim. An unbatched `x` is expanded first.
    """
    x = ensure_batched(x, x_bdim, size)
    x = x.movedim(0, into)
    shape = x.shape
    return x.reshape(*shape[:into], shape[into] * shape[into + 1], *shape[into + 2 :])


def unfold(x: Any, dim: int, size: int) -> Any:
    """Undo `fold`: split physical dim `dim` into [size, rest]; the batch dim is then `dim`."""
    shape = x.shape
    rest = shape[dim] // size if size else 0
    return x.reshape(*shape[:dim], size, rest, *shape[dim + 1 :])
