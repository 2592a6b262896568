"""Saved-tensor hooks on the tape: `saved_tensors_hooks`, `save_on_cpu`, `checkpoint`.

# NOTE [Saved tensors]
While a pair of hooks is active, a new node hands every residual to the pack hook, and the pass gets
it back from the unpack hook. Hooks see plain tensors only: of a residual that is a wrapper of a
lower level, the plain tensor at the bottom is packed, and the layers around it are kept as they
are, so the gradients of the lower levels are those of the tensor that was saved.

Checkpointing runs its function again when the first residual is unpacked, and tells what was saved
by counting. So the levels that were active when the checkpoint was entered come to life again for
the second run, modules get back the tensors that `functional_call` had put into them, and a node is
packed only while the innermost of those levels is the top of the stack: what a `grad` inside the
checkpointed function saves is in neither count.

A borrowed formula has C++ autograd save for it. While hooks are active, what it saves goes to a
list (`SavedApart`) that is a residual like any other, and its graph keeps places in that list.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from lamina.autodiff.leaf import LeafTensor
from lamina.autodiff.swapped import in_place, present
from lamina_core.interpreter import Interpreter
from lamina_core.mode import thread_mode
from lamina_core.outer import OuterState
from lamina_core.scopes import revived, run_at
from lamina_core.torch_hooks.doors import UNPROVED, require_proofs
from lamina_core.torch_hooks.saving import (
    GraphExecGroup,
    checkpoint_by_hooks,
    checkpoint_hook,
    graph_group,
    keep_checkpoint_inputs,
    pop_saved_hooks,
    push_saved_hooks,
    recomputation_hook,
    set_graph_group,
)
from lamina_core.torch_hooks.tensors import make_wrapper
from lamina_core.wrapper import LevelTensor

__all__ = ["Packed", "SavedApart", "new_group", "pack", "without_hooks"]

_CLASSES = LevelTensor.classes
_RECOMPUTING = (checkpoint_hook, recomputation_hook)
Tensor = torch.Tensor

active = 0  # how many hooks are entered in the process: all that a node looks at while it is 0


class _Thread(threading.local):
    def __init__(self) -> None:
        self.entered: list[_Hooks] = []


_thread = _Thread()


class _Hooks:
    """A pair of hooks, and the levels that were active when it was entered."""

    __slots__ = ("outer", "pack_hook", "recomputes", "swaps", "top", "unpack_hook")

    def __init__(self, pair: Any) -> None:
        mode = thread_mode()
        self.pack_hook = pair.pack_hook
        self.unpack_hook = pair.unpack_hook
        self.top: Interpreter | None = mode.top
        self.outer: OuterState | None = mode.outer
        self.recomputes = isinstance(pair, _RECOMPUTING)
        self.swaps = present() if self.recomputes else ()

    def wants(self) -> bool:
        """Whether nodes that are made now are packed."""
        return not self.recomputes or thread_mode().top is self.top

    def pack(self, plain: Any) -> Any:
        """Call the pack hook, at level 0."""
        with run_at(None), torch.no_grad():
            return self.pack_hook(plain)

    def unpack(self, packed: Any) -> Any:
        """Call the unpack hook, at the level where it may run the function again."""
        top = self.top if self.recomputes else None
        with revived(top, self.outer), run_at(top), in_place(self.swaps):
            return self.unpack_hook(packed)


class Packed:
    """The residuals of a node, in the hands of hooks; empty to whoever looks for tensors."""

    __slots__ = ("hooks", "items")

    def __init__(self, hooks: _Hooks, residuals: Any) -> None:
        self.hooks = hooks
        self.items = self._packed(residuals)

    def __len__(self) -> int:
        return 0

    def _packed(self, residual: Any) -> Any:
        if type(residual) is tuple or type(residual) is list:
            return type(residual)([self._packed(item) for item in residual])
        if not isinstance(residual, Tensor) or isinstance(residual, LeafTensor):
            return residual
        layers = []
        plain: Any = residual
        while type(plain) in _CLASSES:
            layers.append(_Layer(plain))
            plain = plain.value
        if plain.requires_grad:
            return residual  # what hooks give back would be unknown to the user's own autograd
        return _Item(layers, self.hooks.pack(plain))

    def held(self) -> Any:
        """What the hooks have given for the residuals, and those that they were not given."""
        return self._held(self.items)

    def _held(self, item: Any) -> Any:
        if type(item) is tuple or type(item) is list:
            return [self._held(one) for one in item]
        return item.packed if type(item) is _Item else item

    def unpack(self, group: Any) -> Any:
        """The residuals; under one group a checkpointed function runs again only once."""
        before = graph_group()
        set_graph_group(group)
        try:
            return self._unpacked(self.items)
        finally:
            set_graph_group(before)

    def _unpacked(self, item: Any) -> Any:
        if type(item) is tuple or type(item) is list:
            return type(item)([self._unpacked(one) for one in item])
        if type(item) is not _Item:
            return item
        value = self.hooks.unpack(item.packed)
        for layer in reversed(item.layers):
            value = layer.around(value)
        return value


class _Item:
    """A packed tensor, and the layers around it, the highest level first."""

    __slots__ = ("layers", "packed")

    def __init__(self, layers: list[_Layer], packed: Any) -> None:
        self.layers = layers
        self.packed = packed


class _Layer:
    """A wrapper without its value."""

    __slots__ = ("device", "dtype", "fields", "kind", "size", "stride")

    def __init__(self, wrapper: Any) -> None:
        self.kind = type(wrapper)
        self.size = wrapper.shape
        self.stride = wrapper.stride()
        self.dtype = wrapper.dtype
        self.device = wrapper.device
        self.fields = {
            name: getattr(wrapper, name)
            for cls in (LevelTensor, self.kind)
            for name in cls.__slots__
            if name not in ("value", "recipe")
        }
        self.fields |= wrapper.__dict__

    def around(self, value: Any) -> Any:
        """The wrapper, of a value."""
        out = make_wrapper(self.kind, self.size, self.stride, dtype=self.dtype, device=self.device)
        for name, field in self.fields.items():
            setattr(out, name, field)
        out.value, out.recipe = value, None
        return out


def pack(residuals: Any) -> Any:
    """The residuals of a new node as the active hooks want them."""
    entered = _thread.entered
    if not entered or not entered[-1].wants():
        return residuals
    return Packed(entered[-1], residuals)


def new_group() -> Any:
    """What tells the unpack hooks of checkpointing which calls belong to one pass."""
    return GraphExecGroup()


@contextmanager
def _replaced_hooks(pack_hook: Any, unpack_hook: Any) -> Iterator[None]:
    """Have C++ autograd call other hooks than those that are active."""
    push_saved_hooks(pack_hook, unpack_hook)
    try:
        yield
    finally:
        pop_saved_hooks()


@contextmanager
def without_hooks() -> Iterator[None]:
    """Keep hooks from PyTorch's own formulas, which save wrappers made for one op."""
    if not active:
        yield
        return
    with _replaced_hooks(_again, _again):
        yield


