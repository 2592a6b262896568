"""The interpreter of `vmap`: wraps what enters the level and finds the rule of each op."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lamina.batching import rules as _rules
from lamina.batching.batched import BatchedTensor, wrap, wrap_exact
from lamina.batching.dims import ensure_batched
from lamina.batching.randomness import Part
from lamina.batching.table import RULES, Info
from lamina.batching.user_ops import resolve, state_of
from lamina.batching.writes import store
from lamina_core.handlers import Handler, HandlerInterpreter
from lamina_core.mode import thread_mode
from lamina_core.scopes import revived, run_at
from lamina_core.torch_hooks.modes import tracing_state
from lamina_core.views import refresh_all

__all__ = ["VmapInterpreter"]

Tensor = torch.Tensor
_rules.load()


class VmapInterpreter(HandlerInterpreter):
    """One active `vmap`."""

    wrapper = BatchedTensor
    transform = "vmap"
    handlers: ClassVar[dict[int, Handler]] = RULES.handlers
    part: Part | None = None  # set where this is a chunk of a larger batch

    def __init__(self, batch_size: int, randomness: str = "error") -> None:
        super().__init__()
        self.batch_size = batch_size
        self.randomness = randomness
        self.info = Info(self, batch_size, randomness)
        self.traced = tracing_state() is not None  # by torch.jit.trace; not known while an op runs

    def __str__(self) -> str:
        """The transform as the user wrote it."""
        return f"vmap(batch_size={self.batch_size}, randomness={self.randomness!r})"

    @staticmethod
    def resolve(op: Any) -> Handler:
        """The handler of an op."""
        return resolve(op)

    @classmethod
    def explain_op(cls, op: Any) -> str:
        """The state of an overload and the owner of its rule."""
        return RULES.describe(op, state_of(op))

    def lift(self, value: Any, bdim: int | None) -> BatchedTensor:
        """Wrap an argument of the mapped function."""
        self.look(value)
        out = wrap_exact(self, value, bdim)
        out.is_input = True
        return out

    def constant(self, value: Any) -> BatchedTensor:
        """Wrap a value that is the same for every example."""
        self.look(value)
        return wrap(self, value, None)

    def is_constant(self, wrapper: Any) -> bool:
        """Whether a wrapper is not batched."""
        return wrapper.bdim is None

    def rebind(self, target: Any, new: Any) -> None:
        """Stand for another value from now on."""
        target.value, target.bdim = new.value, new.bdim
        target.logical, target.strides = new.logical, new.strides

    def hook_below(self, wrapper: Any, hook: Any) -> Any:
        """A hook for all examples at once, which shows `hook` one, as the function saw it."""
        bdim, outer = wrapper.bdim, thread_mode().outer

        def on_value(ct: Any) -> Any:
            with revived(self, outer), run_at(self):
                found = hook(wrap(self, ct, bdim))
            value, at = (found.value, found.bdim) if self.is_own(found) else (found, None)
            if value is None or bdim is None:
                return value
            return ensure_batched(value, at, self.batch_size).movedim(0, bdim)

        return on_value

    def refresh(self, outs: list[Any]) -> None:
        """Bring stale views among the outputs of the mapped function up to date."""
        refresh_all(self, outs, {})

    def store(self, target: Any, new: Any) -> bool:
        """Write `new` into the memory of `target` where that is sound; say whether it was."""
        return store(self, target, new)

    def wrap_out(self, out: Any, out_dims: Any, how: Any = wrap) -> Any:
        """Wrap what a rule returned."""
        if isinstance(out, Tensor):
            return how(self, out, out_dims)
        if isinstance(out, (tuple, list)):
            if not isinstance(out_dims, (tuple, list)):
                out_dims = [out_dims] * len(out)
            wrapped = [self.wrap_out(o, d, how) for o, d in zip(out, out_dims, strict=True)]
            return wrapped if type(out) is list else tuple(wrapped)
        return out
