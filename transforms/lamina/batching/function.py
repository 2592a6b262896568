"""`torch.autograd.Function` under vmap: by the user's own rule, or by mapping its forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lamina.batching.interpreter import VmapInterpreter
from lamina.batching.user_ops import wrap_answer
from lamina_core.errors import RandomnessError, RuleError
from lamina_core.function import Applied, Custom, Needs, apply_custom, applying, skipping
from lamina_core.scopes import asleep, run_at
from lamina_core.tensors import map_tensors

__all__ = ["VmapInfo"]

Tensor = torch.Tensor


class VmapInfo(NamedTuple):
    """What the `vmap` staticmethod of a user's function is told about the transform."""

    batch_size: int
    randomness: str


@applying(VmapInterpreter)
def _apply(interpreter: Any, custom: Custom, args: tuple[Any, ...], needs: Needs) -> Applied:
    """Hand a function down with its arguments' batch dims."""
    values = tuple([arg.value if interpreter.is_own(arg) else arg for arg in args])
    dims = tuple([arg.bdim if interpreter.is_own(arg) else None for arg in args])
    if all(dim is None for dim in dims):
        applied = apply_custom(custom, values, needs)
        outs = [map_tensors(interpreter.constant, out) for out in applied.outs]
        return applied.lifted(args, outs)
    if custom.vmap_rule is not None:
        return _by_rule(interpreter, custom, args, values, dims, needs)
    mapped = _Mapped(custom, interpreter.batch_size, interpreter.randomness, dims)
    applied = apply_custom(mapped, values, needs)
    outs = [_box(interpreter, o, 0) for o in applied.outs]
    rest, bdims = applied.rest
    tensors = [
        tensor if bdim is None else _box(interpreter, tensor, bdim)
        for tensor, bdim in zip(applied.tensors, bdims, strict=True)
    ]
    lifted = applied.lifted(args, outs, tensors)
    lifted.rest = rest
    return lifted


def _by_rule(
    interpreter: Any,
    custom: Custom,
    args: tuple[Any, ...],
    values: tuple[Any, ...],
    dims: tuple[int | None, ...],
    needs: Needs,
) -> Applied:
    """Run the user's rule as code of the level below, and set its context up at this one."""
    info = VmapInfo(interpreter.batch_size, interpreter.randomness)
    with asleep(interpreter, custom.name), run_at(interpreter.below):
        answer = custom.vmap_rule(info, dims, *values)
    wrapped = wrap_answer(interpreter, custom.name, answer)
    with run_at(interpreter):
        return custom.set_up(args, wrapped, needs)


def _box(interpreter: Any, value: Any, bdim: int) -> Any:
    """Wrap a result; the level is told if the user's own autograd wants to see ops on it."""
    if not isinstance(value, Tensor):
        return map_tensors(lambda tensor: _box(interpreter, tensor, bdim), value)
    out = interpreter.lift(value, bdim)
    out.is_input = False
    return out


