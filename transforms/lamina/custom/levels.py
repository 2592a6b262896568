"""At which levels a tensor carries a derivative, and running a user's function away from them.

# NOTE [Captured tensors]
A rule of the user's speaks of the arguments of his function. What the function does with any other
tensor that carries a derivative is in no rule, and would be lost without a word. So while it runs,
each op of the innermost level is looked at: its tensors have to be arguments, or made by ops since,
or carry no derivative at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lamina_core.errors import CapturedTensorError, NotDifferentiableError, message
from lamina_core.interpreter import Interpreter
from lamina_core.level import stand_in
from lamina_core.mode import thread_mode
from lamina_core.overloads import aten
from lamina_core.tensors import map_tensors, tensors_in
from lamina_core.torch_hooks.autograd import forward_ad
from lamina_core.wrapper import LevelTensor, level_of

__all__ = ["GROUND", "constants", "derivative_levels", "levels_of", "need_made", "watching"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor
alias = aten.alias.default


class _Ground:
    """Level 0, as an owner of derivatives: PyTorch's own autograd."""

    level = 0

    def __str__(self) -> str:
        return "PyTorch's autograd"


GROUND = _Ground()


def derivative_levels(tensor: Any) -> list[Any]:
    """The owners of the derivatives that a tensor carries now, innermost first."""
    found: list[Any] = []
    while type(tensor) in _CLASSES:
        interpreter = tensor.interpreter
        if not interpreter.alive:
            tensor = tensor.dead_value()
            continue
        if interpreter.opaque and not interpreter.is_constant(tensor):
            return found
        if interpreter.tracking() and not interpreter.is_constant(tensor):
            found.append(interpreter)
        tensor = tensor.value
    outer = thread_mode().outer
    enabled = torch.is_grad_enabled() and (outer is None or outer.grad_enabled)
    if tensor.requires_grad and enabled:
        found.append(GROUND)
    return found


def levels_of(name: str, tensors: Iterable[Any]) -> list[Any]:
    """The owners of all derivatives that some tensors carry, innermost first.

    Raises:
        NotDifferentiableError: If one is a dual tensor of PyTorch's own forward mode.
    """
    found: dict[int, Any] = {}
    for tensor in tensors:
        for owner in derivative_levels(tensor):
            found[owner.level] = owner
        if forward_ad._current_level >= 0 and type(tensor) not in _CLASSES:
            _refuse_dual(name, tensor)
    return [found[level] for level in sorted(found, reverse=True)]


def _refuse_dual(name: str, tensor: Any) -> None:
    if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotDifferentiableError(
            message(
                f"{name} has a rule of its own, which torch.autograd.forward_ad does not know",
                f"it got a dual tensor of shape {list(tensor.shape)}",
                "to fix: use lamina.jvp",
            )
        )


def constants(tensors: Sequence[Any], owner: Any) -> list[Any]:
    """The same values, of the present level and without their derivatives at one level.

    PyTorch's autograd as the owner stands for all levels: it is the innermost only where no level
    above has a derivative of the values.
    """
    if owner is GROUND:
        found = [tensor.detach() for tensor in tensors]
    else:
        owner.grad_enabled = False
        try:
            found = [alias(tensor) for tensor in tensors]
        finally:
            owner.grad_enabled = True
    top = thread_mode().top
    if top is None:
        return found
    return [top.constant(t) if level_of(t) != top.level else t for t in found]


def need_made(name: str, made: set[int], results: Iterable[Any]) -> None:
    """Raise if a result with a derivative is not among what `watching` has seen.

    Without any level there is nothing to see; but then the arguments carry no derivative, so
    neither must the results.
    """
    for tensor in results:
        if isinstance(tensor, Tensor) and id(tensor) not in made:
            owners = derivative_levels(tensor)
            if owners:
                raise _captured(name, owners[0], tensor)


@contextmanager
def watching(name: str, arguments: Sequence[Any]) -> Iterator[set[int]]:
    """Refuse tensors that a function captures, while it runs at the present level.

    Yields:
        The ids of what may be used: the arguments, and what ops have made since.
    """
    top: Interpreter | None = thread_mode().top
    # A captured tensor was there before, so its id is never that of one made since.
    made = {id(argument) for argument in arguments}
    if top is None:
        yield made
        return
    observer = top.observer
    original = top.process

    def note(tensor: Any) -> Any:
        made.add(id(tensor))
        return tensor

    def process(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for tensor in tensors_in(args, kwargs):
            if id(tensor) not in made:
                owners = derivative_levels(tensor)
                if owners:
                    raise _captured(name, owners[0], tensor)
        return map_tensors(note, original(op, args, kwargs))

    def observe(applied: str, outs: list[Any]) -> None:
        map_tensors(note, outs)
        if observer is not None:
            observer(applied, outs)

    top.observer = observe
    try:
        with stand_in(top, process):
            yield made
    finally:
        top.observer = observer


def _captured(name: str, owner: Any, tensor: Any) -> CapturedTensorError:
    shown = repr(tensor) if type(tensor) in _CLASSES else f"tensor of shape {list(tensor.shape)}"
    return CapturedTensorError(
        message(
            f"{name} uses a tensor that is not one of its differentiable arguments",
            f"it carries a derivative at level {owner.level}: {owner}",
            f"captured: {shown}",
            "to fix: pass it as an argument, or detach it",
        )
    )
