"""The door of `torch.autograd.Function`: a function that brings a backward of its own.

`Function.apply` offers no hook to tensor subclasses, so `install` gives it one, once (see
NOTE [Function.apply]); without an active transform that leads straight to the original.

# NOTE [Functions]
A call is described by a `Custom` and goes down the levels like an op. Each interpreter hands it to
the values of the level below, so every level sees the function as a whole, and the user's forward
runs once, at level 0, on plain tensors. What comes back (`Applied`) is lifted level by level: a
tensor that forward saved is an argument or an output, and so known at every level, or else an
intermediate, which is a constant wherever it is differentiated, as it is in PyTorch.
An interpreter that batches hands down another `Custom`, whose forward is the first one's mapped
over the batch. One that differentiates keeps `Applied`, and runs the backward as code of the level
below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch

from lamina_core.alias import captured_error, write
from lamina_core.errors import CapturedTensorError, MissingRuleError, message
from lamina_core.interpreter import Interpreter
from lamina_core.level import Level, stand_in
from lamina_core.mode import thread_mode
from lamina_core.outer import autograd_is_on
from lamina_core.scopes import run_at
from lamina_core.tensors import map_tensors
from lamina_core.torch_hooks.functions import catch_functions, original_apply
from lamina_core.views import refresh_all
from lamina_core.wrapper import LevelTensor, highest_interpreter, level_of, strip_dead

__all__ = ["Applied", "Custom", "apply_custom", "apply_here", "applying", "skipping"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor
Needs = tuple[bool, ...]


class Applied:
    """What one call gave, at one level.

    Attributes:
        outs: The outputs, a list even if there is one.
        single: Whether the user returned one value rather than a tuple.
        tensors: What forward saved, as values of this level.
        sources: Where each of them comes from: `i` for argument i, `-1 - j` for output j, None for
            an intermediate.
        rest: Whatever else backward needs; only the `Custom` knows what it is.
        constant: The positions of outputs that forward marked as non-differentiable.
        written: Pairs `(argument, output)` for arguments that forward wrote to.
    """

    __slots__ = ("constant", "outs", "rest", "single", "sources", "tensors", "written")

    def __init__(
        self,
        outs: list[Any],
        *,
        single: bool = False,
        tensors: Sequence[Any] = (),
        sources: Sequence[int | None] = (),
        rest: Any = None,
        constant: frozenset[int] = frozenset(),
        written: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.outs = outs
        self.single = single
        self.tensors = tuple(tensors)
        self.sources = tuple(sources)
        self.rest = rest
        self.constant = constant
        self.written = written

    def lifted(
        self,
        args: Sequence[Any],
        outs: list[Any],
        tensors: Sequence[Any] | None = None,
        rest: Any = None,
    ) -> Applied:
        """The same call one level up, where its arguments and outputs are known by other names."""
        others = self.tensors if tensors is None else tensors
        return Applied(
            outs,
            single=self.single,
            tensors=[
                other if source is None else args[source] if source >= 0 else outs[-1 - source]
                for source, other in zip(self.sources, others, strict=True)
            ],
            sources=self.sources,
            rest=self.rest if rest is None else rest,
            constant=self.constant,
            written=self.written,
        )


class Custom:
    """A function with a backward of its own, as the interpreters hand it down.

    Attributes:
        name: The user's class, for messages.
        may_write: Whether forward may write to its arguments.
        has_jvp: Whether `jvp` is defined; if not, it is the transpose of `backward`.
        once: Whether `backward` may not be differentiated.
    """

    name: str
    may_write: bool = False
    has_jvp: bool = False

    @property
    def vmap_rule(self) -> Any:
        """What a level that batches runs instead of mapping `forward`, or None.

        `(info, in_dims, *args)` -> `(outputs, out_dims)`, on the values of the level below.
        """
        return None

    @property
    def once(self) -> bool:
        """See the class."""
        return False

    def opened(self) -> Custom:
        """The same function with a `backward` whose ops are seen, although it is `once`."""
        raise NotImplementedError

    def forward(self, args: tuple[Any, ...], needs: Needs) -> Applied:
        """Run on the values of one level, as user code of that level."""
        raise NotImplementedError

    def set_up(self, args: tuple[Any, ...], out: Any, needs: Needs) -> Applied:
        """`forward`, where the `vmap_rule` has computed the outputs."""
        raise NotImplementedError

    def backward(
        self, tensors: Sequence[Any], rest: Any, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """Cotangents of the outputs to cotangents of the arguments; None is zero."""
        raise NotImplementedError

    def jvp(self, tensors: Sequence[Any], rest: Any, tangents: Sequence[Any]) -> list[Any]:
        """Tangents of the arguments to tangents of the outputs; None is zero."""
        raise NotImplementedError


Handler = Callable[[Any, Custom, tuple[Any, ...], Needs], Applied]
_HANDLERS: dict[type[Level], Handler] = {}


def applying(kind: type[Interpreter]) -> Callable[[Handler], Handler]:
    """Register what a transform does with a `Custom`: `(interpreter, custom, args, needs)`."""

    def register(handler: Handler) -> Handler:
        _HANDLERS[kind] = handler
        return handler

    return register


def _inherited_handler(interpreter: Any, custom: Custom) -> Handler:
    for kind in type(interpreter).__mro__:
        if kind in _HANDLERS:
            return _HANDLERS[kind]
    raise interpreter.error(
        MissingRuleError,
        f"{custom.name} has rules of its own, of which {interpreter} says nothing",
        "to fix: write the function with ordinary ops, or register what the transform does with "
        "such a function: lamina.extend.applying",
    )


# What stands for a function where the level of an interpreter is not concerned by its arguments.
_SKIPPED: dict[type[Interpreter], Callable[[Any, Custom], Custom]] = {}


def skipping(kind: type[Interpreter]) -> Callable[[Any], Any]:
    """Register what a transform makes of a `Custom` that passes it by: `(interpreter, custom)`."""

    def register(handler: Any) -> Any:
        _SKIPPED[kind] = handler
        return handler

    return register


def _passing_by(custom: Custom, args: tuple[Any, ...]) -> Custom:
    """A function of user code, as those levels want it that none of its arguments belongs to."""
    mode = thread_mode()
    if mode.top is None or not mode.is_on():
        return custom
    concerned = highest_interpreter(_tensors_only(args), {})
    level: Interpreter | None = mode.top
    while level is not None and level is not concerned:
        if type(level) in _SKIPPED:
            custom = _SKIPPED[type(level)](level, custom)
        level = level.below
    return custom


def apply_custom(custom: Custom, args: tuple[Any, ...], needs: Needs) -> Applied:
    """Apply a function to values of any level.

    Args:
        custom: The function.
        args: Its arguments; only tensors among them, not those inside containers, are followed.
        needs: Which arguments a level above differentiates.
    """
    interpreter = highest_interpreter(_tensors_only(args), {})
    if interpreter is None:
        return _at_the_bottom(custom, args, needs)
    if interpreter.mutated:
        refresh_all(interpreter, args, {})
    handler = _HANDLERS.get(type(interpreter)) or _inherited_handler(interpreter, custom)
    applied = handler(interpreter, custom, args, needs)
    if interpreter.observer is not None:
        interpreter.observer(custom.name, applied.outs)
    return applied


def _tensors_only(args: tuple[Any, ...]) -> list[Any]:
    return [arg for arg in args if isinstance(arg, Tensor)]


# -- level 0 ---------------------------------------------------------------------------------------


def _at_the_bottom(custom: Custom, args: tuple[Any, ...], needs: Needs) -> Applied:
    """Run forward on plain tensors; the user's own autograd sees the call where it wants to."""
    with _sealed(custom), run_at(None, autocast=True):
        given = _told_apart(tuple([strip_dead(arg) for arg in args]), clone=custom.may_write)
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in given
        ):
            applied = _through_autograd(custom, given, needs)
        else:
            with torch.no_grad():
                applied = custom.forward(given, needs)
    settle = _Settle(custom)
    outs = [map_tensors(settle, out) for out in applied.outs]
    return applied.lifted(args, outs, [settle(tensor) for tensor in applied.tensors])