class SavedApart:
    """What C++ autograd saves of the leaves of one formula, outside its graph.

    The graph keeps places in a list of values. Between the recording and a pass, and between
    passes, the values are elsewhere.
    """

    __slots__ = ("strides", "values")

    def __init__(self) -> None:
        self.values: Any = []

    def recording(self) -> Any:
        """A context in which what is saved of leaves goes to the list."""
        return _replaced_hooks(self._pack, self._unpack)

    def taken(self) -> tuple[Any, ...]:
        """The list, which from now on is the caller's to keep."""
        values, self.values = self.values, None
        self.strides = [value.stride() for value in values]
        return tuple(values)

    @contextmanager
    def given(self, values: Any) -> Iterator[None]:
        """Let the graph be walked, with the list back in its place."""
        self.values = [_in_layout(*pair) for pair in zip(values, self.strides, strict=True)]
        try:
            yield
        finally:
            self.values = None

    def _pack(self, tensor: Any) -> Any:
        if not isinstance(tensor, LeafTensor):
            return None, tensor.detach()  # the user's own autograd, at work on the values
        self.values.append(tensor.value)
        return tensor.home, len(self.values) - 1

    def _unpack(self, packed: Any) -> Any:
        home, place = packed
        return place if home is None else home.wrap(self.values[place])


def _in_layout(value: Any, stride: Any) -> Any:
    """What hooks gave back, with the strides of what they were given.

    Formulas look at them: whether a matrix or its transpose was factorised follows from whether the
    matrix was contiguous. Strides of any kind may come, of overlapping windows too.
    """
    if value.stride() == stride or value.numel() == 0:
        return value
    room = 1 + sum((size - 1) * step for size, step in zip(value.shape, stride, strict=True))
    places = torch.arange(room, device=value.device).as_strided(value.shape, stride)
    memory = value.new_zeros(room)
    memory[places.reshape(-1)] = value.reshape(-1)
    return memory.as_strided(value.shape, stride)


def _again(tensor: Any) -> Any:
    """The same value in another tensor: one that its own node saved would never be freed."""
    if isinstance(tensor, LeafTensor):
        return tensor.home.wrap(tensor.value)
    return tensor.detach()


def _packing(pack_hook: Any) -> Any:
    """A pack hook of checkpointing that leaves wrappers as they are, with the notes made on it."""
    packing = functools.update_wrapper(functools.partial(_pack_as_it_is, pack_hook), pack_hook)
    # Torch takes this note off the hook that it finds when the checkpoint is left: off ours.
    pack_hook.__dict__.pop("_user_hooks", None)
    return packing


def _pack_as_it_is(pack_hook: Any, tensor: Any) -> Any:
    """Pack the arguments of a checkpoint inside another, which are wrappers.

    Its hook detaches what requires grad, and PyTorch knows the graph of what it detached. A wrapper
    would lose its place on the tape.
    """
    if type(tensor) not in _CLASSES:
        return pack_hook(tensor)
    tensor.claims_grad = False
    try:
        return pack_hook(tensor)
    finally:
        del tensor.__dict__["claims_grad"]


def _inside() -> bool:
    """Whether a checkpoint that is being made belongs to a transform."""
    if thread_mode().top is None:
        return False
    if "checkpoint" in UNPROVED:
        require_proofs("checkpoint")
    return True


def _install() -> None:
    enter, leave = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__
    counting = threading.Lock()

    @functools.wraps(enter)
    def __enter__(self: Any) -> None:
        global active
        hooks = _Hooks(self)
        if hooks.recomputes and (_inside() or hooks.swaps):
            # The user's own autograd may be the first to ask for a tensor.
            self.unpack_hook = hooks.unpack
        if hooks.recomputes:
            self.pack_hook = _packing(self.pack_hook)
        enter(self)
        _thread.entered.append(hooks)
        with counting:
            active += 1

    @functools.wraps(leave)
    def __exit__(self: Any, *args: object) -> None:
        global active
        with counting:
            active -= 1
        _thread.entered.pop()
        leave(self, *args)

    saved_tensors_hooks.__enter__ = __enter__  # type: ignore[method-assign]
    saved_tensors_hooks.__exit__ = __exit__  # type: ignore[method-assign]


_install()
checkpoint_by_hooks(_inside)
keep_checkpoint_inputs(_inside)
