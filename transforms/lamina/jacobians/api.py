"""`jacrev`, `jacfwd`, `jacobian` and `hessian`, built on the public `vjp`, `jvp` and `vmap`."""

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
    need_complex,
    need_differentiable,
)
from lamina.batching.api import check_options
from lamina.jacobians.rows import Rows, as_tree, map_rows
from lamina_core import pytree
from lamina_core.errors import NotDifferentiableError, StructureError, message

__all__ = ["hessian", "jacfwd", "jacobian", "jacrev"]


def jacrev(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    with_value: bool = False,
    holomorphic: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The jacobian of a function by reverse mode: one pullback per element of the output.

    Args:
        func: Returns a pytree of tensors, or `(output, aux)` with `has_aux=True`.
        argnums: Which positional arguments to differentiate; an int, or several.
        has_aux: Whether `func` returns `(output, aux)`.
        with_value: Whether to return the output as well, in front of the jacobian. `func` runs no
            more often for it. A keyword and not a function of its own, because it goes with every
            function of this family and every other option.
        holomorphic: Whether `func` is a holomorphic function of complex arguments, with complex
            outputs. Its jacobian is then the complex derivative dw/dz. Not checked.
        chunk_size: How many rows to compute at a time; bounds memory. 1 uses no `vmap` at all.
        randomness: What random ops in the pullback do (see `vmap`).

    Returns:
        A function of the same arguments that returns the jacobian: in the structure of the output,
        at each leaf a tree like the argument (a tuple of them for several argnums) of tensors of
        shape `[*output shape, *input shape]`; or `(jacobian, aux)`. With `with_value`,
        `(output, jacobian)` or `((output, aux), jacobian)`, in the order of `value_and_grad`.

        Where numbers are complex and `holomorphic` is not set, the entry for an output w and an
        input z = x + iy depends on which of them is complex:

        * w only: dw/dx, a complex tensor;
        * z only: dw/dx + i dw/dy, a complex tensor: each row is the gradient as `grad` gives it;
        * both: the pair `Wirtinger(z=dw/dz, z_conj=dw/dz*)`, where
          dw/dz = (dw/dx - i dw/dy) / 2 and dw/dz* = (dw/dx + i dw/dy) / 2.

    Raises:
        NotDifferentiableError: If an output is not a floating-point or complex tensor, or no input
            is, or one is real although `holomorphic`.

    Example:
        >>> import torch
        >>> from lamina import jacrev
        >>> jacrev(lambda x: x * x)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
        >>> jacrev(lambda z: z * z, holomorphic=True)(torch.tensor(1 + 2j))
        tensor(2.+4.j)
    """
    check_options("jacrev", randomness, chunk_size)

    @functools.wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        at = _Point(func, args, argnums, kwargs, "jacrev", holomorphic)
        out, vjp_fn, *aux = vjp(at.call, *at.primals, has_aux=has_aux)
        found = _by_rows(at, out, vjp_fn, chunk_size, randomness)
        return _answer(found, out, aux, with_value=with_value)

    return wrapped


def jacfwd(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    with_value: bool = False,
    holomorphic: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The jacobian of a function by forward mode: one pushforward per element of the input.

    Arguments, result and errors are those of `jacrev`; it costs less where the inputs have fewer
    elements than the outputs. `func` runs once for each chunk.

    Example:
        >>> import torch
        >>> from lamina import jacfwd
        >>> jacfwd(lambda x: x.sum() * x)(torch.tensor([1.0, 2.0]))
        tensor([[4., 1.],
                [2., 5.]])
    """
    check_options("jacfwd", randomness, chunk_size)

    @functools.wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        at = _Point(func, args, argnums, kwargs, "jacfwd", holomorphic)
        spec: Any = None

        def push(*given: Any) -> Any:
            nonlocal spec
            out, out_t, *aux = jvp(at.call, at.primals, at.tangents(given), has_aux=has_aux)
            outs, spec = _outputs(at, out)
            return tuple(pytree.leaves(out_t)), tuple(outs), aux

        columns, outs, aux = map_rows(push, at.rows, chunk_size, randomness, (0, None, None))
        found = _arranged(at, columns, outs, spec)
        return _answer(found, pytree.unflatten(spec, outs), aux, with_value=with_value)

    return wrapped


def jacobian(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    mode: str = "auto",
    has_aux: bool = False,
    with_value: bool = False,
    holomorphic: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The jacobian of a function, in the mode that takes fewer passes.

    Arguments, result and errors are those of `jacrev`.

    Args:
        func: As for `jacrev`.
        argnums: As for `jacrev`.
        mode: "reverse" is `jacrev`, one pass for each element of the output; "forward" is
            `jacfwd`, one for each of the input. "auto" runs `func` once on a tape, which tells the
            size of the output. If that is larger than the input's, it pushes the directions of the
            input forward, through the transpose of the pullback; so `func` does not run again.
            Where you know that the output is larger, "forward" saves the tape and its memory.
        has_aux: As for `jacrev`.
        with_value: As for `jacrev`.
        holomorphic: As for `jacrev`.
        chunk_size: As for `jacrev`.
        randomness: As for `jacrev`.

    Raises:
        StructureError: If `mode` is not one of the three.

    Example:
        >>> import torch
        >>> from lamina import jacobian
        >>> value, found = jacobian(lambda x: x.expand(2, 3), with_value=True)(torch.ones(3))
        >>> value.shape, found.shape
        (torch.Size([2, 3]), torch.Size([2, 3, 3]))
    """
    options: dict[str, Any] = {
        "has_aux": has_aux,
        "with_value": with_value,
        "holomorphic": holomorphic,
        "chunk_size": chunk_size,
        "randomness": randomness,
    }
    if mode == "reverse":
        return jacrev(func, argnums, **options)
    if mode == "forward":
        return jacfwd(func, argnums, **options)
    if mode != "auto":
        raise StructureError(
            message(f"mode of jacobian is {mode!r}", "to fix: pass 'auto', 'forward' or 'reverse'")
        )
    check_options("jacobian", randomness, chunk_size)

    @functools.wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        at = _Point(func, args, argnums, kwargs, "jacobian", holomorphic)
        out, vjp_fn, *aux = vjp(at.call, *at.primals, has_aux=has_aux)
        outs, _ = _outputs(at, out)
        if at.rows.count < Rows(outs, holomorphic=holomorphic).count:
            found = _by_columns(at, out, vjp_fn, chunk_size, randomness)
        else:
            found = _by_rows(at, out, vjp_fn, chunk_size, randomness)
        return _answer(found, out, aux, with_value=with_value)

    return wrapped


def hessian(
    func: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    with_value: bool = False,
    holomorphic: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The hessian of a function, as `jacfwd(jacrev(func))`.

    Arguments and result are those of `jacrev` taken twice: at each leaf of the output a tree like
    the argument of trees like the argument. With `with_value` both lower orders stand in front:
    `(output, jacobian, hessian)`, or `((output, aux), jacobian, hessian)`, at no further run of
    `func`.

    Example:
        >>> import torch
        >>> from lamina import hessian
        >>> def f(x):
        ...     return x[0] * x[1] ** 2
        >>> hessian(f)(torch.tensor([1.0, 2.0]))
        tensor([[0., 4.],
                [4., 2.]])

        All that a step of Newton's method needs:

        >>> value, gradient, matrix = hessian(f, with_value=True)(torch.tensor([1.0, 2.0]))
        >>> value, gradient
        (tensor(4.), tensor([4., 4.]))

        Any other nesting of the two gives the same matrix.

        >>> from lamina import jacfwd, jacrev
        >>> jacfwd(jacrev(f))(torch.tensor([1.0, 2.0]))
        tensor([[0., 4.],
                [4., 2.]])
    """
    check_options("hessian", randomness, chunk_size)
    options: dict[str, Any] = {
        "holomorphic": holomorphic,
        "chunk_size": chunk_size,
        "randomness": randomness,
    }
    inner = jacrev(func, argnums, has_aux=has_aux, with_value=with_value, **options)
    if not with_value:
        return jacfwd(inner, argnums, has_aux, **options)

    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, first = inner(*args, **kwargs)
        return first, (value, first)

    outer = jacfwd(gradient, argnums, True, **options)

    @functools.wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        second, (value, first) = outer(*args, **kwargs)
        return value, first, second

    return wrapped


class _Point:
    """A function of its chosen arguments alone, and the point at which it is differentiated.

    Attributes:
        name: The transform, for messages.
        holomorphic: As the user said.
        primals: The chosen arguments.
        call: The function of these.
        single: Whether `argnums` is an int.
        ins: The leaves of the primals.
        in_spec: The structure of the primals.
        rows: The directions of those that are differentiable.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        argnums: Any,
        kwargs: dict[str, Any],
        name: str,
        holomorphic: bool,
    ) -> None:
        positions = choose(args, argnums, name)
        chosen = [args[at] for at in positions]
        need_differentiable(pytree.leaves(chosen), args, positions, name)
        if holomorphic:
            for at in positions:
                need_complex(f"args[{at}]", args[at], name)

        def call(*values: Any) -> Any:
            full = list(args)
            for at, value in zip(positions, values, strict=True):
                full[at] = value
            return func(*full, **kwargs)

        self.name = name
        self.holomorphic = holomorphic
        self.primals = tuple(chosen)
        self.call = call
        self.single = isinstance(argnums, int)
        self.ins, self.in_spec = pytree.flatten(self.primals)
        wanted = [leaf for leaf in self.ins if is_differentiable(leaf)]
        self.rows = Rows(wanted, holomorphic=holomorphic)

    def tangents(self, given: Sequence[Any]) -> Any:
        """A tree like the primals, with one tensor for each differentiable leaf."""
        found = iter(given)
        filled = [next(found) if is_differentiable(leaf) else None for leaf in self.ins]
        return pytree.unflatten(self.in_spec, filled)


def _outputs(at: _Point, out: Any) -> tuple[list[Any], Any]:
    """The leaves of the output and its structure, if a jacobian of it can be had."""
    outs, spec = pytree.flatten(out)
    if not all(is_differentiable(o) for o in outs):
        path, bad = next(
            (path, leaf)
            for path, leaf in named_leaves("output", out)
            if not is_differentiable(leaf)
        )
        raise NotDifferentiableError(
            message(
                f"{at.name} needs a function that returns floating-point or complex tensors",
                f"{path}: {describe(bad)}",
                "to fix: return other values as aux, with has_aux=True",
            )
        )
    if at.holomorphic:
        need_complex("output", out, at.name)
    return outs, spec


def _by_rows(
    at: _Point, out: Any, vjp_fn: Callable[..., Any], chunk_size: int | None, randomness: str
) -> Any:
    """The jacobian by one pullback for each direction of the output."""
    outs, spec = _outputs(at, out)
    rows = Rows(outs, holomorphic=at.holomorphic)

    def pull(*cts: Any) -> Any:
        return tuple(pytree.leaves(vjp_fn(pytree.unflatten(spec, cts))))

    per_input = [
        rows.pulled(column, x, holomorphic=at.holomorphic)
        if is_differentiable(x)
        else [None] * len(outs)
        for column, x in zip(map_rows(pull, rows, chunk_size, randomness), at.ins, strict=True)
    ]
    per_output = [[column[i] for column in per_input] for i in range(len(outs))]
    return as_tree(per_output, at.in_spec, spec, single=at.single)


def _by_columns(
    at: _Point, out: Any, vjp_fn: Callable[..., Any], chunk_size: int | None, randomness: str
) -> Any:
    """The jacobian by one pushforward for each direction of the input.

    A pullback is linear, and its own pullback is the pushforward: (J^H)^H = J.
    """
    outs, spec = _outputs(at, out)
    _, push_fn = vjp(vjp_fn, pytree.tree_map(torch.zeros_like, out))

    def push(*given: Any) -> Any:
        (out_t,) = push_fn(tuple(at.tangents(given)))
        return tuple(pytree.leaves(out_t))

    columns = map_rows(push, at.rows, chunk_size, randomness)
    return _arranged(at, columns, outs, spec)


def _arranged(at: _Point, columns: Sequence[Any], outs: Sequence[Any], spec: Any) -> Any:
    """What has been pushed forward, in the structure of the output."""
    per_output = []
    for column, out in zip(columns, outs, strict=True):
        blocks = iter(at.rows.pushed(column, out))
        per_output.append([next(blocks) if is_differentiable(x) else None for x in at.ins])
    return as_tree(per_output, at.in_spec, spec, single=at.single)


def _answer(found: Any, out: Any, aux: Sequence[Any], *, with_value: bool) -> Any:
    """What the caller is given: see `jacrev`."""
    if with_value:
        return ((out, aux[0]) if aux else out), found
    return (found, aux[0]) if aux else found
