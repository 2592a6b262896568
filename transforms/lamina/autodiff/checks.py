"""What `grad`, `vjp` and `jvp` hold against their arguments and outputs, and how they complain.

Values are named by the path that reaches them, as the user would write it: `args[0]['w']`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from lamina_core import pytree
from lamina_core.errors import (
    NonScalarLossError,
    NotDifferentiableError,
    StructureError,
    TangentError,
    message,
)

__all__ = [
    "ABSENT",
    "as_pair",
    "choose",
    "describe",
    "is_differentiable",
    "likes",
    "match",
    "named_leaves",
    "need_complex",
    "need_differentiable",
    "scalar_loss",
    "seeded",
    "split_aux",
    "structure_text",
]

Tensor = torch.Tensor


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf can carry a derivative: a floating-point or complex tensor."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def likes(leaves: Sequence[Any]) -> list[tuple[Any, Any] | None]:
    """Shape and dtype of each differentiable leaf, None for others: all that `match` asks for."""
    return [(leaf.shape, leaf.dtype) if is_differentiable(leaf) else None for leaf in leaves]


def describe(leaf: Any) -> str:
    """A leaf in a message: `torch.int64 tensor of shape [3]`, or the type of what is no tensor."""
    if isinstance(leaf, Tensor):
        return _described(leaf.shape, leaf.dtype)
    return type(leaf).__name__


def _described(shape: Any, dtype: Any) -> str:
    return f"{dtype} tensor of shape {list(shape)}"


def named_leaves(name: str, tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree that messages call `name`, each with its path: `name[0]['w']`."""
    paths, leaves, _ = pytree.flatten_with_paths(tree)
    return [(f"{name}{path}", leaf) for path, leaf in zip(paths, leaves, strict=True)]


def _listing(named: list[tuple[str, Any]]) -> list[str]:
    lines = [f"{name}: {describe(leaf)}" for name, leaf in named[:4]]
    return lines + ([f"and {len(named) - 4} more"] if len(named) > 4 else [])


def choose(args: tuple[Any, ...], argnums: Any, name: str) -> list[int]:
    """The positions that `argnums` names, counted from the front.

    Raises:
        StructureError: If `argnums` is not an int or a sequence of distinct ints in range.
    """
    wanted = [argnums] if isinstance(argnums, int) else argnums
    if (
        not isinstance(wanted, (tuple, list))
        or not wanted
        or any(isinstance(at, bool) or not isinstance(at, int) for at in wanted)
    ):
        raise StructureError(
            message(
                f"argnums of {name} is {argnums!r}",
                "to fix: pass an int, or a tuple of at least one int",
            )
        )
    count = len(args)
    given = "is 1 positional argument" if count == 1 else f"are {count} positional arguments"
    for at in wanted:
        if not -count <= at < count:
            raise StructureError(
                message(
                    f"argnums of {name} is {argnums!r}, but there {given}",
                    "arguments passed by keyword are not differentiated",
                    "to fix: pass the argument positionally and name its position",
                )
            )
    positions = [at % count for at in wanted]
    if len(set(positions)) != len(positions):
        raise StructureError(
            message(
                f"argnums of {name} names an argument twice: {argnums!r}", "to fix: name it once"
            )
        )
    return positions


# Transforms that differentiate all of their positional arguments.
_OF_PRIMALS = ("hvp", "jvp", "linear_transpose", "linearize", "vhp", "vjp")


def need_differentiable(
    leaves: list[Any], args: Sequence[Any], chosen: Sequence[int], name: str
) -> None:
    """Raise unless one of `leaves`, those of the chosen arguments, can be differentiated."""
    if any(is_differentiable(leaf) for leaf in leaves):
        return
    by_position = name in _OF_PRIMALS
    called = "primals" if by_position else "args"
    named = [pair for at in chosen for pair in named_leaves(f"{called}[{at}]", args[at])]
    other = "" if by_position else ", or choose another argument with argnums"
    raise NotDifferentiableError(
        message(
            f"{name} has nothing to differentiate: no floating-point or complex tensor",
            *(_listing(named) or [f"{called} holds no leaf"]),
            f"to fix: pass a tensor converted with .float(){other}",
        )
    )


