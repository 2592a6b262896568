"""The state of C++ autograd: is it on, is a forward level of PyTorch's own active, who runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from lamina_core.torch_hooks.doors import door

__all__ = [
    "enter_dual_level",
    "exit_dual_level",
    "forward_ad",
    "forward_enabled",
    "functorch_depth",
    "functorch_is_active",
    "make_dual",
    "replace_engine",
    "run_engine",
    "set_grad_enabled",
    "unpack_dual",
]

# `torch.set_grad_enabled` does the same through a context manager, at three times the price.
set_grad_enabled = door("torch._C._set_grad_enabled", "the grad mode of the caller")

# Read as `forward_ad._current_level`, as a function around it would cost each op 60 ns.
door("torch.autograd.forward_ad._current_level", "whether the caller differentiates forward")
forward_enabled = door("torch.autograd.forward_ad._set_fwd_grad_enabled", "borrowed tangents")

# Not one of its transforms: whether code of torch.func is running between us and the user.
functorch_is_active = door("torch._C._are_functorch_transforms_active", "telling its levels apart")

# How many levels of torch.func there are, to notice those that we would be among.
functorch_depth = door(
    "torch._C._functorch.get_dynamic_layer_stack_depth", "refusing torch.func inside us inside it"
)

# What `forward_ad` calls. Its own functions first load decompositions, which takes seconds.
_CONVENTIONS = "the conventions of forward mode"
enter_dual_level = door("torch._C._enter_dual_level", _CONVENTIONS)
exit_dual_level = door("torch._C._exit_dual_level", _CONVENTIONS)
make_dual = door("torch._VF._make_dual", _CONVENTIONS)
unpack_dual = door("torch._VF._unpack_dual", _CONVENTIONS)

# Every call of the engine passes through this function, looked up by name each time.
run_engine = door("torch.autograd._engine_run_backward", "errors for tensors of a transform")


def replace_engine(replacement: Any) -> None:
    """Have `torch.autograd.grad` and `.backward()` call something else than `run_engine`."""
    torch.autograd._engine_run_backward = replacement  # type: ignore[attr-defined]
