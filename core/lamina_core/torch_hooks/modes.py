"""Torch's stack of dispatch modes, of which the innermost sees an op first."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

from lamina_core.torch_hooks.doors import door

__all__ = [
    "DispatchMode",
    "disable_function_modes",
    "disable_modes",
    "function_mode_count",
    "mode_at",
    "mode_count",
    "pop_mode",
    "push_mode",
    "tracing_state",
]

disable_modes: Any = door("torch.utils._python_dispatch._disable_current_modes", "metadata alone")
disable_function_modes: Any = door("torch._C.DisableTorchFunction", "metadata alone")

# Not through `with mode`: that counts in globals for which threads would race.
push_mode = door("torch._C._push_on_torch_dispatch_stack", "switching the mode of a thread on")
pop_mode = door("torch._C._pop_torch_dispatch_stack", "switching the mode of a thread off")
tracing_state = door("torch._C._get_tracing_state", "noticing torch.jit.trace")
mode_count = door("torch._C._len_torch_dispatch_stack", "whether user code or a rule is running")
mode_at = door("torch._C._get_dispatch_stack_at", "finding the mode of a thread")
function_mode_count = door(
    "torch._C._len_torch_function_stack", "whether the user's function modes want to see an op"
)
