"""Torch's own registry of nested containers, which ours honours."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree  # noqa: F401 - torch may import it on demand

from lamina_core.torch_hooks.doors import door

__all__ = ["TORCH_NODES", "GetAttrKey", "MappingKey", "NodeDef"]

TORCH_NODES: Any = door("torch.utils._pytree.SUPPORTED_NODES", "containers registered with torch")
GetAttrKey: Any = door("torch.utils._pytree.GetAttrKey", "naming a place in a container")
MappingKey: Any = door("torch.utils._pytree.MappingKey", "naming a place in a container")
NodeDef: Any = door("torch.utils._pytree.NodeDef", "containers registered with torch")
