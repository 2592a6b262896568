"""The inverse of a view op: its base, with the region that the view covers replaced."""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.errors import MutationError
from lamina_core.recipe import ViewRecipe

__all__ = ["scatter"]

aten = torch.ops.aten


def scatter(recipe: ViewRecipe, new: Any) -> Any:
    """The parent of a view, with the region that the view covers replaced by `new`."""
    parent, op = recipe.parent, recipe.op
    inverse = _INVERSES.get(op._schema.name)
    if inverse is not None and op is not aten.view.dtype:
        return inverse(parent, new, *recipe.args, **recipe.kwargs)
    return _scatter_by_index(recipe, new)


def _scatter_by_index(recipe: ViewRecipe, new: Any) -> Any:
    """Any view that only moves elements: replay it on their numbers to see which it shows."""
    parent = recipe.parent
    if new.dtype != parent.dtype:
        raise parent.interpreter.error(
            MutationError,
            f"cannot write through {recipe.op}, which views {parent.dtype} as {new.dtype}",
            "to fix: write to the tensor itself, with values of its own dtype",
        )
    numbers = torch.arange(parent.numel(), device=parent.device).reshape(parent.shape)
    seen = recipe.op(numbers, *recipe.args, **recipe.kwargs)
    seen = seen if recipe.index is None else seen[recipe.index]
    flat = parent.reshape(-1).index_put((seen.reshape(-1),), new.reshape(-1))
    return flat.reshape(parent.shape)


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
