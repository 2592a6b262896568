"""Torch's registry of ops: which there are, and which layer has a kernel of which."""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.torch_hooks.doors import door

__all__ = [
    "CustomOp",
    "OpOverload",
    "all_op_names",
    "custom_ops",
    "decompositions",
    "has_kernel",
    "has_kernel_for",
]

OpOverload: Any = door("torch._ops.OpOverload", "telling an overload from a packet of them")

all_op_names = door("torch._C._dispatch_get_all_op_names", "families of ops, and the coverage")
has_kernel = door("torch._C._dispatch_has_kernel", "whether an op can be decomposed")
has_kernel_for = door(
    "torch._C._dispatch_has_kernel_for_dispatch_key", "whether an op has a derivative of its own"
)
decompositions = door("torch._decomp.decomposition_table", "ops that are made of others")
CustomOp: Any = door("torch._library.custom_ops.CustomOpDef", "the overload of a user's op")
custom_ops = door("torch._library.custom_ops.OPDEFS", "rules that users registered for an op")
FakeTensor: Any = door("torch._subclasses.FakeTensor", "tensors without values")

# Where torch keeps its own Python bindings of ops, which parse arguments in half the time.
BINDINGS = (
    torch,
    door("torch._C._nn", "fast bindings of ops"),
    door("torch._C.TensorBase", "fast bindings of ops"),
)
