"""`vmap`: arguments in, batched tensors through the function, stacked outputs out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from lamina.batching.chunks import Gathered
from lamina.batching.hidden import holds_mapped
from lamina.batching.interpreter import VmapInterpreter
from lamina.batching.randomness import Part
from lamina_core import pytree
from lamina_core.errors import BatchSizeError, StructureError, message
from lamina_core.recipe import root_of
from lamina_core.views import handed_out
from lamina_core.wrapper import LevelTensor

__all__ = ["vmap"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Map a function of one example over a dim of its arguments, in one batched run.

    Args:
        func: Takes and returns pytrees of tensors. Outputs that are not tensors pass through.
        in_dims: For each positional argument, the dim to map over: an int, None for "not mapped",
            or a tuple or list of these, nested like the arguments. Only tensors are mapped: the
            entry of anything else has to be None.
        out_dims: Where the batch dim goes in each output; None returns an output that is the same
            for every example without a batch dim.
        randomness: What random ops do: "error", "same" (all examples share one draw) or
            "different" (a draw per example). With "different", `torch.randn(3)` gives the numbers
            that `torch.randn(batch_size, 3)` gives outside, for the same seed.
        chunk_size: Map over at most this many examples at a time, which bounds memory. The chunks
            are computed one after the other, and their results put into one tensor. For one seed
            every chunk size gives the same numbers; each chunk draws those of all examples for it.

    Returns:
        A function of the same arguments, where mapped ones have one more dim. Keyword arguments
        reach `func` and are not mapped.

    Raises:
        StructureError: If `in_dims` or `out_dims` does not fit the arguments or outputs, or an
            output is no pytree and holds mapped tensors.
        BatchSizeError: If no argument is mapped, or mapped ones disagree on the size.

    Example:
        >>> import torch
        >>> from lamina import vmap
        >>> x, y = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
        >>> vmap(torch.dot)(x, y)
        tensor([ 3., 12.])

        A model that closes over a weight, mapped over examples: `backward()` reaches the weight.

        >>> weight = torch.ones(3, requires_grad=True)
        >>> def model(example):
        ...     return example.dot(weight).relu()
        >>> vmap(model)(x).sum().backward()
        >>> weight.grad
        tensor([3., 5., 7.])

        A jacobian of what plain autograd has recorded, in one call instead of a loop over rows.

        >>> inputs = torch.arange(1.0, 4.0, requires_grad=True)
        >>> outputs = inputs**2
        >>> rows = torch.eye(3)
        >>> vmap(lambda v: torch.autograd.grad(outputs, inputs, v)[0])(rows)
        tensor([[2., 0., 0.],
                [0., 4., 0.],
                [0., 0., 6.]])
    """
    check_options("vmap", randomness, chunk_size)

    @functools.wraps(func)
    def mapped(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.flatten(args)
        dims = _flat_in_dims(in_dims, args, leaves, spec)
        size = _batch_size(args, leaves, dims, in_dims)
        if chunk_size is not None and chunk_size < size:
            return _in_chunks(
                func, leaves, spec, dims, out_dims, randomness, size, chunk_size, kwargs
            )
        return vmap_flat(func, leaves, spec, dims, out_dims, randomness, size, kwargs)

    return mapped


def check_options(name: str, randomness: Any, chunk_size: Any) -> None:
    """Refuse a `randomness` or `chunk_size` that is none; `name` is the transform, for messages."""
    if randomness not in ("error", "same", "different"):
        raise StructureError(
            message(
                f"randomness of {name} is {randomness!r}",
                "to fix: pass 'error', 'same' or 'different'",
            )
        )
    if chunk_size is not None and (
        not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size <= 0
    ):
        raise StructureError(
            message(f"chunk_size of {name} is {chunk_size!r}", "to fix: pass an int > 0, or None")
        )


def vmap_flat(
    func: Callable[..., Any],
    leaves: list[Any],
    spec: Any,
    dims: list[int | None],
    out_dims: Any,
    randomness: str,
    size: int,
    kwargs: dict[str, Any],
    part: Part | None = None,
) -> Any:
    """`vmap` of flattened arguments whose dims and batch size have been checked."""
    with VmapInterpreter(size, randomness) as interpreter:
        interpreter.part = part
        lifted = [
            leaf if dim is None else interpreter.lift(leaf, dim)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        out = func(*pytree.unflatten(spec, lifted), **kwargs)
        if interpreter.mutated:
            interpreter.refresh(pytree.leaves(out))
    # Popped: what is done to the values now is done at the level below.
    return _unwrap(interpreter, out, out_dims, size)


def _broadcast_out_dims(out_dims: Any, out: Any, out_spec: Any) -> list[Any]:
    """One entry for each output; `(1,)` for a single tensor is 1, as in torch.func."""
    if type(out_dims) is tuple and len(out_dims) == 1 and isinstance(out, torch.Tensor):
        return [out_dims[0]]
    return pytree.broadcast_prefix(out_dims, out_spec, what="out_dims", of="output")


def _unwrap(interpreter: VmapInterpreter, out: Any, out_dims: Any, size: int) -> Any:
    """Take the outputs to the level below, each with its batch dim where `out_dims` says."""
    outs, out_spec = pytree.flatten(out)
    if type(out_dims) is int:
        wanted: list[Any] = [out_dims] * len(outs)
    else:
        try:
            wanted = _broadcast_out_dims(out_dims, out, out_spec)
        except StructureError as error:
            what, *lines = str(error).split("\n  ")
            raise interpreter.error(StructureError, what, *lines) from None
    results = []
    for i, (value, dim) in enumerate(zip(outs, wanted, strict=True)):
        if not isinstance(value, Tensor):
            if type(value) not in _HOLD_NOTHING and holds_mapped(interpreter, value):
                raise _hidden(interpreter, out, i)
            results.append(value)
            continue
        bdim = None
        output = value = _without_dead(interpreter, value)
        if interpreter.is_own(value):
            bdim = value.bdim
            value = handed_out(value, value.value)
        if dim is None:
            if bdim is not None:
                raise interpreter.error(
                    StructureError,
                    f"out_dims is None for {_output_path(out, i)}, which differs between examples",
                    "to fix: give it an int in out_dims",
                )
            results.append(value)
            continue
        rank = value.dim() + (bdim is None)
        if not isinstance(dim, int) or isinstance(dim, bool) or not -rank <= dim < rank:
            raise interpreter.error(
                StructureError,
                f"out_dims is {dim!r} for {_output_path(out, i)}",
                f"to fix: use an int in [{-rank}, {rank - 1}], which counts the batch dim, or None",
            )
        if bdim is None:
            value = value.expand(size, *value.shape)
            bdim = 0
        value = value if bdim == dim % rank else value.movedim(bdim, dim)
        results.append(value if value.is_contiguous() else _apart(output, value))
    return pytree.unflatten(out_spec, results)


def _apart(output: Any, value: Any) -> Any:
    """The value of an output with a place in memory for each element, as in a stack of examples.

    A value that is the same for all examples, or all elements, is kept once while it is computed
    with. A view of an argument remains one.
    """
    if type(value) in _CLASSES or 0 not in value.stride() or not value.numel():
        return value
    if all(stride or size == 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        return value
    shared = type(output) in _CLASSES and root_of(output).is_input
    return value if shared else value.contiguous()


def _without_dead(interpreter: VmapInterpreter, value: Any) -> Any:
    """What an output of a level that has just been popped stands for at this one."""
    while type(value) in _CLASSES and not value.interpreter.alive and not interpreter.is_own(value):
        value = value.dead_value()
    return value


_HOLD_NOTHING = frozenset((bool, bytes, complex, float, int, str, type(None)))


def _hidden(interpreter: VmapInterpreter, out: Any, index: int) -> Exception:
    paths, leaves, _ = pytree.flatten_with_paths(out)
    kind = type(leaves[index]).__name__
    return interpreter.error(
        StructureError,
        f"output{paths[index]} is a {kind} that holds mapped tensors, out of which vmap can't "
        "take them",
        f"to fix: return the tensors in a tuple, list or dict, or register {kind} as a pytree",
    )


def _output_path(out: Any, index: int) -> str:
    paths, leaves, _ = pytree.flatten_with_paths(out)
    return f"output{paths[index]} of shape {list(leaves[index].shape)}"


def _flat_in_dims(in_dims: Any, args: Any, leaves: list[Any], spec: Any) -> list[int | None]:
    """One physical dim or None per leaf of the arguments."""
    if in_dims is None or isinstance(in_dims, int):
        wanted: list[Any] = [in_dims] * len(leaves)
    else:
        if not isinstance(in_dims, (tuple, list)):
            raise StructureError(
                message(
                    f"in_dims is {in_dims!r}, of type {type(in_dims).__name__}",
                    "to fix: pass an int, or a tuple or list with an entry per positional argument",
                )
            )
        wanted = pytree.broadcast_prefix(in_dims, spec, what="in_dims", of="args")
    dims: list[int | None] = []
    strays: list[int] = []  # what is no tensor, and was to be mapped
    for i, (leaf, dim) in enumerate(zip(leaves, wanted, strict=True)):
        if dim is None:
            dims.append(None)
            continue
        if not isinstance(leaf, Tensor):
            dims.append(None)
            strays.append(i)
            continue
        rank = leaf.dim()
        if not isinstance(dim, int) or isinstance(dim, bool) or not -rank <= dim < rank:
            raise _bad_dim(args, i, dim)
        dims.append(dim % rank)
    if strays and any(dim is not None for dim in dims):
        raise _no_tensor(args, strays[0], wanted[strays[0]])
    return dims


def _no_tensor(args: Any, index: int, dim: Any) -> StructureError:
    paths, leaves, _ = pytree.flatten_with_paths(args)
    kind = type(leaves[index]).__name__
    return StructureError(
        message(
            f"in_dims has {dim!r} for argument args{paths[index]}, which is a {kind}",
            "to fix: pass None for it in in_dims, or torch.as_tensor(x) to map over it",
        )
    )


def _bad_dim(args: Any, index: int, dim: Any) -> StructureError:
    paths, leaves, _ = pytree.flatten_with_paths(args)
    leaf = leaves[index]
    if not isinstance(dim, int) or isinstance(dim, bool):
        return StructureError(
            message(
                f"in_dims has {dim!r} for argument args{paths[index]}",
                "to fix: use an int or None",
            )
        )
    rank = leaf.dim()
    wanted = (
        "use None: a tensor of shape [] has no dim to map over"
        if rank == 0
        else f"use an int in [{-rank}, {rank - 1}], or None"
    )
    return StructureError(
        message(
            f"in_dims has {dim} for argument args{paths[index]} of shape {list(leaf.shape)}",
            f"to fix: {wanted}",
        )
    )


def _batch_size(args: Any, leaves: list[Any], dims: list[int | None], in_dims: Any) -> int:
    sizes = [leaf.shape[d] for leaf, d in zip(leaves, dims, strict=True) if d is not None]
    if not sizes:
        raise BatchSizeError(
            message(
                "vmap has nothing to map over: no argument is mapped",
                f"in_dims is {in_dims!r}, and the arguments hold {_count(leaves)}",
                "to fix: pass at least one tensor positionally, with an int in in_dims",
            )
        )
    for other in sizes:
        if other != sizes[0]:
            paths, _, _ = pytree.flatten_with_paths(args)
            lines = [
                f"args{path} of shape {list(leaf.shape)} has size {leaf.shape[d]} in dim {d}"
                for path, leaf, d in zip(paths, leaves, dims, strict=True)
                if d is not None
            ]
            raise BatchSizeError(
                message(
                    "the mapped arguments of vmap have different sizes",
                    *lines,
                    "to fix: map over dims of one size, or pass None in in_dims for the others",
                )
            )
    return sizes[0]


def _count(leaves: list[Any]) -> str:
    tensors = sum(isinstance(leaf, Tensor) for leaf in leaves)
    return f"{tensors} tensor{'' if tensors == 1 else 's'}"


def _in_chunks(
    func: Any,
    leaves: list[Any],
    spec: Any,
    dims: list[int | None],
    out_dims: Any,
    randomness: str,
    size: int,
    chunk_size: int,
    kwargs: dict[str, Any],
) -> Any:
    """Run chunk after chunk; each of them starts from the same random state."""
    part = Part(size) if randomness != "error" else None
    gathered: list[Gathered] = []
    out_spec: Any = None
    for start in range(0, size, chunk_size):
        count = min(chunk_size, size - start)
        pieces = [
            leaf if dim is None else leaf.narrow(dim, start, count)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        out = vmap_flat(
            func,
            pieces,
            spec,
            dims,
            out_dims,
            randomness,
            count,
            kwargs,
            None if part is None else part.at(start),
        )
        flat, out_spec = pytree.flatten(out)
        if not gathered:
            wanted = _broadcast_out_dims(out_dims, out, out_spec)
            gathered = [Gathered(dim, size) for dim in wanted]
        for output, leaf in zip(gathered, flat, strict=True):
            output.add(leaf)
        del out, flat
    return pytree.unflatten(out_spec, [output.result() for output in gathered])
