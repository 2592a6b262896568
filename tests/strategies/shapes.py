"""Strategies of shapes and batch dims."""

from __future__ import annotations

from hypothesis import strategies as st


def shapes(
    min_ndim: int = 0, max_ndim: int = 4, min_size: int = 0, max_size: int = 4
) -> st.SearchStrategy[tuple[int, ...]]:
    """Draws a shape; sizes 0 and 1 and the 0-d shape are included by default."""
    sizes = st.integers(min_size, max_size)
    return st.lists(sizes, min_size=min_ndim, max_size=max_ndim).map(tuple)


def batch_dims(ndim: int) -> st.SearchStrategy[int]:
    """Draws where a batch dim may sit in a tensor of `ndim` logical dims; negative ones too."""
    return st.integers(-(ndim + 1), ndim)


def insert_dim(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    """The shape with one more dim of `size` at `dim`, which counts in the result."""
    dim %= len(shape) + 1
    return (*shape[:dim], size, *shape[dim:])
