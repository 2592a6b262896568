"""What a policy of `checkpoint` keeps: the outputs of calls, where they are or on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lamina_core import pytree
from lamina_core.torch_hooks.keys import DispatchKey, SetExcluded

__all__ = ["DROP", "Call", "Kept", "Offload", "storage_of"]

Tensor = torch.Tensor


class _Drop:
    """Not kept, even if another call of the policy has said so of the same tensor."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "DROP"


DROP = _Drop()


@dataclass(frozen=True)
class Offload:
    """Kept in the memory of the host.

    Attributes:
        pinned: Whether what comes from an accelerator is kept in pinned memory.
    """

    pinned: bool = True


class Call(NamedTuple):
    """One call of an op: which op and the how manieth of it, and how its arguments look."""

    key: tuple[int, int]
    name: str
    arguments: Any


class Kept:
    """The outputs of one call, kept."""

    __slots__ = ("call", "device", "leaves", "pinned", "spec", "versions")

    def __init__(self, call: Call, out: Any, how: Any) -> None:
        self.call = call
        flat, self.spec = pytree.flatten(out)
        self.device = next(leaf.device for leaf in flat if isinstance(leaf, Tensor))
        self.pinned = isinstance(how, Offload) and how.pinned and self.device.type != "cpu"
        if isinstance(how, Offload):
            flat = [self._on_host(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        self.leaves = [_shared(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        self.versions = [leaf._version for leaf in self.leaves if isinstance(leaf, Tensor)]

    def _on_host(self, tensor: Any) -> Any:
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.pinned)
        return host.copy_(tensor, non_blocking=self.pinned)

    def is_intact(self) -> bool:
        """Whether nobody has written to them since."""
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        return [tensor._version for tensor in tensors] == self.versions

    def out(self) -> Any:
        """The outputs, as other tensors on the same memory."""
        flat = [
            _shared(leaf.to(self.device, non_blocking=self.pinned))
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in self.leaves
        ]
        return pytree.unflatten(self.spec, flat)


def _shared(tensor: Any) -> Any:
    """Another tensor on the same memory, which counts the same writes and has no graph."""
    key = DispatchKey.ADInplaceOrView  # a detach below it would count for itself
    with SetExcluded(key, False), torch.no_grad():
        return tensor.detach()


def storage_of(tensor: Any) -> int:
    """What tells the storage of a plain tensor from all others that are alive."""
    return int(tensor.untyped_storage()._cdata)