def _told_apart(args: tuple[Any, ...], *, clone: bool) -> tuple[Any, ...]:
    """Arguments no two of which are the same tensor, so that what is saved can be recognised."""
    seen: set[int] = set()
    found = []
    for arg in args:
        if isinstance(arg, Tensor):
            if clone:
                arg = arg.clone()
            elif id(arg) in seen:
                arg = torch.ops.aten.alias.default(arg)
            seen.add(id(arg))
        found.append(arg)
    return tuple(found)


class _Bridge(torch.autograd.Function):
    """A call as the user's own autograd, at level 0, sees it."""

    @staticmethod
    def forward(ctx: Any, custom: Custom, needs: Needs, results: list[Any], *args: Any) -> Any:
        """Run the function and save what it saved."""
        ctx.set_materialize_grads(False)
        applied = custom.forward(args, needs)
        ctx.custom, ctx.rest = custom, applied.rest
        ctx.mark_non_differentiable(
            *[applied.outs[i] for i in applied.constant if isinstance(applied.outs[i], Tensor)]
        )
        ctx.save_for_backward(*applied.tensors)
        results.append(applied)
        return tuple(applied.outs)

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        """Run the function's own backward on what was saved."""
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *ctx.custom.backward(ctx.saved_tensors, ctx.rest, needs, cts)


