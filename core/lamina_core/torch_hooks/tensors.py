"""Tensors without storage, and what can be asked of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamina_core.torch_hooks.doors import door

__all__ = [
    "TensorMeta",
    "is_alias_of",
    "make_wrapper",
    "no_torch_function",
    "torch_function_off",
]

make_wrapper = door("torch.Tensor._make_wrapper_subclass", "wrappers: tensors without storage")
no_torch_function = door(
    "torch._C._disabled_torch_function_impl", "ops on wrappers reach dispatch unseen"
)
is_alias_of = door("torch._C._is_alias_of", "whether an op gave a view or a copy")
torch_function_off = door(
    "torch._C.DisableTorchFunctionSubclass",
    "what an index without dims is given to is run as it is",
)
if TYPE_CHECKING:
    from torch._C import _TensorMeta as TensorMeta
else:
    TensorMeta = door("torch._C._TensorMeta", "the class of tensor classes, which wrappers extend")
