"""`jacrev`, `jacfwd` and `hessian`, built on the public `vjp`, `jvp` and `vmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lamina.autodiff.api import jvp, vjp
from lamina.autodiff.checks import (
    choose,
    describe,
    is_differentiable,
    named_leaves,
    need_differentiable,
)
from lamina.vmap.api import check_options, vmap
from lamina_core import pytree
from lamina_core.errors import NotDifferentiableError, message
from lamina_core.interpreter import run_at

__all__ = ["hessian", "jacfwd", "jacrev"]

Tensor = torch.Tensor


def jacrev(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The jacobian of a function by reverse mode: one pullback per element of the output.

    Args:
        func: Returns a pytree of tensors, or `(output, aux)` with `has_aux=True`.
        argnums: Which positional arguments to differentiate; an int, or several.
        has_aux: Whether `func` returns `(output, aux)`.
        chunk_size: How many rows to compute at a time; bounds memory. 1 uses no `vmap` at all.
        randomness: What random ops in the pullback do (see `vmap`).

    Returns:
        A function of the same arguments that returns the jacobian: in the structure of the output,
        at each leaf a tree like the argument (a tuple of them for several argnums) of tensors of
        shape `[*output shape, *input shape]`; or `(jacobian, aux)`.

    Raises:
        NotDifferentiableError: If an output is not a floating-point tensor, or no input is.

    Example:
        >>> import torch
        >>> from lamina import jacrev
        >>> jacrev(lambda x: x * x)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    check_options("jacrev", randomness, chunk_size)

    @functools.wraps(func)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        primals, call, single = _pick(func, args, argnums, kwargs, "jacrev")
        out, vjp_fn, *rest = vjp(call, *primals, has_aux=has_aux)
        outs, out_spec = pytree.flatten(out)
        _check_outputs(out, outs, "jacrev")
        ins, in_spec = pytree.flatten(primals)
        sizes = [o.numel() for o in outs]

        def pull(*rows: Any) -> Any:
            cts = [row.reshape(o.shape) for row, o in zip(rows, outs, strict=True)]
            return tuple(pytree.leaves(vjp_fn(pytree.unflatten(out_spec, cts))))

        columns = _map_rows(pull, _basis(outs, sizes), sum(sizes), chunk_size, randomness)
        result = _arrange(
            columns, ins, outs, sizes, in_spec, out_spec, single, rows_are_outputs=True
        )
        return (result, rest[0]) if has_aux else result

    return jacobian


def jacfwd(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The jacobian of a function by forward mode: one pushforward per element of the input.

    Arguments, result and errors are those of `jacrev`; it costs less where the inputs have fewer
    elements than the outputs.

    Example:
        >>> import torch
        >>> from lamina import jacfwd
        >>> jacfwd(lambda x: x.sum() * x)(torch.tensor([1.0, 2.0]))
        tensor([[4., 1.],
                [2., 5.]])
    """
    check_options("jacfwd", randomness, chunk_size)

    @functools.wraps(func)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        primals, call, single = _pick(func, args, argnums, kwargs, "jacfwd")
        ins, in_spec = pytree.flatten(primals)
        wanted = [leaf for leaf in ins if is_differentiable(leaf)]
        sizes = [leaf.numel() for leaf in wanted]
        found: dict[str, Any] = {}

        def push(*rows: Any) -> Any:
            given = iter(rows)
            tangents = [
                next(given).reshape(leaf.shape) if is_differentiable(leaf) else None for leaf in ins
            ]
            out, out_t, *rest = jvp(
                call, primals, pytree.unflatten(in_spec, tangents), has_aux=has_aux
            )
            outs, found["spec"] = pytree.flatten(out)
            _check_outputs(out, outs, "jacfwd")
            return tuple(pytree.leaves(out_t)), tuple(outs), rest

        rows = _basis(wanted, sizes)
        columns, outs, rest = _map_rows(
            push, rows, sum(sizes), chunk_size, randomness, out_dims=(0, None, None)
        )
        result = _arrange(
            columns, ins, list(outs), sizes, in_spec, found["spec"], single, rows_are_outputs=False
        )
        return (result, rest[0]) if has_aux else result

    return jacobian


