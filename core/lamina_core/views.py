"""Views of wrappers: how they are noted, brought up to date, and noticed to have changed.

See NOTE [Writes] in `lamina_core.alias` for what this serves.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.errors import MutationError
from lamina_core.level import Level
from lamina_core.overloads import aten
from lamina_core.recipe import ViewRecipe
from lamina_core.scopes import derivatives_on, run_at
from lamina_core.tensors import tensors_in
from lamina_core.torch_hooks.modes import mode_count
from lamina_core.torch_hooks.tensors import is_alias_of
from lamina_core.wrapper import LevelTensor

__all__ = [
    "become_former",
    "detach_in_place",
    "handed_out",
    "record_views",
    "refresh",
    "refresh_all",
    "refresh_levels",
    "stamp",
]

_CLASSES = LevelTensor.classes
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DETACH = aten.detach.default


def record_views(out: Any, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give the outputs of a view op their recipes, and return them."""
    parent = args[0]
    if isinstance(out, (list, tuple)):
        for index, item in enumerate(out):
            item.recipe = ViewRecipe(parent, op, args[1:], kwargs, index)
    elif out is not parent:
        out.recipe = ViewRecipe(parent, op, args[1:], kwargs, None)
    return out


def refresh(interpreter: Level, view: LevelTensor) -> None:
    """Bring a view up to date with its base: a loop, as views of views may be many."""
    chain = []
    while view.recipe is not None:
        if view.recipe.parent.reshaped > view.recipe.version:
            _relink(view.recipe)
        chain.append(view)
        view = view.recipe.parent
    for stale in reversed(chain):
        recipe: Any = stale.recipe
        if recipe.parent.version != recipe.version:
            _replay(interpreter, stale, recipe)


def _relink(recipe: ViewRecipe) -> None:
    """Let a view be one of what its parent was before the parent was changed in place."""
    while recipe.parent.reshaped > recipe.version:
        recipe.parent = recipe.parent.former


def become_former(interpreter: Level, tensor: LevelTensor) -> LevelTensor:
    """What takes the place of a tensor, for the views it has, before it is changed in place."""
    with run_at(interpreter):
        former: Any = tensor.view_as(tensor)
    for name in ("recipe", "version", "reshaped", "former"):
        setattr(former, name, getattr(tensor, name))
    tensor.version += 1
    tensor.reshaped = tensor.version
    tensor.former = former
    return former


def detach_in_place(interpreter: Level, tensor: LevelTensor) -> LevelTensor:
    """`x.detach_()`: the same value, which is a constant from now on. Views keep what they have.

    Raises:
        MutationError: If it is a view, which PyTorch refuses as well.
    """
    if tensor.recipe is not None:
        raise interpreter.error(
            MutationError,
            "aten.detach_.default is called on a view",
            f"it has shape {list(tensor.shape)}",
            "to fix: use x.detach(), which is another tensor",
        )
    # Under `no_grad` a rebinding would leave what reverse mode knows.
    with derivatives_on(interpreter):
        with run_at(interpreter):
            constant: Any = tensor.detach()
        interpreter.rebind(tensor, constant)
    return tensor


def _replay(interpreter: Level, view: LevelTensor, recipe: ViewRecipe) -> None:
    """Make a view again, from a parent that is up to date."""
    parent = recipe.parent
    # Who asks for the view under `no_grad` is not who made it: others may differentiate it.
    with derivatives_on(interpreter):
        with run_at(interpreter):
            out = recipe.op(parent, *recipe.args, **recipe.kwargs)
        interpreter.rebind(view, out if recipe.index is None else out[recipe.index])
    recipe.version = parent.version
    view.version += 1


def handed_out(output: Any, value: Any) -> Any:
    """The value of an output, for code outside all transforms.

    A view of an argument was made behind the back of PyTorch's autograd. There it is a view again,
    so that a write to it reaches the graph of the argument. What `detach` has cut off stays so.
    """
    if type(output) not in _CLASSES or output.recipe is None or type(value) is not torch.Tensor:
        return value
    while output.recipe is not None:
        if output.recipe.op is _DETACH:
            return value
        output = output.recipe.parent
    base = output.value
    if (
        not output.is_input
        or type(base) not in _PLAIN
        or base.requires_grad
        or base.is_inference()
        or (base.dtype, base.is_conj(), base.is_neg()) != (value.dtype, False, False)
        or value.is_conj()
        or value.is_neg()
        or value._is_view()
        or not is_alias_of(value, base)
        or mode_count()
    ):
        return value
    return base.as_strided(value.shape, value.stride(), value.storage_offset())


def stamp(tensor: Any) -> Any:
    """What changes when a tensor, or one it is a view of, is written to at any level.

    None for an inference tensor, which keeps no version.
    """
    # HOT: each residual of a tape above another level is asked twice; this costs such a tape 3 %.
    if type(tensor) in _CLASSES and tensor.recipe is None:
        value = tensor.value
        if type(value) is torch.Tensor and not value.is_inference():
            return tensor.version, value._version
    versions = []
    while type(tensor) in _CLASSES:
        if not (tensor.is_lifted and tensor.version == 0):  # it stands for the plain tensor alone
            versions.append(tensor.version)
        recipe = tensor.recipe
        while recipe is not None:
            versions.append(recipe.parent.version)
            recipe = recipe.parent.recipe
        tensor = tensor.value
    try:
        version = tensor._version
    except RuntimeError:
        version = None
    return (*versions, version) if versions else version


def refresh_all(interpreter: Level, args: Any, kwargs: dict[str, Any]) -> None:
    """Bring all views of this level among the arguments of an op up to date."""
    for tensor in tensors_in(args, kwargs):
        if interpreter.is_own(tensor) and tensor.recipe is not None:
            refresh(interpreter, tensor)


def refresh_levels(tensors: Any) -> None:
    """Bring views up to date at every level, for code that asks what a wrapper carries."""
    for tensor in tensors:
        while type(tensor) in _CLASSES:
            interpreter = tensor.interpreter
            if interpreter.mutated and interpreter.alive and tensor.recipe is not None:
                refresh(interpreter, tensor)
            tensor = tensor.value
