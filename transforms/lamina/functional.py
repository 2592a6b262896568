"""Parameters as arguments: `functional_call` and `stack_module_state`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call as _functional_call

from lamina.autodiff.swapped import Swap, given_back, reached_twice, swapping, under_one_name
from lamina_core.errors import StructureError, message

__all__ = ["functional_call", "stack_module_state"]


def functional_call(
    module: torch.nn.Module,
    parameter_and_buffer_dicts: dict[str, Any] | Sequence[dict[str, Any]],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Call a module with the given tensors in place of its parameters and buffers.

    Args:
        module: The module to call; it holds its own tensors again when the call is over.
        parameter_and_buffer_dicts: Tensors by name, in one dict or in several with other names.
        args: The positional arguments; anything but a tuple is the only one.
        kwargs: The keyword arguments.
        tie_weights: Whether tensors that the module shares between names stay shared.
        strict: Whether to raise for names that are missing or unknown.

    Returns:
        What the module returns. Parts of it under `torch.utils.checkpoint` see the given tensors
        in their second run too.

    Example:
        >>> import torch
        >>> from lamina import functional_call, grad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([1.0, 2.0])
        >>> loss = lambda params: functional_call(model, params, (x,)).sum()
        >>> grad(loss)({"weight": torch.zeros(1, 2)})
        {'weight': tensor([[1., 2.]])}
    """
    dicts = parameter_and_buffer_dicts
    several: Any = dicts if isinstance(dicts, (list, tuple)) else [dicts]
    tensors = {k: v for d in several if isinstance(d, dict) for k, v in d.items()}
    with swapping(Swap(module, tensors, tie_weights, strict)):
        twice = reached_twice(module)
        if not twice:
            return _functional_call(
                module, dicts, args, kwargs, tie_weights=tie_weights, strict=strict
            )
        # Asked to be strict about names, PyTorch wants to see each of them.
        again = {} if strict and not tie_weights else under_one_name(module, tensors)
        once = {name: tensor for name, tensor in tensors.items() if name not in again}
        try:
            with given_back(twice):
                return _functional_call(
                    module, once, args, kwargs, tie_weights=tie_weights, strict=strict
                )
        finally:
            # What the call wrote to buffers is seen in the dicts that were given.
            for given in several:
                given.update({name: once[again.get(name, name)] for name in given})


_Look = tuple[torch.dtype, torch.Size, bool]  # the last: whether it requires grad


def stack_module_state(
    models: Sequence[torch.nn.Module],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stack the parameters and buffers of models of one architecture, for `vmap` over the models.

    Args:
        models: Modules of one class, all in train mode or all in eval mode.

    Returns:
        Parameters and buffers by name, each stacked along a new dim 0. Parameters are leaves that
        require grad where the models' parameters do.

    Raises:
        StructureError: If there is no model, or classes or modes differ.

    Example:
        >>> import torch
        >>> from lamina import functional_call, stack_module_state, vmap
        >>> models = [torch.nn.Linear(3, 2) for _ in range(4)]
        >>> params, buffers = stack_module_state(models)
        >>> x = torch.ones(3)
        >>> call = lambda params, buffers: functional_call(models[0], (params, buffers), (x,))
        >>> vmap(call)(params, buffers).shape
        torch.Size([4, 2])
    """
    if isinstance(models, torch.nn.Module) or not models:
        got = "no model" if isinstance(models, (list, tuple)) else f"a {type(models).__name__}"
        raise StructureError(
            message(f"stack_module_state got {got}", "to fix: pass a list of at least one model")
        )
    params = [dict(model.named_parameters()) for model in models]
    buffers = [dict(model.named_buffers()) for model in models]
    wanted = _looks(params[0], buffers[0])
    for i, model in enumerate(models):
        _check_classes(models[0], model, i)
        _check_tensors(wanted, _looks(params[i], buffers[i]), i)
    return (
        {name: _stack([of[name] for of in params]) for name in params[0]},
        {name: torch.stack([of[name] for of in buffers]) for name in buffers[0]},
    )


def _check_classes(first: torch.nn.Module, model: torch.nn.Module, index: int) -> None:
    """Raise unless a model has the class and the mode of the first."""
    kinds = type(first).__name__, type(model).__name__
    if type(first) is not type(model):
        raise StructureError(
            message(
                "the models have different classes",
                f"models[0] is a {kinds[0]}, models[{index}] a {kinds[1]}",
                "to fix: stack the models of each class by themselves",
            )
        )
    modes = ["train" if one.training else "eval" for one in (first, model)]
    if modes[0] != modes[1]:
        raise StructureError(
            message(
                "some models are in train mode and some in eval mode",
                f"models[0] is in {modes[0]} mode, models[{index}] in {modes[1]} mode",
                "to fix: call .train() or .eval() on all of them",
            )
        )


def _check_tensors(wanted: dict[str, _Look], found: dict[str, _Look], index: int) -> None:
    """Raise unless a model has the kinds of tensors of the first."""
    if found == wanted:
        return
    name = min(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    raise StructureError(
        message(
            f"the models differ in {name!r}",
            f"models[0] has {_shown(wanted.get(name))}",
            f"models[{index}] has {_shown(found.get(name))}",
            "to fix: stack models of one architecture, with requires_grad set alike",
        )
    )


def _looks(params: dict[str, Any], buffers: dict[str, Any]) -> dict[str, _Look]:
    named = {**params, **buffers}
    return {name: (t.dtype, t.shape, t.requires_grad) for name, t in named.items()}


def _shown(look: _Look | None) -> str:
    if look is None:
        return "none"
    dtype, shape, requires_grad = look
    return f"a {dtype} tensor of shape {list(shape)}" + " that requires grad" * requires_grad


def _stack(tensors: list[Any]) -> Any:
    stacked = torch.stack([tensor.detach() for tensor in tensors])
    return stacked.requires_grad_(tensors[0].requires_grad)
