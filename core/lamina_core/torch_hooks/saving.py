"""What C++ autograd saves for its backward pass, and who is asked about it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch.utils.checkpoint

from lamina_core.torch_hooks.doors import door

__all__ = [
    "GraphExecGroup",
    "checkpoint_by_hooks",
    "checkpoint_hook",
    "graph_group",
    "keep_checkpoint_inputs",
    "pop_saved_hooks",
    "push_saved_hooks",
    "recomputation_hook",
    "set_graph_group",
]

push_saved_hooks = door(
    "torch._C._autograd._push_saved_tensors_default_hooks", "residuals of borrowed formulas"
)
pop_saved_hooks = door(
    "torch._C._autograd._pop_saved_tensors_default_hooks", "residuals of borrowed formulas"
)

_ONE_PASS = "checkpoints: which calls belong to one backward pass"
GraphExecGroup: Any = door("torch.utils.checkpoint.GraphExecGroup", _ONE_PASS)
graph_group = door("torch._C._get_graph_exec_group", _ONE_PASS)
set_graph_group = door("torch._C._set_graph_exec_group", _ONE_PASS)

_KIND = "checkpoints: hooks that run the function again, unlike others"
checkpoint_hook: Any = door("torch.utils.checkpoint._checkpoint_hook", _KIND)
recomputation_hook: Any = door("torch.utils.checkpoint._recomputation_hook", _KIND)

_Reentrant: Any = door(
    "torch.utils.checkpoint.CheckpointFunction", "checkpoints that call a backward in their own"
)


def checkpoint_by_hooks(is_active: Callable[[], bool]) -> None:
    """Have a reentrant checkpoint inside a transform use hooks, as one that is not reentrant does.

    It would run the function again on a graph of C++ and call that one's backward pass, which knows
    nothing of the transform. Both keep the arguments and compute the rest a second time.
    """

    def apply(cls: Any, function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        if not is_active():
            return super(_Reentrant, cls).apply(function, preserve_rng_state, *args)
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )

    _Reentrant.apply = classmethod(apply)


def keep_checkpoint_inputs(is_active: Callable[[], bool]) -> None:
    """Have a checkpoint inside a transform keep its arguments as they are.

    Torch 2.11 gets them back from the context of an `autograd.Function` that saves them, by its
    place in a graph of C++; later versions keep them themselves.
    """
    usual = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)
    if usual is None:
        return

    def apply(*inputs: Any) -> Any:
        if not is_active():
            return usual.apply(*inputs)
        if not torch.is_grad_enabled():
            return SimpleNamespace(grad_fn=None)
        kept = SimpleNamespace(saved_tensors=(), get_args=lambda saved: list(inputs[1:]))
        return SimpleNamespace(grad_fn=kept)

    torch.utils.checkpoint._NoopSaveInputs = SimpleNamespace(apply=apply)  # type: ignore[attr-defined]
