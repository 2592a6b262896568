"""An accelerator that is not there: a device `toy` whose tensors keep their values on the CPU.

To PyTorch it is a device like any other (it takes the place of `PrivateUse1`): tensors on it are
plain `torch.Tensor`s, autograd works, and an op on tensors of two devices is an error. So tests
find out here which code would make tensors on the wrong device there.

A tensor of the device has a storage without bytes, to which the storage of the CPU is attached.
Each op runs on CPU tensors made of the attached storages, and gets its outputs likewise.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch._C._dynamo.guards import _reinterpret_tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

__all__ = ["DEVICE"]

aten = torch.ops.aten


class _Module(_DummyBackendModule):
    """What `torch.toy` is; it draws from the generator of the CPU and has none of its own."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    def device(self, device: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


_setup_privateuseone_for_python_backend("toy", _Module())
DEVICE = torch.device("toy", 0)

# Ops between devices; of all others PyTorch takes tensors of one device, and numbers of any.
_BETWEEN = frozenset(["aten::_to_copy", "aten::copy_"])
# Ops that take indices from the CPU.
_INDEXING = ("aten::index", "aten::_index_put_impl_", "aten::_unsafe_index")


def _inside(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU tensor that stands for a tensor of the device."""
    out = torch.empty((0,), dtype=tensor.dtype, device="cpu")
    storage = tensor.untyped_storage().inside
    out.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return _lazy_like(out, tensor)


def _lazy_like(out: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Sets the bits of lazy conjugates and negatives, which some ops see to themselves."""
    if tensor.is_conj():
        torch._C._set_conj(out, True)
    if tensor.is_neg():
        torch._C._set_neg(out, True)
    return out


class _Call:
    """One call of an op: which tensors of the device stand for which of the CPU."""

    def __init__(self) -> None:
        self.given: dict[int, torch.Tensor] = {}
        self.taken: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.bases: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self.others = False

    def enter(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu") if leaf.type == DEVICE.type else leaf
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.device.type != DEVICE.type:
            self.others |= leaf.dim() > 0
            self.given[id(leaf)] = leaf
            return leaf
        inside = _inside(leaf)
        self.taken.append((inside, leaf))
        self.given[id(inside)] = leaf
        self.bases[_place(inside)] = leaf
        return inside

    def leave(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.device.type != "cpu":
            return leaf
        return self.given[id(leaf)] if id(leaf) in self.given else self.outside(leaf)

    def outside(self, inside: torch.Tensor) -> torch.Tensor:
        """A tensor of the device for one of the CPU; a view of the one whose values it has."""
        base = self.bases.get(_place(inside))
        if base is None:
            base = torch._C._acc.create_empty_tensor((), inside.dtype)
            base.untyped_storage().inside = inside.untyped_storage()
        offset = inside.storage_offset() - base.storage_offset()
        shape, stride = tuple(inside.shape), tuple(inside.stride())
        return _lazy_like(_reinterpret_tensor(base, shape, stride, offset), inside)

    def refresh(self) -> None:
        """Lets the arguments follow an op that resized them or gave them another storage."""
        for inside, tensor in self.taken:
            storage = tensor.untyped_storage().inside
            if (
                inside.shape != tensor.shape
                or inside.stride() != tensor.stride()
                or inside.untyped_storage()._cdata != storage._cdata
            ):
                tensor.data = self.outside(inside)


def _place(inside: torch.Tensor) -> tuple[int, torch.dtype]:
    return inside.untyped_storage()._cdata, inside.dtype


def _with_tensors(op: Any, args: tuple[Any, ...]) -> list[Any]:
    """The arguments, where PyTorch turned tensors that were numbers back into these."""
    places = zip(args, op._schema.arguments, strict=False)
    return [
        torch.tensor(arg, device="cpu")
        if isinstance(arg, Number) and str(a.type) == "Tensor"
        else arg
        for arg, a in places
    ]


def _run(op: Any, *args: Any, kernel: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """What PyTorch calls for each op on the device."""
    call = _Call()
    wanted = kwargs.get("device")
    args, kwargs = tree_map(call.enter, (_with_tensors(op, args), kwargs))
    name = op._schema.name
    if call.taken and call.others and name not in _BETWEEN and not name.startswith(_INDEXING):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {op} got some of the CPU"
        )
    out = (kernel or op)(*args, **kwargs)
    call.refresh()
    if wanted is not None and torch.device(wanted).type != DEVICE.type:
        return out
    return tree_map(call.leave, out)


def _convolution_backward(
    ct: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor | None, ...]:
    return aten.convolution_backward.default(ct, x, weight, [ct.shape[1]], *settings)


# Registered by name, as a fallback does not reach them: PyTorch has forms of its own for devices
# that it does not know (which look for a storage with bytes, or refuse), or asks under a mode.
_OWN: dict[Any, Callable[..., Any] | None] = {
    aten.as_strided_.default: None,
    aten.convolution_backward_overrideable.default: _convolution_backward,
    aten.convolution_overrideable.default: aten.convolution.default,
    aten.copy.default: None,
    aten.copy_.default: None,
    aten.empty.memory_format: None,
    aten.empty_strided.default: None,
}

_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(_run, "PrivateUse1")
_kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
for _op, _kernel in _OWN.items():
    _kernels.impl(_op, functools.partial(_run, _op, kernel=_kernel))