@functools.cache
def _bridge_of(name: str) -> Any:
    """The bridge under the name of the user's class, which hooks of modules look for."""
    return type(name, (_Bridge,), {})


def _through_autograd(custom: Custom, args: tuple[Any, ...], needs: Needs) -> Applied:
    needs = tuple(
        [
            need or (isinstance(arg, Tensor) and arg.requires_grad)
            for need, arg in zip(needs, args, strict=True)
        ]
    )
    results: list[Applied] = []
    outs = original_apply(_bridge_of(custom.name), custom, needs, results, *args)
    return results[0].lifted(args, list(outs))


# -- tensors that forward captures -----------------------------------------------------------------


@contextmanager
def _sealed(custom: Custom) -> Iterator[None]:
    """Let no live level follow what forward does with tensors that are not its arguments."""
    with ExitStack() as sealed:
        interpreter = thread_mode().top
        while interpreter is not None:
            if not interpreter.stood_in:
                sealed.enter_context(stand_in(interpreter, _refusal(interpreter, custom)))
            interpreter = interpreter.below
        yield


def _refusal(interpreter: Interpreter, custom: Custom) -> Any:
    """Stands in for `interpreter.process`: constants give their value, anything else an error."""

    def value_of(tensor: Any) -> Any:
        return _value_of_constant(interpreter, custom, tensor)

    def process(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = tuple([map_tensors(value_of, arg) for arg in args])
        return op(*args, **{key: map_tensors(value_of, arg) for key, arg in kwargs.items()})

    return process


def _value_of_constant(interpreter: Interpreter, custom: Custom, tensor: Any) -> Any:
    if not interpreter.is_own(tensor):
        return tensor
    if interpreter.is_constant(tensor):
        return tensor.value
    raise CapturedTensorError(
        message(
            f"the forward of {custom.name} uses a tensor that is not one of its arguments",
            f"it belongs to level {interpreter.level}: {interpreter}",
            f"captured: {tensor!r}",
            f"to fix: pass the tensor itself (not inside a container) to {custom.name}.apply",
        )
    )


class _Settle:
    """Takes captured constants among the results down to level 0."""

    def __init__(self, custom: Custom) -> None:
        self.custom = custom

    def __call__(self, tensor: Any) -> Any:
        while type(tensor) in _CLASSES:
            interpreter = tensor.interpreter
            tensor = (
                _value_of_constant(interpreter, self.custom, tensor)
                if interpreter.alive
                else tensor.dead_value()
            )
        return tensor


# -- the door --------------------------------------------------------------------------------------


def install(make: Callable[[type, tuple[Any, ...], dict[str, Any]], tuple[Custom, Any]]) -> None:
    """Catch what goes through `torch.autograd.Function.apply`.

    Args:
        make: Makes `(custom, args)` of a class and the arguments of its `apply`.
    """

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not _concerned() and not any(type(arg) in _CLASSES for arg in args):
            return original_apply(cls, *args, **kwargs)
        custom, args = make(cls, args, kwargs)
        return apply_here(_passing_by(custom, args), args)

    catch_functions(apply, _concerned)


def _concerned() -> bool:
    """Whether a level may be concerned by a function.

    With C++ autograd on none is: the outermost caller's keys are in force, or a borrowed formula is
    being recorded, and the function belongs to an op of the user's own.
    """
    return thread_mode().top is not None and not autograd_is_on()


def apply_here(custom: Custom, args: tuple[Any, ...]) -> Any:
    """Apply a function as user code of the present level; its one output, or a tuple of them."""
    applied = apply_custom(custom, args, (False,) * len(args))
    outs = list(applied.outs)
    for position, index in applied.written:
        outs[index] = _written(custom, args[position], outs[index])
    mode = thread_mode()
    top = mode.top
    if top is not None and mode.is_on():
        level = top.level
        kept = {id(args[position]) for position, _ in applied.written}
        outs = [
            top.constant(out)
            if isinstance(out, Tensor) and level_of(out) != level and id(out) not in kept
            else out
            for out in outs
        ]
    return outs[0] if applied.single else tuple(outs)


class _Writer:
    """Stands in for the facts of an op where a function wrote to its argument."""

    __slots__ = ("name",)
    is_out_variant: ClassVar[Any] = staticmethod(lambda: False)

    def __init__(self, name: str) -> None:
        self.name = name


def _written(custom: Custom, target: Any, new: Any) -> Any:
    """Let an argument show what forward, which had a copy of it, wrote; return the argument."""
    interpreter = highest_interpreter((target, new), {})
    if interpreter is None:
        with run_at(None):
            target.copy_(new)
        return target
    if not interpreter.is_own(target) and not interpreter.is_constant(new):
        raise captured_error(interpreter, custom.name, target)
    with run_at(interpreter):
        write(interpreter, _Writer(custom.name), target, new)  # type: ignore[arg-type]
    return target
