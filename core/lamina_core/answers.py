"""What a wrapper says of itself when user code asks: requires_grad, grad_fn, hooks, data.

Code filters its outputs by `t.requires_grad` and hooks modules by `t.grad_fn`. So a tensor of a
transform answers as it would if PyTorch's own autograd were at work: it requires grad if any level,
or the caller's autograd, follows it. Nothing here costs anything until it is asked.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from lamina_core.errors import MutationError, NotDifferentiableError, message
from lamina_core.scopes import run_at
from lamina_core.torch_hooks.memory import exchange, guard_memory, making_a_parameter
from lamina_core.views import become_former, refresh_levels
from lamina_core.wrapper import LevelTensor, strip_dead

__all__ = ["Followed", "followed_by"]

_CLASSES = LevelTensor.classes


class Followed:
    """Where the derivative of a tensor is kept: with a wrapper of a tape, or with a plain tensor.

    Attributes:
        tensor: The wrapper or the plain tensor.
        wrappers: The wrappers above it, the tensor that was asked first.
    """

    __slots__ = ("tensor", "wrappers")

    def __init__(self, tensor: Any, wrappers: list[Any]) -> None:
        self.tensor = tensor
        self.wrappers = wrappers


def followed_by(tensor: Any) -> Followed | None:
    """Who follows a tensor in reverse, the innermost first; None if nobody does."""
    refresh_levels([tensor])
    above: list[Any] = []
    pending = [(tensor, above)]
    while pending:
        tensor, above = pending.pop()
        while type(tensor) in _CLASSES:
            level = tensor.interpreter
            if level.alive and level.keeps_values and not level.is_constant(tensor):
                return Followed(tensor, above)
            above = [*above, tensor]
            others = [getattr(tensor, part) for part in tensor.holds[1:]]
            pending.extend((other, above) for other in others if other is not None)
            tensor = tensor.value
        if tensor.requires_grad:
            return Followed(tensor, above)
    return None


def _requires_grad(self: Any) -> bool:
    """Whether a transform, or the caller's autograd, differentiates what is made of this."""
    return followed_by(self) is not None if self.claims_grad is None else bool(self.claims_grad)


def _set_requires_grad(self: Any, value: bool) -> None:
    self.requires_grad_(value)


def _grad_fn(self: Any) -> Any:
    """What stands for the op that made this, in the hands of whoever follows it."""
    found = followed_by(self)
    if found is None:
        return None
    if type(found.tensor) in _CLASSES:
        return found.tensor.interpreter.grad_fn(found.tensor)
    return found.tensor.grad_fn


def _is_leaf(self: Any) -> bool:
    """As in PyTorch: whatever is not followed, and the inputs of those who follow."""
    return self.grad_fn is None


def requires_grad_(self: Any, requires_grad: bool = True) -> Any:
    """Accepted where it says what is so already; anything else is an error that says what to use.

    Raises:
        NotDifferentiableError: If it would change anything.
    """
    if self.requires_grad == requires_grad:
        return self
    if self.claims_grad and not requires_grad:
        self.claims_grad = None if followed_by(self) is None else False
        return self
    if requires_grad and making_a_parameter(sys._getframe(1)):
        # It says that it does, as code that makes modules inside a transform expects. Who asks for
        # its gradient is told what there is instead.
        self.claims_grad = True
        return self
    what = (
        "requires_grad_() on a tensor that no transform differentiates"
        if requires_grad
        else "requires_grad_(False) on a tensor that a transform differentiates"
    )
    raise NotDifferentiableError(
        message(
            what,
            f"it is {self!r}",
            self.interpreter.where(),
            "to fix: make it an argument of lamina.grad or lamina.vjp, and choose it by argnums"
            if requires_grad
            else "to fix: use tensor.detach(), which is a constant at every level",
        )
    )


