"""Ops that give a tensor other memory: a wrapper has none of its own to give up, or to lend.

Their kernels take a tensor, or its storage, for what it is below Python, and end the process where
there is no memory behind it.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.errors import MutationError, message
from lamina_core.schema import facts
from lamina_core.tensors import tensors_in
from lamina_core.wrapper import LevelTensor

__all__ = ["exchanges_memory", "refuse_exchange"]

_NAMES = frozenset(("aten::set", "aten::set_", "inductor::resize_storage_bytes_"))
_CLASSES = LevelTensor.classes


def exchanges_memory(op: Any) -> bool:
    """Whether an op gives its first argument other memory."""
    return op._schema.name in _NAMES


def refuse_exchange(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
    """Refuse to give a wrapper other memory, and to give a tensor that of a wrapper.

    Raises:
        MutationError: If there is a wrapper, or the storage of one, among the arguments.
    """
    values = (*args, *kwargs.values())
    if any(type(t) in _CLASSES for t in tensors_in(args, kwargs)) or any(map(_is_empty, values)):
        raise MutationError(
            message(
                f"{facts(op).name} exchanges the memory of a tensor",
                where,
                "a tensor of a transform, whether an argument of it or made inside, has none",
                "to fix: go on with the other tensor, or write its values by x.copy_(other)",
            )
        )


def _is_empty(value: Any) -> bool:
    """Whether a value is the storage of a wrapper, which nobody can read."""
    if not isinstance(value, torch.UntypedStorage):
        return False
    try:
        value.data_ptr()
    except RuntimeError:
        return True
    return False
