"""What an op refuses alone it refuses in a transform, with the same error.

A transform may compute an op by others, which accept more, or speak of shapes that the user has
not written. So where an op fails at a level, or where its rule would not notice that it has to, the
op itself is run on one example: what it raises then is what the caller gets, with a note that says
where.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from lamina_core.config import tensor_summary
from lamina_core.errors import LaminaError, message
from lamina_core.level import Level
from lamina_core.logical import alone
from lamina_core.outer import autocast_keys
from lamina_core.schema import OpFacts, facts
from lamina_core.tensors import tensors_in
from lamina_core.torch_hooks.autograd import functorch_is_active
from lamina_core.wrapper import LevelTensor, strip_dead

__all__ = ["NoExampleError", "example", "is_pullback", "refusal", "refused", "told"]

_CLASSES = LevelTensor.classes
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_WRITES_UNSAID = "batch_norm"  # to its running statistics, of which the schemas of some do not tell
# What an op says about elements, of which there may be none here: no inverse, no convergence.
_OF_ELEMENTS = (torch.linalg.LinAlgError,)  # type: ignore[attr-defined]
_OF_DTYPE = "not implemented for '"
_IN = "in "  # what all notes begin with
Tensor = torch.Tensor


class NoExampleError(Exception):
    """There is no plain tensor with elements behind a value."""


def example(arg: Any) -> Any:
    """One example of an argument, in plain tensors.

    Raises:
        NoExampleError: If there are none behind it.
    """
    if isinstance(arg, (list, tuple)):
        return type(arg)(map(example, arg))
    if not isinstance(arg, Tensor):
        return arg
    arg = strip_dead(arg)
    if type(arg) in _CLASSES:
        return arg.example(example(arg.value))
    if type(arg) not in _PLAIN or arg.is_meta:
        raise NoExampleError
    return arg


def is_pullback(known: OpFacts) -> bool:
    """Whether an op is the backward half of another, and given what that has saved."""
    return "_backward" in known.name and not known.is_pointwise


def refusal(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """The error that an op raises for one example alone; None if it raises none, or none is known.

    Not asked is an op inside which autocast acts; a pullback, whose kernel may trust what its op
    has saved, to the point of ending the process; and any op within a transform of `torch.func`,
    whose wrappers look like plain tensors. The random numbers that are drawn later are the same as
    if it had not been asked.
    """
    known = facts(op)
    if functorch_is_active() or (known.is_composite and autocast_keys() is not None):
        return None
    if is_pullback(known):
        return None
    try:
        with alone():
            values = tuple(map(example, args))
            options = {name: example(value) for name, value in kwargs.items()}
            if known.mutated or _WRITES_UNSAID in known.name:
                values, options = _copies(values), {k: _copies(v) for k, v in options.items()}
            try:
                with _undone_draws(values, options) if known.is_random else nullcontext():
                    op(*values, **options)
            except (NoExampleError, *_OF_ELEMENTS):
                raise
            except Exception as error:  # whatever the op raises is its answer
                if isinstance(error, NotImplementedError) and _OF_DTYPE not in str(error):
                    return None  # no kernel, which is none of the arguments' fault
                return error.with_traceback(None)
    except (LaminaError, NoExampleError, *_OF_ELEMENTS):
        pass
    return None


@contextmanager
def _undone_draws(args: Any, kwargs: Any) -> Iterator[None]:
    """A block that leaves the generators as it finds them."""
    accelerated = [t for t in tensors_in(args, kwargs) if t.device.type != "cpu"]
    given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Generator)]
    if accelerated or given:
        raise NoExampleError
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _copies(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.detach().clone()
    return type(arg)(map(_copies, arg)) if isinstance(arg, (list, tuple)) else arg


def refused(
    level: Level, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Exception | None:
    """`refusal` with its note, for a call that a rule would answer."""
    own = refusal(op, args, kwargs)
    if own is not None:
        own.add_note(_note(level, op, args, kwargs))
    return own


def told(
    level: Level, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> Exception:
    """What to raise where an op failed at a level: its own error if it has one, with a note.

    Otherwise it is the error as it came, which may speak of shapes with batch dims.
    """
    if isinstance(error, LaminaError):
        return error
    own = refused(level, op, args, kwargs)
    if own is not None:
        return own
    if not any(note.startswith(_IN) for note in getattr(error, "__notes__", ())):
        error.add_note(_note(level, op, args, kwargs))
    return error


def _note(level: Level, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    given = [_shown(arg) for arg in args]
    given += [f"{name}={_shown(value)}" for name, value in kwargs.items()]
    return message(f"{_IN}{facts(op).name}({', '.join(given)})", level.where())


def _shown(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return tensor_summary(arg)
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(map(_shown, arg))}]"
    return str(arg)
