"""The inverse of a view op: its base, with the region that the view covers replaced."""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.errors import MutationError
from lamina_core.level import Level
from lamina_core.recipe import ViewRecipe
from lamina_core.schema import OpFacts
from lamina_core.wrapper import LevelTensor

__all__ = ["refuse_repeated", "scatter", "shows_twice"]

aten = torch.ops.aten


def scatter(view: Any, new: Any) -> tuple[Any, Any]:
    """What a write to a view means for what it is a view of: that tensor, and its new value.

    Beneath a view that shows an element twice (`expand`, overlapping windows) its tensor is the one
    to write to: its other elements show what was written as well.
    """
    path = _path(view)
    recipe = path[0]
    parent, op = recipe.parent, recipe.op
    inverse = _INVERSES.get(op._schema.name)
    if len(path) > 1:
        return path[-1].parent, _scatter_by_index(path, new)
    if op is aten.view.dtype:
        return parent, _same_bits(recipe, new)
    if inverse is not None:
        return parent, inverse(parent, new, *recipe.args, **recipe.kwargs)
    return parent, _scatter_by_index(path, new)


def _path(view: Any) -> list[ViewRecipe]:
    """The recipes from a view to where no element is shown twice; the first at least."""
    recipes = []
    while view.recipe is not None:
        recipes.append(view.recipe)
        view = view.recipe.parent
    repeating = [at for at, recipe in enumerate(recipes) if recipe.op._schema.name in _REPEATING]
    return recipes[: 1 + max(repeating, default=0)]


_REPEATING = frozenset(
    f"aten::{name}" for name in ("as_strided", "broadcast_to", "expand", "expand_as", "unfold")
)


def shows_twice(tensor: Any) -> bool:
    """Whether a view, or an argument, has an element in several places, as `expand` leaves it.

    A value of such strides that is neither is dense where code outside would have it.
    """
    if tensor.is_contiguous() or 0 not in _strides(tensor):
        return False
    while tensor.recipe is not None:
        if tensor.recipe.op._schema.name in _REPEATING:
            return True
        tensor = tensor.recipe.parent
    return bool(tensor.is_input)


# These write one value to all places, also to those that are one place.
_IDEMPOTENT = (aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)


def refuse_repeated(interpreter: Level, known: OpFacts, target: Any) -> None:
    """Refuse a write to a tensor several elements of which are one place, as PyTorch does.

    Raises:
        MutationError: If it is one, and the op does not write the same value to all places.
    """
    if shows_twice(target) and known.op not in _IDEMPOTENT:
        raise interpreter.error(
            MutationError,
            f"{known.name} writes to an expanded tensor",
            f"it has shape {list(target.shape)} and strides {list(target.stride())}: elements that "
            "share a single memory location",
            "to fix: write to a clone() of it",
        )


def _same_bits(recipe: ViewRecipe, new: Any) -> Any:
    """The bits of a view with another dtype; that has no derivative unless it is the same one."""
    parent = recipe.parent
    if new.dtype != parent.dtype:
        if _has_derivative(parent) or _has_derivative(new):
            raise parent.interpreter.error(
                MutationError,
                f"cannot write through {recipe.op}, which views {parent.dtype} as {new.dtype} "
                "under a derivative",
                "to fix: write to the tensor itself, with values of its own dtype",
            )
        new = new.contiguous().view(parent.dtype)
    return new.reshape(parent.shape)


def _has_derivative(tensor: Any) -> bool:
    while type(tensor) in LevelTensor.classes:
        level = tensor.interpreter
        if level.differentiates and not level.is_constant(tensor):
            return True
        tensor = tensor.value
    return bool(tensor.requires_grad)


def _scatter_by_index(path: list[ViewRecipe], new: Any) -> Any:
    """Any views that only move elements: replay them on their numbers to see which they show.

    The numbers are laid out like the base, for a view that goes by its strides, and so is the
    result.
    """
    base, by_strides = path[-1].parent, path[-1].op is aten.as_strided.default
    if new.dtype != base.dtype:
        raise base.interpreter.error(
            MutationError,
            f"cannot write through {path[-1].op}, which views {base.dtype} as {new.dtype}",
            "to fix: write to the tensor itself, with values of its own dtype",
        )
    strides = base.stride()
    order = sorted(range(base.dim()), key=lambda dim: -strides[dim])
    inverse = sorted(range(base.dim()), key=order.__getitem__)
    dense = base.permute(order)
    numbers = torch.arange(base.numel(), device=base.device).reshape(dense.shape)
    numbers = numbers.permute(inverse)
    if by_strides and _strides(numbers) != _strides(base):
        raise base.interpreter.error(
            MutationError,
            f"cannot write through {path[-1].op} of a tensor with gaps between its elements",
            f"it has shape {list(base.shape)} and strides {list(strides)}",
            "to fix: take the view of what it is a view of, or of a contiguous tensor",
        )
    for recipe in reversed(path):
        numbers = recipe.op(numbers, *recipe.args, **recipe.kwargs)
        numbers = numbers if recipe.index is None else numbers[recipe.index]
    flat = dense.reshape(-1).index_put((numbers.reshape(-1),), new.reshape(-1))
    return flat.reshape(dense.shape).permute(inverse)


def _strides(x: Any) -> list[int]:
    """The strides that say something."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _reshaped(parent: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
    return new.reshape(parent.shape)


def _narrowed(parent: Any, new: Any, dim: int, start: Any, length: int) -> Any:
    places = (start + torch.arange(length, device=start.device)) % max(parent.shape[dim], 1)
    return parent.index_copy(dim, places, new)


def _same(parent: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
    return new


def _permuted(parent: Any, new: Any, dims: Any) -> Any:
    rank = parent.dim()
    inverse = [0] * rank
    for position, dim in enumerate(dims):
        inverse[dim % rank] = position
    return new.permute(inverse)


def _imaginary(parent: Any, new: Any) -> Any:
    return torch.complex(torch.real(parent), new)


def _real(parent: Any, new: Any) -> Any:
    return torch.complex(new, torch.imag(parent))


_INVERSES: dict[str, Any] = {
    "aten::_conj": lambda parent, new: torch.conj(new),
    "aten::_neg_view": lambda parent, new: -new,
    "aten::_reshape_alias": _reshaped,
    "aten::_unsafe_view": _reshaped,
    "aten::alias": _same,
    "aten::detach": _same,
    "aten::diagonal": lambda parent, new, *a, **k: torch.diagonal_scatter(parent, new, *a, **k),
    "aten::flatten": _reshaped,
    "aten::imag": _imaginary,
    "aten::narrow": _narrowed,  # of a start that is a tensor; others are slices
    "aten::permute": _permuted,
    "aten::real": _real,
    "aten::reshape": _reshaped,
    "aten::select": lambda parent, new, dim, index: torch.select_scatter(parent, new, dim, index),
    "aten::slice": lambda parent, new, *a, **k: torch.slice_scatter(parent, new, *a, **k),
    "aten::squeeze": _reshaped,
    "aten::t": lambda parent, new: new.t(),
    "aten::transpose": lambda parent, new, first, second: new.transpose(first, second),
    "aten::unflatten": _reshaped,
    "aten::unsqueeze": _reshaped,
    "aten::view": _reshaped,
    "aten::view_as": _reshaped,
    "aten::view_as_complex": lambda parent, new: torch.view_as_real(new),
    "aten::view_as_real": lambda parent, new: torch.view_as_complex(new.contiguous()),
}
