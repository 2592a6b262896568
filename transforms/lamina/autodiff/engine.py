"""What `torch.autograd.grad` and `.backward()` say to tensors of a transform.

PyTorch's engine knows graphs of its own and finds none behind a wrapper, and its message does not
say why. Every call of the engine passes through one function, looked up by name each time: that is
replaced once, at import, by one that explains its errors. What lies outside the transforms is
differentiated as before, also from inside `vmap`.
"""

from __future__ import annotations

from typing import Any

from lamina_core.errors import NotDifferentiableError, message
from lamina_core.mode import thread_mode
from lamina_core.scopes import run_at
from lamina_core.torch_hooks.autograd import replace_engine, run_engine
from lamina_core.wrapper import LevelTensor

__all__: list[str] = []

_CLASSES = LevelTensor.classes


def _run_backward(t_outputs: Any, *args: Any, **kwargs: Any) -> Any:
    outside = [_outside(tensor) for tensor in t_outputs]
    if all(tensor is not None for tensor in outside) and any(
        type(tensor) in _CLASSES for tensor in t_outputs
    ):
        return _run_outside(outside, *args, **kwargs)
    try:
        return run_engine(t_outputs, *args, **kwargs)
    except RuntimeError as error:
        # (grad_tensors, keep_graph, create_graph, inputs, ...), as the engine names them.
        inputs = args[3] if len(args) > 3 else ()
        for what, tensors in (("outputs", t_outputs), ("inputs", inputs or ())):
            for at, tensor in enumerate(tensors):
                if type(tensor) in _CLASSES:
                    raise _refusal(f"{what}[{at}]", tensor) from error
        raise


def _outside(tensor: Any) -> Any:
    """The tensor of the caller's own autograd that a constant of all levels stands for, or None."""
    plain = _lowered(tensor)
    return plain if type(plain) not in _CLASSES and plain.requires_grad else None


def _lowered(tensor: Any) -> Any:
    """What a wrapper stands for, as far down as it is a constant."""
    while (
        type(tensor) in _CLASSES
        and tensor.interpreter.alive
        and tensor.interpreter.is_constant(tensor)
    ):
        tensor = tensor.value
    return tensor


def _run_outside(outputs: Any, grads: Any, *args: Any, **kwargs: Any) -> Any:
    """The engine at work on what was made of captured tensors alone, inside a transform."""
    grads = tuple([None if grad is None else _lowered(grad) for grad in grads])
    if any(type(grad) in _CLASSES for grad in grads):
        return run_engine(tuple(outputs), grads, *args, **kwargs)
    mode = thread_mode()
    with run_at(None):
        found = run_engine(tuple(outputs), grads, *args, **kwargs)
    top: Any = mode.top
    if found is None or not mode.is_on():
        return found
    return tuple([None if grad is None else top.constant(grad) for grad in found])


def _refusal(name: str, tensor: Any) -> NotDifferentiableError:
    interpreter = tensor.interpreter
    state = "" if interpreter.alive else ", which has returned"
    return NotDifferentiableError(
        message(
            "torch.autograd has no graph of a tensor of a transform",
            f"{name}: {tensor!r}",
            f"it belongs to level {interpreter.level}: {interpreter}{state}",
            "to fix: use lamina.grad or lamina.vjp in place of torch.autograd.grad and .backward()",
        )
    )


replace_engine(_run_backward)