def register_hook(self: Any, hook: Any) -> Any:
    """Call a function of this tensor's gradient in the backward pass; it may return another.

    Args:
        self: A tensor that requires grad.
        hook: Gets the gradient as a value of the level at which the pass runs.

    Returns:
        A handle with a method `remove`.

    Raises:
        NotDifferentiableError: If nothing follows the tensor.
    """
    found = followed_by(self)
    if found is None:
        raise NotDifferentiableError(
            message(
                "cannot register a hook on a tensor that doesn't require gradient",
                f"it is {self!r}",
                "to fix: register it on what is made of the differentiated arguments",
            )
        )
    for wrapper in reversed(found.wrappers):
        hook = wrapper.interpreter.hook_below(wrapper, hook)
    if type(found.tensor) in _CLASSES:
        return found.tensor.interpreter.register_hook(found.tensor, hook)
    return found.tensor.register_hook(hook)


def _get_data(self: Any) -> Any:
    """The tensor without its derivative, as `detach` gives it."""
    return self.detach()


def _set_data(self: Any, new: Any) -> None:
    """Stand for other values, as after a write under `no_grad`.

    What no level follows may change its shape and dtype so, as the parameters of a module do that
    is made and converted inside.
    """
    level: Any = self.interpreter
    followed = level.differentiates and not level.is_constant(self)
    if (followed or self.is_input) and (new.shape, new.dtype) == (self.shape, self.dtype):
        with torch.no_grad():
            self.copy_(new)
        return
    if followed or self.is_input or not level.alive:
        raise MutationError(
            message(
                f"an assignment to .data of {self!r}",
                f"what is assigned has another shape or dtype: {new!r}",
                level.where(),
                "to fix: go on with the new tensor",
            )
        )
    new = new if level.is_own(new) else level.constant(new)
    become_former(level, self)
    exchange(self, new)
    level.rebind(self, new)
    self.recipe = None
    level.mutated = True


def _plain_of_constant(tensor: Any, what: str) -> Any:
    """The plain tensor that a wrapper stands for at every level."""
    inner = strip_dead(tensor)
    while type(inner) in _CLASSES:
        level = inner.interpreter
        if not level.is_constant(inner):
            raise MutationError(
                message(
                    f"{what} of a value of a transform",
                    f"it is {tensor!r}",
                    level.where(),
                    "to fix: return the value from the function, and exchange memory outside",
                )
            )
        inner = strip_dead(inner.value)
    return inner


def _copy(self: Any) -> Any:
    """`copy.copy`: a leaf in the same memory, as in PyTorch."""
    return _as_leaf(self, self.detach())


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`: a leaf of its own, at the same level; levels themselves are never copied.

    Raises:
        NotDifferentiableError: If the tensor is no leaf, as in PyTorch.
    """
    if id(self) not in memo:
        if not self.is_leaf:
            raise NotDifferentiableError(
                message(
                    f"deepcopy of {self!r}, which was computed from what is differentiated",
                    self.interpreter.where(),
                    "to fix: use clone(), which keeps the derivative, or detach().clone()",
                )
            )
        memo[id(self)] = _as_leaf(self, self.detach().clone())
    return memo[id(self)]


def _as_leaf(original: Any, leaf: Any) -> Any:
    if original.requires_grad:
        leaf.claims_grad = True
    return leaf


def _reduce(self: Any, protocol: Any) -> Any:
    """For pickle and `torch.save`: a constant is written as the plain tensor that it is."""
    plain = strip_dead(self)
    while type(plain) in _CLASSES:
        if not plain.interpreter.is_constant(plain):
            raise self._without_memory()
        plain = strip_dead(plain.value)
    with run_at(None):
        return plain.__reduce_ex__(protocol)


def _each_element(self: Any, *args: Any) -> Any:
    """Refused: a Python function would be called on memory that is not there."""
    raise self._without_memory()


guard_memory(lambda tensor: type(tensor) in _CLASSES, _plain_of_constant)

_Tensor: Any = LevelTensor
_Tensor.__copy__ = _copy
_Tensor.__deepcopy__ = _deepcopy
_Tensor.__reduce_ex__ = _reduce
_Tensor.data = property(_get_data, _set_data)
for _name in ("apply_", "map_", "map2_"):
    setattr(_Tensor, _name, _each_element)
_Tensor.requires_grad = property(_requires_grad, _set_requires_grad)
_Tensor.grad_fn = property(_grad_fn)
_Tensor.is_leaf = property(_is_leaf)
_Tensor.requires_grad_ = requires_grad_
_Tensor.register_hook = register_hook
_Tensor.retains_grad = False
