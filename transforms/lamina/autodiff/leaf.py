"""`LeafTensor`: a value dressed up so that C++ autograd records what is done to it."""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.dispatch import lower, native
from lamina_core.outer import BELOW_AUTOGRAD
from lamina_core.overloads import aten
from lamina_core.schema import facts
from lamina_core.tensors import map_tensors
from lamina_core.torch_hooks.keys import ForceKeys, excluded_keys, included_keys
from lamina_core.torch_hooks.tensors import make_wrapper, no_torch_function

__all__ = ["Home", "LeafTensor", "unbox"]

_DETACH = aten.detach.default
_OPEN_INCLUDE = included_keys()


class LeafTensor(torch.Tensor):
    """A value that C++ autograd takes for a tensor of its own."""

    __slots__ = ("home", "value")

    value: Any
    home: Home

    __torch_function__ = no_torch_function

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Lower one op of the formula to the values."""
        kwargs = kwargs or {}
        home = find_home(args, kwargs)
        return home.lower(func, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name the value; only seen while debugging a formula."""
        return f"LeafTensor({self.value!r})"


def find_home(args: Any, kwargs: Any) -> Home:
    """The home of the first leaf among the arguments of an op."""
    for arg in (*args, *kwargs.values()):
        if type(arg) is LeafTensor:
            return arg.home
        if isinstance(arg, (list, tuple)):
            for item in arg:
                if type(item) is LeafTensor:
                    return item.home
    raise AssertionError("an op of a borrowed formula without a leaf")


class Home:
    """The state in which the values of one borrowed call live, and one with autograd switched on.

    All leaves of a call share one home, those that C++ autograd has saved included; `capture` moves
    them all to where the pullback runs.
    """

    __slots__ = (
        "exclude",
        "grad_enabled",
        "include",
        "interpreter",
        "open_exclude",
        "open_include",
    )

    def __init__(self, interpreter: Any) -> None:
        self.interpreter = interpreter
        self.capture()

    def capture(self) -> None:
        """Take the present dispatch keys and grad mode for those of the values."""
        self.grad_enabled = torch.is_grad_enabled()
        self.include = included_keys()
        self.exclude = excluded_keys()
        self.open_include = self.include | _OPEN_INCLUDE
        self.open_exclude = self.exclude - BELOW_AUTOGRAD

    def wrap(self, value: Any, *, requires_grad: bool = False) -> Any:
        """Box a value."""
        out: Any = make_wrapper(
            LeafTensor,
            value.shape,
            value.stride(),
            dtype=value.dtype,
            device=value.device,
            requires_grad=requires_grad,
        )
        out.value = value
        out.home = self
        return out

    def wrap_all(self, arg: Any) -> Any:
        """Box every tensor of an output."""
        return map_tensors(self.wrap, arg)

    def lower(self, op: Any, args: Any, kwargs: Any) -> Any:
        """Run an op of the formula on the values, in the state they live in."""
        with (
            ForceKeys(self.include, self.exclude),
            torch.set_grad_enabled(self.grad_enabled),
        ):
            values = tuple([map_tensors(_value, arg) for arg in args])
            if op is _DETACH:
                # Saving an output, C++ detaches it from its own graph; the levels below go on.
                return self.wrap(values[0])
            inner = {key: map_tensors(_value, value) for key, value in kwargs.items()}
            known = facts(op)
            if known.is_random:
                out = lower(self.interpreter, op, values, inner)
            else:
                # Among wrappers a formula may meet plain tensors that the user's autograd follows.
                out = native(op, values, inner)
            if known.mutated:
                return args[0]
            return self.wrap_all(out)

    def open(self) -> Any:
        """A guard under which C++ autograd records what is done to leaves."""
        return ForceKeys(self.open_include, self.open_exclude)


def unbox(tensor: Any) -> Any:
    """The value of a leaf; any other tensor as it is."""
    return tensor.value if type(tensor) is LeafTensor else tensor


def _value(tensor: Any) -> Any:
    """The value of a leaf, with memory: C++ stands for a zero tangent by a tensor without any.

    Kernels read that memory, as the dispatch key that warns of it is off in handlers.
    A lazy conjugate that the user's autograd follows is worked out while that sees it: in an op
    with wrappers C++ would do so.
    """
    if type(tensor) is LeafTensor:
        value = tensor.value
        if value.requires_grad and (value.is_conj() or value.is_neg()):
            value = native(aten.clone.default, (value,), {})
        return value
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor
