"""All arithmetic on batch dims.

Words: a *logical* dim counts the dims that user code sees, a *physical* one those of the value. In
names, `x_bdim` is the physical position of the batch dim of `x`, or None if `x` is not batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "EmptyBatchError",
    "align",
    "at_least_1d",
    "batch_first",
    "behind_batch",
    "ensure_batched",
    "fold",
    "fold_behind",
    "from_end",
    "infer_size",
    "leading_dims",
    "logical_dims",
    "logical_rank",
    "logical_shape",
    "move_batch",
    "normalize",
    "pad_rank",
    "physical",
    "physical_dims",
    "physical_size",
    "shifted",
    "unfold",
    "unfold_behind",
    "without",
]


class EmptyBatchError(Exception):
    """A rule folds a batch dim of size 0 into another, from which the other is not got back.

    Or the examples are empty, and the op takes such a one alone only.
    The op is then run as by the loop, which learns the shapes of its outputs from one example.
    """


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
    # HOT: no calls for a dim that is in range.
    rank = x.dim() if x_bdim is None else x.dim() - 1
    at = dim if dim >= 0 else dim + rank
    if not 0 <= at < rank:
        at = normalize(dim, rank)
    return at if x_bdim is None or at < x_bdim else at + 1


def physical_dims(dims: Sequence[int], x: Any, x_bdim: int | None) -> list[int]:
    """`physical` for several dims."""
    return [physical(dim, x, x_bdim) for dim in dims]


def logical_dims(x: Any, x_bdim: int | None) -> list[int]:
    """All physical dims but the batch dim."""
    return [dim for dim in range(x.dim()) if dim != x_bdim]


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
    """A value ready for broadcasting: batch dim first, 1s, then the logical dims up to `rank`."""
    if x_bdim is None:
        return x
    x = batch_first(x, x_bdim)
    missing = rank + 1 - x.dim()
    if missing <= 0:
        return x
    return x.reshape(x.shape[0], *([1] * missing), *x.shape[1:])


def fold(x: Any, x_bdim: int | None, into: int, size: int) -> Any:
    """Merge the batch dim into logical dim `into`: [B, *S] -> [*S with S[into] * B].

    The batch varies slowest inside the merged dim. An unbatched `x` is repeated.
    """
    if size == 0:
        raise EmptyBatchError
    repeated = x_bdim is None
    x = ensure_batched(x, x_bdim, size)
    x = x.movedim(0, into)
    shape = x.shape
    x = x.reshape(*shape[:into], shape[into] * shape[into + 1], *shape[into + 2 :])
    # Next to a dim of size 1 the repetition is a view of stride 0, which not all kernels can read.
    return x.contiguous() if repeated else x


def unfold(x: Any, dim: int, size: int) -> Any:
    """Undo `fold`: split physical dim `dim` into [size, rest]; the batch dim is then `dim`."""
    if size == 0:
        raise EmptyBatchError
    shape = x.shape
    return x.reshape(*shape[:dim], size, shape[dim] // size, *shape[dim + 1 :])


def behind_batch(dim: int, rank: int) -> int:
    """The dim of a value with its batch dim first that logical dim `dim` of `rank` stands for."""
    return normalize(dim, rank) + 1


def without(x_bdim: int, *gone: int) -> int:
    """Where the batch dim is once the physical dims `gone` have been removed."""
    return x_bdim - sum(at < x_bdim for at in gone)


def at_least_1d(x: Any, x_bdim: int | None) -> Any:
    """A value whose logical rank is at least 1: a logical 0-d one gets a dim of size 1 at the end.

    ATen lets `dim=0` and `dim=-1` speak of a 0-d tensor.
    """
    return x.unsqueeze(-1) if logical_rank(x, x_bdim) == 0 else x


def physical_size(size: Sequence[int], x_bdim: int, entry: int) -> list[int]:
    """A logical size with `entry` put in at the batch dim."""
    return [*size[:x_bdim], entry, *size[x_bdim:]]


def infer_size(size: Sequence[int], numel: int) -> list[int]:
    """A size with its -1, if any, replaced by what makes it hold `numel` elements.

    Raises:
        RuntimeError: If `size` cannot hold that many elements.
    """
    known = 1
    for entry in size:
        known *= 1 if entry == -1 else entry
    unknown = [i for i, entry in enumerate(size) if entry == -1]
    fits = numel % known == 0 if unknown and known else numel == known
    if len(unknown) > 1 or not fits or (unknown and not known):
        raise RuntimeError(f"shape {list(size)} is invalid for {numel} elements")
    return [numel // known if entry == -1 else entry for entry in size]


def align(
    values: Sequence[Any], in_dims: Sequence[int | None], size: int, to: int | None = None
) -> tuple[list[Any], int]:
    """Values with their batch dims at one place (`to`, or the one they share), and that place.

    Unbatched values are expanded.
    """
    places = {bdim for bdim in in_dims if bdim is not None}
    if to is None:
        shared = min(places)
        fits = len(places) == 1 and all(
            logical_rank(x, bdim) >= shared for x, bdim in zip(values, in_dims, strict=True)
        )
        to = shared if fits else 0
    aligned = []
    for x, bdim in zip(values, in_dims, strict=True):
        if bdim is None:
            x = x.unsqueeze(to).expand(physical_size(x.shape, to, size))
        aligned.append(move_batch(x, bdim, to))
    return aligned, to


def from_end(x: Any, count: int) -> int:
    """The physical dim that is `count` from the end: 1 is the last."""
    return int(x.dim()) - count


def shifted(x: Any, rank: int) -> Any:
    """A value with its batch dim first, of physical rank `rank`: 1s go behind the batch dim."""
    return x if x.dim() >= rank else pad_rank(x, 0, rank - 1)


def fold_behind(x: Any, x_bdim: int | None, dim: int, groups: int, size: int) -> Any:
    """`fold` with the groups outermost: logical dim [groups * rest] -> [groups * B * rest]."""
    if groups == 1 or size == 0:
        return fold(x, x_bdim, dim, size)
    x = ensure_batched(x, x_bdim, size).unflatten(dim + 1, (groups, -1))
    return x.movedim(0, dim + 1).flatten(dim, dim + 2)


def unfold_behind(x: Any, dim: int, groups: int, size: int) -> tuple[Any, int]:
    """Undo `fold_behind`: [groups * B * rest] -> the value and its batch dim."""
    if groups == 1:
        return unfold(x, dim, size), dim
    shape = x.shape
    x = x.reshape(*shape[:dim], groups, size, shape[dim] // (groups * size), *shape[dim + 1 :])
    return x.movedim(dim + 1, 0).flatten(dim + 1, dim + 2), 0


def leading_dims(x: Any, x_bdim: int | None, count: int) -> tuple[Any, int | None]:
    """A value whose batch dim is not among its last `count` dims, and where the batch dim is."""
    if x_bdim is None or x_bdim < x.dim() - count:
        return x, x_bdim
    return batch_first(x, x_bdim), 0
