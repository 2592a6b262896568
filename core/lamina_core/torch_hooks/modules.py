"""Modules whose tensors stand for others for a while."""

from __future__ import annotations

from lamina_core.torch_hooks.doors import door

__all__ = ["with_tensors"]

with_tensors = door(
    "torch.nn.utils.stateless._reparametrize_module", "checkpoints inside `functional_call`"
)
