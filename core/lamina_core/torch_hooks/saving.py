"""What C++ autograd saves for its backward pass, and who is asked about it."""

from __future__ import annotations

from typing import Any

import torch.utils.checkpoint  # noqa: F401 - torch imports it on demand

from lamina_core.torch_hooks.doors import door

__all__ = [
    "GraphExecGroup",
    "checkpoint_hook",
    "graph_group",
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