class _Mapped(Custom):
    """A function mapped over a batch: forward and backward run inside a level of their own.

    Every output is batched, also where it is the same for all examples: so the cotangent of an
    argument that all examples share is always a sum over them.
    """

    def __init__(
        self, inner: Custom, size: int, randomness: str, dims: tuple[int | None, ...]
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.may_write = inner.may_write
        self.has_jvp = inner.has_jvp
        self.size = size
        self.randomness = randomness
        self.dims = dims

    @property
    def once(self) -> bool:
        """As the inner function."""
        return self.inner.once

    def opened(self) -> Custom:
        """The inner function opened."""
        return _Mapped(self.inner.opened(), self.size, self.randomness, self.dims)

    def _level(self) -> VmapInterpreter:
        return VmapInterpreter(self.size, self.randomness)

    def forward(self, args: tuple[Any, ...], needs: Needs) -> Applied:
        """Map the inner forward over the batch."""
        with self._level() as level:
            lifted = tuple([_lift(level, a, d) for a, d in zip(args, self.dims, strict=True)])
            applied = self.inner.forward(lifted, needs)
            level.refresh([*applied.outs, *applied.tensors])
            outs = [self._lowered(level, o) for o in applied.outs]
            own = [level.is_own(t) for t in applied.tensors]
            bdims = [t.bdim if o else None for t, o in zip(applied.tensors, own, strict=True)]
            tensors = [t.value if o else t for t, o in zip(applied.tensors, own, strict=True)]
            for position, _ in applied.written:
                if self.dims[position] is None:
                    raise level.error(
                        RuleError,
                        f"{self.name} writes to argument {position}, which all examples share",
                        "to fix: map over that argument too, or write to a clone of it",
                    )
        bdims = [
            bdim if source is None else self.dims[source] if source >= 0 else 0
            for source, bdim in zip(applied.sources, bdims, strict=True)
        ]
        found = applied.lifted(args, outs, tensors)
        found.rest = (applied.rest, bdims)
        return found

    def _lowered(self, level: Any, value: Any) -> Any:
        """The value of an output or tangent, with the batch dim in front."""
        if not isinstance(value, Tensor):  # PyTorch hands through what is in a list
            return map_tensors(lambda tensor: self._lowered(level, tensor), value)
        if not level.is_own(value):
            return value.expand(self.size, *value.shape)
        bdim = value.bdim  # type: ignore[attr-defined]
        value = value.value  # type: ignore[attr-defined]
        if bdim is None:
            return value.expand(self.size, *value.shape)
        return value if bdim == 0 else value.movedim(bdim, 0)

    def backward(
        self, tensors: Sequence[Any], rest: Any, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """Map the inner backward over the batch."""
        inner_rest, bdims = rest
        with self._level() as level:
            saved = [_lift(level, t, bdim) for t, bdim in zip(tensors, bdims, strict=True)]
            lifted = [_lift(level, ct, 0) for ct in cts]
            grads = self.inner.backward(saved, inner_rest, needs, lifted)
            level.refresh(grads)
            found = [self._lowered(level, grad) for grad in grads]
        return [
            None if ct is None else ct.sum(0) if dim is None else ct.movedim(0, dim)
            for ct, dim in zip(found, self.dims, strict=True)
        ]

    def jvp(self, tensors: Sequence[Any], rest: Any, tangents: Sequence[Any]) -> list[Any]:
        """Map the inner jvp over the batch."""
        inner_rest, bdims = rest
        with self._level() as level:
            saved = [_lift(level, t, bdim) for t, bdim in zip(tensors, bdims, strict=True)]
            lifted = [_lift(level, t, dim) for t, dim in zip(tangents, self.dims, strict=True)]
            out_ts = self.inner.jvp(saved, inner_rest, lifted)
            level.refresh(out_ts)
            return [self._lowered(level, t) for t in out_ts]


@skipping(VmapInterpreter)
def _skip(interpreter: Any, custom: Custom) -> Custom:
    return custom if interpreter.randomness == "same" else _Unmapped(custom, interpreter)


class _Unmapped(Custom):
    """A function of arguments that all examples share: run once for all, unless it draws numbers.

    It runs inside a level of its own, to which nothing is mapped but what is drawn.
    """

    def __init__(self, inner: Custom, interpreter: VmapInterpreter) -> None:
        self.inner = inner
        self.interpreter = interpreter
        self.name = inner.name
        self.may_write = inner.may_write
        self.has_jvp = inner.has_jvp

    @property
    def vmap_rule(self) -> Any:
        """As the inner function, for the levels below that are concerned."""
        return self.inner.vmap_rule

    @property
    def once(self) -> bool:
        """As the inner function."""
        return self.inner.once

    def opened(self) -> Custom:
        """The inner function opened."""
        return _Unmapped(self.inner.opened(), self.interpreter)

    def forward(self, args: tuple[Any, ...], needs: Needs) -> Applied:
        """Run the inner forward; raise where its results differ between the examples."""
        owner = self.interpreter
        with VmapInterpreter(owner.batch_size, owner.randomness) as level:
            applied = self.inner.forward(args, needs)
            level.refresh([*applied.outs, *applied.tensors])

        def shared(tensor: Any) -> Any:
            if not level.is_own(tensor):
                return tensor
            if tensor.bdim is not None:
                raise owner.error(
                    RandomnessError,
                    f"the forward of {self.name} draws random numbers for each example, "
                    "but none of its arguments is mapped",
                    f"to fix: pass {self.name}.apply a mapped argument, such as one that is "
                    "expanded to the batch and mapped over",
                )
            return tensor.value

        outs = [map_tensors(shared, out) for out in applied.outs]
        return applied.lifted(args, outs, [shared(tensor) for tensor in applied.tensors])

    def set_up(self, args: tuple[Any, ...], out: Any, needs: Needs) -> Applied:
        """As the inner function."""
        return self.inner.set_up(args, out, needs)

    def backward(
        self, tensors: Sequence[Any], rest: Any, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """As the inner function."""
        return self.inner.backward(tensors, rest, needs, cts)

    def jvp(self, tensors: Sequence[Any], rest: Any, tangents: Sequence[Any]) -> list[Any]:
        """As the inner function."""
        return self.inner.jvp(tensors, rest, tangents)


def _lift(level: Any, value: Any, bdim: int | None) -> Any:
    if not isinstance(value, Tensor) or bdim is None:
        return value
    # torch resolves the lazy bits above a handler and not inside it (as in `api.vmap_flat`).
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    return level.lift(value, bdim)