def hessian(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The hessian of a function, as `jacfwd(jacrev(func))`.

    Arguments and result are those of `jacrev` taken twice: at each leaf of the output a tree like
    the argument of trees like the argument.

    Example:
        >>> import torch
        >>> from lamina import hessian
        >>> def f(x):
        ...     return x[0] * x[1] ** 2
        >>> hessian(f)(torch.tensor([1.0, 2.0]))
        tensor([[0., 4.],
                [4., 2.]])

        Any other nesting of the two gives the same matrix.

        >>> from lamina import jacfwd, jacrev
        >>> jacfwd(jacrev(f))(torch.tensor([1.0, 2.0]))
        tensor([[0., 4.],
                [4., 2.]])
    """
    check_options("hessian", randomness, chunk_size)
    inner = jacrev(func, argnums, has_aux=has_aux, chunk_size=chunk_size, randomness=randomness)
    return jacfwd(inner, argnums, has_aux, chunk_size=chunk_size, randomness=randomness)


def _pick(
    func: Any, args: tuple[Any, ...], argnums: Any, kwargs: dict[str, Any], name: str
) -> tuple[tuple[Any, ...], Callable[..., Any], bool]:
    """The arguments chosen, the function of these alone, and whether there is a single one."""
    positions = choose(args, argnums, name)
    chosen_leaves = pytree.leaves([args[at] for at in positions])
    need_differentiable(chosen_leaves, args, positions, name)

    def call(*chosen: Any) -> Any:
        full = list(args)
        for at, value in zip(positions, chosen, strict=True):
            full[at] = value
        return func(*full, **kwargs)

    return tuple(args[at] for at in positions), call, isinstance(argnums, int)


def _check_outputs(out: Any, outs: list[Any], name: str) -> None:
    if all(isinstance(o, Tensor) and o.is_floating_point() for o in outs):
        return
    path, bad = next(
        (path, leaf)
        for path, leaf in named_leaves("output", out)
        if not is_differentiable(leaf) or leaf.is_complex()
    )
    raise NotDifferentiableError(
        message(
            f"{name} needs a function that returns real floating-point tensors",
            f"{path}: {describe(bad)}",
            "to fix: return other values as aux, with has_aux=True",
        )
    )


def _basis(leaves: list[Any], sizes: list[int]) -> Callable[[int, int], tuple[Any, ...]]:
    """Rows `start` to `stop` of the identity over all leaves, as one block of columns per leaf."""

    def rows(start: int, stop: int) -> tuple[Any, ...]:
        blocks = []
        offset = 0
        # The identity depends on nothing, so no level needs to see how it is made.
        with run_at(None):
            for leaf, size in zip(leaves, sizes, strict=True):
                block = torch.zeros(stop - start, size, dtype=leaf.dtype, device=leaf.device)
                if max(start, offset) < min(stop, offset + size):
                    block.diagonal(start - offset).fill_(1)
                blocks.append(block)
                offset += size
        return tuple(blocks)

    return rows


def _map_rows(
    fn: Any,
    rows: Callable[[int, int], tuple[Any, ...]],
    count: int,
    chunk_size: int | None,
    randomness: str,
    out_dims: Any = 0,
) -> Any:
    """Apply `fn` to every row of the basis, `chunk_size` rows at a time."""
    step = chunk_size or max(count, 1)
    parts = []
    for start in range(0, max(count, 1), step):
        block = rows(start, min(start + step, count))
        if step == 1 and count:
            parts.append(fn(*[b[0] for b in block]))
            continue
        parts.append(vmap(fn, out_dims=out_dims, randomness=randomness)(*block))
    return _join(parts, out_dims, stack=step == 1 and count > 0)


def _join(parts: list[Any], out_dims: Any, *, stack: bool) -> Any:
    join = torch.stack if stack else torch.cat

    def column(items: Any) -> Any:
        if items[0] is None:
            return None
        return items[0] if len(items) == 1 and not stack else join(list(items))

    if out_dims == 0:
        return tuple(column(items) for items in zip(*parts, strict=True))
    first = parts[0]
    return (tuple(column(items) for items in zip(*[p[0] for p in parts], strict=True)), *first[1:])


def _arrange(
    columns: Any,
    ins: list[Any],
    outs: list[Any],
    sizes: list[int],
    in_spec: Any,
    out_spec: Any,
    single: bool,
    *,
    rows_are_outputs: bool,
) -> Any:
    """Put blocks `[rows, *shape]` into trees of `[*output shape, *input shape]`."""
    wanted = [i for i, leaf in enumerate(ins) if is_differentiable(leaf)]
    per_output = []
    if rows_are_outputs:
        offset = 0
        for out, size in zip(outs, sizes, strict=True):
            row = [
                None
                if columns[i] is None or i not in wanted
                else columns[i][offset : offset + size].reshape((*out.shape, *leaf.shape))
                for i, leaf in enumerate(ins)
            ]
            per_output.append(row)
            offset += size
    else:
        for column, out in zip(columns, outs, strict=True):
            blocks = iter(column.split(sizes))
            row = []
            for i, leaf in enumerate(ins):
                if i not in wanted:
                    row.append(None)
                    continue
                block = next(blocks).movedim(0, -1)
                row.append(block.reshape((*out.shape, *leaf.shape)))
            per_output.append(row)
    trees = []
    for row in per_output:
        tree = pytree.unflatten(in_spec, row)
        trees.append(tree[0] if single else tree)
    return pytree.unflatten(out_spec, trees)
