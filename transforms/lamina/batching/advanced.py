"""What reading and writing by index tensors (`x[i, :, j]`) have in common.

Words: the *block* is the group of dims that the broadcast index tensors put into the result.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import logical_rank

__all__ = [
    "block_rank",
    "example_numbers",
    "is_mask",
    "masks_to_numbers",
    "place_of_block",
]


def is_mask(index: Any) -> bool:
    """Whether an index tensor says which elements, not where they are."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def example_numbers(x: Any, rank: int) -> Any:
    """[B, 1, ...]: an index that goes with a batched index of logical rank `rank`."""
    size = x.shape[0]
    return torch.arange(size, device=x.device).reshape(size, *[1] * rank)


def place_of_block(indices: Any) -> int:
    """How many dims stand before the block: none if the indexed dims are not neighbours."""
    used = [at for at, index in enumerate(indices) if index is not None]
    return used[0] if used[-1] - used[0] == len(used) - 1 else 0


def masks_to_numbers(indices: Any, index_bdims: Any) -> tuple[list[Any], list[int | None]]:
    """Replace each unbatched mask of k dims by the k number indices that it stands for."""
    found: list[Any] = []
    bdims: list[int | None] = []
    for index, bdim in zip(indices, index_bdims, strict=True):
        if bdim is None and is_mask(index):
            numbers = index.nonzero().unbind(1)
            found.extend(numbers)
            bdims.extend([None] * len(numbers))
        else:
            found.append(index)
            bdims.append(bdim)
    return found, bdims


def block_rank(indices: Any, index_bdims: Any) -> int:
    """The logical rank of the block of number indices."""
    return max(
        logical_rank(index, bdim)
        for index, bdim in zip(indices, index_bdims, strict=True)
        if index is not None
    )
