"""Stacks of transforms, drawn for a program."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.strategies.program import Program
from tests.strategies.shapes import batch_dims, insert_dim
from tests.strategies.statements import programs


@dataclass(frozen=True)
class Vmap:
    """Maps over a fresh batch dim of `size`; an argument with in_dim None is not batched."""

    size: int
    in_dims: tuple[int | None, int | None]
    out_dims: int
    captures: bool  # the arguments with in_dim None come through the closure
    chunk_size: int | None = None


@dataclass(frozen=True)
class Grad:
    """The gradient of ``f(x, y).sin().sum()`` in one argument."""

    argnums: int
    captures: bool  # the other argument comes through the closure


@dataclass(frozen=True)
class Vjp:
    """The pullback of f applied to ``f(x, y).cos()``, in one argument."""

    argnums: int
    captures: bool


@dataclass(frozen=True)
class Jvp:
    """The pushforward of f applied to ``x.sin()`` or ``y.sin()`` or both, plus ``f(x, y)``."""

    argnums: tuple[int, ...]


@dataclass(frozen=True)
class Jacobian:
    """``jacrev`` or ``jacfwd`` in one argument."""

    mode: str
    argnums: int
    captures: bool
    chunk_size: int | None = None


@dataclass(frozen=True)
class Hessian:
    """``hessian`` in one argument."""

    argnums: int
    captures: bool


Transform = Vmap | Grad | Vjp | Jvp | Jacobian | Hessian


@dataclass(frozen=True)
class Stack:
    """Transforms, innermost first, and the shapes of what they make of a program."""

    transforms: tuple[Transform, ...]
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def __repr__(self) -> str:
        lines = [f"# x: {self.x_shape}, y: {self.y_shape} -> {self.out_shape}"]
        lines += [f"f = {t}  # applied to f" for t in self.transforms]
        return "\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


MOST_EVALUATIONS = 500  # of the program, by the reference
LARGEST_OUTPUT = 250


@st.composite
def stacks(draw: Callable, program: Program, max_depth: int = 4) -> Stack:
    """Draws a stack for the program, at most `max_depth` levels deep; a hessian counts as two."""
    x_shape, y_shape, out_shape = program.x_shape, program.y_shape, program.out_shape
    left = draw(st.sampled_from(range(max_depth, 0, -1)))
    cost = 1
    transforms: list[Transform] = []
    while left > 0:
        argnums = draw(st.integers(0, 1))
        wrt = (x_shape, y_shape)[argnums]
        out, wide = math.prod(out_shape), math.prod(wrt)
        kinds = {
            "vmap": (3 * cost, 3 * out, 1),
            "grad": (3 * cost, wide, 1),
            "vjp": (3 * cost, wide, 1),
            "jvp": (5 * cost, out, 1),
            "jacrev": (3 * out * cost, out * wide, 1),
            "jacfwd": (3 * out * cost, out * wide, 1),
            "hessian": (9 * out * wide * cost, out * wide * wide, 2),
        }
        kinds = {
            kind: facts
            for kind, facts in kinds.items()
            if facts[0] <= MOST_EVALUATIONS and facts[1] <= LARGEST_OUTPUT and facts[2] <= left
        }
        if not kinds:
            break
        kind = draw(st.sampled_from(sorted(kinds)))
        cost, _, depth = kinds[kind]
        left -= depth
        captures = draw(st.booleans())
        if kind == "vmap":
            transform = draw(_vmaps(x_shape, y_shape, out_shape))
            x_dim, y_dim = transform.in_dims
            x_shape = x_shape if x_dim is None else insert_dim(x_shape, x_dim, transform.size)
            y_shape = y_shape if y_dim is None else insert_dim(y_shape, y_dim, transform.size)
            out_shape = insert_dim(out_shape, transform.out_dims, transform.size)
        elif kind == "grad":
            transform, out_shape = Grad(argnums, captures), wrt
        elif kind == "vjp":
            transform, out_shape = Vjp(argnums, captures), wrt
        elif kind == "jvp":
            transform = Jvp(draw(st.sampled_from([(0,), (1,), (0, 1)])))
        elif kind == "hessian":
            transform, out_shape = Hessian(argnums, captures), (*out_shape, *wrt, *wrt)
        else:
            chunk_size = draw(st.sampled_from([None, None, 1, 2]))
            transform = Jacobian(kind, argnums, captures, chunk_size)
            out_shape = (*out_shape, *wrt)
        transforms.append(transform)
    return Stack(tuple(transforms), x_shape, y_shape, out_shape)


@st.composite
def _vmaps(draw: Callable, x_shape: tuple, y_shape: tuple, out_shape: tuple) -> Vmap:
    which = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    in_dims = tuple(
        draw(batch_dims(len(shape))) if batched else None
        for batched, shape in zip(which, (x_shape, y_shape), strict=True)
    )
    size = draw(st.integers(1, 3))
    out_dims = draw(batch_dims(len(out_shape)))
    chunk_size = draw(st.sampled_from([None, None, None, 1, 2]))
    return Vmap(size, in_dims, out_dims, draw(st.booleans()), chunk_size)


@st.composite
def cases(draw: Callable, fills: bool = False) -> tuple[Program, Stack]:
    """Draws a program and a stack for it."""
    program = draw(programs(fills=fills))
    return program, draw(stacks(program))