def as_pair(name: str, primals: Any, tangents: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Primals and tangents as two tuples.

    Raises:
        StructureError: If one of them is neither a tuple nor a list.
    """
    if isinstance(primals, (tuple, list)) and isinstance(tangents, (tuple, list)):
        return tuple(primals), tuple(tangents)
    raise StructureError(
        message(
            f"{name} got primals of type {type(primals).__name__} and tangents of type "
            f"{type(tangents).__name__}",
            "to fix: pass a tuple of arguments and a tuple of their tangents",
        )
    )


def need_complex(called: str, tree: Any, name: str) -> None:
    """Raise if a differentiable leaf of a tree is real, for `holomorphic=True`.

    Args:
        called: How messages call the tree.
        tree: Arguments, or an output.
        name: The transform.

    Raises:
        NotDifferentiableError: If there is such a leaf.
    """
    for path, leaf in named_leaves(called, tree):
        if is_differentiable(leaf) and not leaf.is_complex():
            raise NotDifferentiableError(
                message(
                    f"{name} got holomorphic=True, but not everything is complex",
                    f"{path}: {describe(leaf)}",
                    "to fix: leave holomorphic out, or convert with .to(torch.complex64)",
                )
            )


def scalar_loss(
    interpreter: Any, values: list[Any], spec: Any, *, holomorphic: bool = False
) -> Any:
    """The loss, if it is one tensor of shape (): complex if `holomorphic`, else real.

    Raises:
        NonScalarLossError: If it is not.
    """
    if spec.is_leaf() and isinstance(values[0], Tensor):
        loss = values[0]
        if loss.dim():
            single = loss.numel() == 1
            raise interpreter.error(
                NonScalarLossError,
                f"grad needs a loss of shape [], got one of shape {list(loss.shape)}",
                "to fix: take its one element, with .squeeze()"
                if single
                else "to fix: reduce it, with .sum() or .mean()",
            )
        if holomorphic and not loss.is_complex():
            raise interpreter.error(
                NonScalarLossError,
                f"grad got holomorphic=True, but a loss of dtype {loss.dtype}",
                "to fix: leave holomorphic out, for the gradient of a real loss",
            )
        if not holomorphic and not loss.is_floating_point():
            raise interpreter.error(
                NonScalarLossError,
                f"grad needs a real floating-point loss, got one of dtype {loss.dtype}",
                "to fix: take its real part, or pass holomorphic=True for a complex derivative"
                if loss.is_complex()
                else "to fix: compute the loss with floating-point tensors",
            )
        return loss
    named = named_leaves("output", pytree.unflatten(spec, values))
    raise interpreter.error(
        NonScalarLossError,
        "grad needs a loss that is one tensor",
        *(_listing(named) or ["the output holds no leaf"]),
        "to fix: return the loss alone, or (loss, aux) with has_aux=True",
    )


def split_aux(out: Any, interpreter: Any) -> tuple[Any, Any]:
    """The two parts of what a function returned with `has_aux=True`."""
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        got = (
            f"a {type(out).__name__} of length {len(out)}"
            if isinstance(out, (tuple, list))
            else describe(out)
        )
        raise interpreter.error(
            StructureError,
            "what the function returns should be a tuple: (output, aux) if has_aux is True",
            f"it returned: {got}",
            "to fix: return (output, aux)",
        )
    return out[0], out[1]


def match(
    given: Any, wanted: list[Any], spec: Any, what: str, of: str, absent: str = "None for zero"
) -> list[Any]:
    """Cotangents or tangents as one list, each checked against the value it belongs to.

    Args:
        given: The tree of cotangents or tangents.
        wanted: The `likes` of the leaves they belong to.
        spec: The structure that these have.
        what: How messages name `given`, in the plural.
        of: How messages name the values.
        absent: What messages say of None.

    Raises:
        TangentError: If the structure, a shape or a dtype differs.
    """
    found, given_spec = pytree.flatten(given)
    if given_spec != spec:
        raise TangentError(
            message(
                f"the structure of {what} is not that of {of}",
                f"{of}: {structure_text(spec)}",
                f"{what}: {structure_text(given_spec)}",
                f"to fix: pass one entry of {what} for each leaf of {of}, {absent}",
            )
        )
    for i, (ct, like) in enumerate(zip(found, wanted, strict=True)):
        if ct is None or like is None:
            found[i] = None
            continue
        if not isinstance(ct, Tensor) or (ct.shape, ct.dtype) != like:
            path = spec.accessors()[i].codify("")
            raise TangentError(
                message(
                    f"{what}{path} does not match {of}{path}",
                    f"{of}{path}: {_described(*like)}",
                    f"{what}{path}: {describe(ct)}",
                    f"to fix: pass a tensor of the same shape and dtype, or {absent}",
                )
            )
    return found


ABSENT = "None for zero (1 of a number)"


def seeded(cts: list[Any], wanted: list[Any], devices: list[Any], spec: Any) -> list[Any]:
    """Cotangents with a 1 in place of each None that belongs to a real number, as in `backward()`.

    Raises:
        TangentError: If all are None, and one belongs to what is no number.
    """
    given = any(ct is not None for ct in cts)
    for i, (ct, like, device) in enumerate(zip(cts, wanted, devices, strict=True)):
        if ct is not None or like is None:
            continue
        shape, dtype = like
        if shape.numel() == 1 and not dtype.is_complex:
            cts[i] = torch.ones(shape, dtype=dtype, device=device)
        elif not given:
            path = spec.accessors()[i].codify("")
            raise TangentError(
                message(
                    f"no cotangent is given, and 1 can only be meant for real numbers: "
                    f"output{path} is none",
                    f"output{path}: {_described(*like)}",
                    f"to fix: pass a tensor like it as cotangents{path}",
                )
            )
    return cts


def structure_text(spec: Any) -> str:
    """The structure of a tree, with a star for each leaf: `{'b': *, 'w': *}`."""
    text = re.sub(r"(, NoneIsLeaf)?(, namespace='\w*')?\)$", "", str(spec))
    return text.removeprefix("PyTreeSpec(")
