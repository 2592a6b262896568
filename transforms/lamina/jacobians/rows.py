"""The rows of a jacobian: a basis to map over, and the blocks that come back, put into trees.

A jacobian is computed one direction at a time: those of the outputs in reverse mode, those of the
inputs in forward mode. A real element has one direction, 1. A complex one has two, 1 and i, unless
the function is holomorphic: then one says it all.

# NOTE [Complex jacobians]
A function w(z) of a complex z = x + iy that is not holomorphic has two derivatives, for
dw = (dw/dz) dz + (dw/dz*) dz*. With w = u + iv:

    dw/dz  = (dw/dx - i dw/dy) / 2        dw/dz* = (dw/dx + i dw/dy) / 2

Forward mode gives dw/dx and dw/dy, for the tangents 1 and i. Reverse mode gives
p = du/dx + i du/dy for the cotangent 1, and q = dv/dx + i dv/dy for i, so that
dw/dz = (p* + i q*) / 2 and dw/dz* = (p + i q) / 2. Where w is real, q = 0 and each of the two
derivatives tells the other: p alone is given, which is the gradient of `grad`.
(W. Wirtinger 1927; K. Kreutz-Delgado, "The complex gradient operator and the CR-calculus", 2009.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lamina.batching.api import vmap
from lamina_core import pytree
from lamina_core.scopes import run_at

__all__ = ["Rows", "Wirtinger", "as_tree", "map_rows"]


class Wirtinger(NamedTuple):
    """The jacobian of a complex output in a complex input: a pair, see `lamina.jacrev`.

    Attributes:
        z: dw/dz. It is all there is where the function is holomorphic.
        z_conj: dw/dz*, zero where the function is holomorphic.

    Example:
        >>> import torch
        >>> from lamina import jacrev
        >>> jacrev(lambda z: z * z.conj() + z)(torch.tensor(1 + 2j))
        Wirtinger(z=tensor(2.-2.j), z_conj=tensor(1.+2.j))
    """

    z: Any
    z_conj: Any


class Rows:
    """The directions of some leaves, numbered one leaf after the other.

    Args:
        leaves: Tensors.
        holomorphic: Whether 1 is the only direction of a complex element.
    """

    def __init__(self, leaves: list[Any], *, holomorphic: bool) -> None:
        self.leaves = leaves
        self.units = [(1, 1j) if leaf.is_complex() and not holomorphic else (1,) for leaf in leaves]
        self.count = sum(
            leaf.numel() * len(units) for leaf, units in zip(leaves, self.units, strict=True)
        )

    def basis(self, start: int, stop: int) -> tuple[Any, ...]:
        """Directions `start` to `stop`: for each leaf a block `[stop - start, *shape]`."""
        blocks = []
        offset = 0
        # The identity depends on nothing, so no level needs to see how it is made.
        with run_at(None):
            for leaf, units in zip(self.leaves, self.units, strict=True):
                size = leaf.numel()
                block = torch.zeros(stop - start, size, dtype=leaf.dtype, device=leaf.device)
                for unit in units:
                    if max(start, offset) < min(stop, offset + size):
                        block.diagonal(start - offset).fill_(unit)
                    offset += size
                blocks.append(block.reshape(stop - start, *leaf.shape))
        return tuple(blocks)

    def split(self, column: Any) -> list[list[Any]]:
        """`[rows, ...]` as, for each leaf, one block `[elements, ...]` per unit."""
        sizes = [
            leaf.numel() for leaf, units in zip(self.leaves, self.units, strict=True) for _ in units
        ]
        blocks = iter(column.split(sizes))
        return [[next(blocks) for _ in units] for units in self.units]

    def pulled(self, column: Any, x: Any, *, holomorphic: bool) -> list[Any]:
        """Jacobians `[*output shape, *input shape]` in the input x, one for each output.

        Args:
            column: `[rows, *input shape]`, what the pullback of each direction is in x.
            x: The input.
            holomorphic: Whether to undo the conjugation of pullbacks, and no more.
        """
        found: list[Any] = []
        for out, blocks in zip(self.leaves, self.split(column), strict=True):
            parts = [block.reshape((*out.shape, *x.shape)) for block in blocks]
            if holomorphic:
                found.append(torch.conj_physical(parts[0]))
            elif len(parts) == 1:
                found.append(parts[0])
            elif x.is_complex():
                p, q = parts
                p_conj, q_conj = torch.conj_physical(p), torch.conj_physical(q)
                found.append(Wirtinger((p_conj + 1j * q_conj) / 2, (p + 1j * q) / 2))
            else:
                found.append(torch.complex(*parts))
        return found

    def pushed(self, column: Any, out: Any) -> list[Any]:
        """Jacobians `[*output shape, *input shape]` of an output, one for each input.

        Args:
            column: `[rows, *output shape]`, what the pushforward of each direction is.
            out: The output.
        """
        found: list[Any] = []
        for x, blocks in zip(self.leaves, self.split(column), strict=True):
            parts = [b.movedim(0, -1).reshape((*out.shape, *x.shape)) for b in blocks]
            if len(parts) == 1:
                found.append(parts[0])
            elif out.is_complex():
                along_x, along_y = parts
                found.append(Wirtinger((along_x - 1j * along_y) / 2, (along_x + 1j * along_y) / 2))
            else:
                found.append(torch.complex(*parts))
        return found


def map_rows(
    fn: Callable[..., Any],
    rows: Rows,
    chunk_size: int | None,
    randomness: str,
    out_dims: Any = 0,
) -> Any:
    """Apply `fn` to every direction, `chunk_size` of them at a time.

    Args:
        fn: Takes one tensor per leaf of the rows, and returns a tuple: of tensors, or with
            `out_dims` a tuple of these first and then what is the same for all directions.
        rows: The directions.
        chunk_size: How many at a time; all for None, and without `vmap` for 1.
        randomness: As for `vmap`.
        out_dims: 0, or `(0, None, ...)`.
    """
    count = rows.count
    step = chunk_size or max(count, 1)
    parts = []
    for start in range(0, max(count, 1), step):
        blocks = rows.basis(start, min(start + step, count))
        if step == 1 and count:
            parts.append(fn(*[block[0] for block in blocks]))
            continue
        parts.append(vmap(fn, out_dims=out_dims, randomness=randomness)(*blocks))
    stack = step == 1 and count > 0
    if out_dims == 0:
        return _join(parts, stack=stack)
    return (_join([part[0] for part in parts], stack=stack), *parts[0][1:])


def _join(parts: list[Any], *, stack: bool) -> tuple[Any, ...]:
    join = torch.stack if stack else torch.cat

    def column(items: Any) -> Any:
        if items[0] is None:
            return None
        return items[0] if len(items) == 1 and not stack else join(list(items))

    return tuple(column(items) for items in zip(*parts, strict=True))


def as_tree(per_output: list[list[Any]], in_spec: Any, out_spec: Any, *, single: bool) -> Any:
    """For each output leaf a tree like the inputs, or like the single one there is."""
    trees = [pytree.unflatten(in_spec, row) for row in per_output]
    return pytree.unflatten(out_spec, [tree[0] if single else tree for tree in trees])
