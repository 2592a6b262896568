"""Parameters as arguments: `functional_call` and `stack_module_state`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call

from lamina_core.errors import StructureError, message

__all__ = ["functional_call", "stack_module_state"]


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
    if not models:
        raise StructureError(
            message("stack_module_state got no model", "to fix: pass at least one")
        )
    kinds = {type(model) for model in models}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise StructureError(
            message(f"the models have different classes: {names}", "to fix: stack each class apart")
        )
    if len({model.training for model in models}) > 1:
        raise StructureError(
            message(
                "some models are in train mode and some in eval mode",
                "to fix: call .train() or .eval() on all of them",
            )
        )
    params = {
        name: _stack([dict(model.named_parameters())[name] for model in models], name)
        for name, _ in models[0].named_parameters()
    }
    buffers = {
        name: torch.stack([dict(model.named_buffers())[name] for model in models])
        for name, _ in models[0].named_buffers()
    }
    return params, buffers


def _stack(tensors: list[Any], name: str) -> Any:
    wants = {tensor.requires_grad for tensor in tensors}
    if len(wants) > 1:
        raise StructureError(
            message(
                f"parameter {name!r} requires grad in some models and not in others",
                "to fix: call requires_grad_ on all of them alike",
            )
        )
    stacked = torch.stack([tensor.detach() for tensor in tensors])
    return stacked.requires_grad_(wants.pop())
