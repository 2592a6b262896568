"""A level that writes down what is done to its values: the straight-line program of a linear map.

`linearize` puts it below a level of forward mode, so that tangents are its wrappers, and
`linear_transpose` below a backward pass. The ops on such wrappers run on zeros, which tells the
shapes, and are written down with all else they were given: values of the levels below, which the
program keeps. What is done to other values runs as if the level were not there.

# NOTE [Nothing hides from the program]
A value of this level is known only by its slot, so whatever looks at it must be written down or
refused. Every op on a wrapper arrives here, also those of a formula borrowed from C++. Refused are
ops that draw random numbers and ops that give Python values. A wrapper that outlives the level
stands for nothing: its zeros would be a wrong answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch

from lamina.autodiff.declare import FIXED
from lamina.autodiff.operands import in_any_layout
from lamina.autodiff.program import Program, Slot, Step
from lamina_core.alias import mutate
from lamina_core.dispatch import lower, pass_down
from lamina_core.errors import EscapedTensorError, NotLinearError, message
from lamina_core.function import Applied, Custom, Needs, apply_custom, apply_here, applying
from lamina_core.interpreter import Interpreter
from lamina_core.overloads import aten
from lamina_core.schema import OpFacts, facts
from lamina_core.tensors import map_tensors
from lamina_core.views import record_views, refresh_all
from lamina_core.wrapper import LevelTensor, box, made_as_view, strip_dead

__all__ = ["RecordInterpreter", "RecordedTensor"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


class RecordedTensor(LevelTensor):
    """A value that a program computes; `value` is what it computes from zeros.

    Attributes:
        slot: Where the program keeps it, or None for a constant.
    """

    __slots__ = ("slot",)
    holds = ("value",)

    slot: Any

    def dead_value(self) -> Any:
        """Refused: see NOTE [Nothing hides from the program]. A constant stands for its value."""
        if self.slot is None:
            return self.value
        raise EscapedTensorError(
            message(
                f"a tangent of shape {list(self.shape)} is used after its transform has returned",
                f"escaped from level {self.interpreter.level}: {self.interpreter}",
                "to fix: do not store tangents in the rules of an autograd.Function",
            )
        )

    def describe(self) -> str:
        """Level and slot, for the repr."""
        return f"level={self.interpreter.level}, slot={self.slot}"


class _Given:
    """The arguments of a call at a level that records, taken apart.

    Attributes:
        values: Positional arguments with own wrappers replaced by their values.
        kwargs: Keyword arguments likewise.
        places: Positional arguments as a step keeps them, with slots.
        place_kwargs: Keyword arguments likewise.
        reads: The slots that occur.
        own: Whether any wrapper of the level occurs, constants included.
    """

    __slots__ = ("kwargs", "own", "place_kwargs", "places", "reads", "values")

    def __init__(self, interpreter: RecordInterpreter, args: Any, kwargs: dict[str, Any]) -> None:
        # HOT: a flat loop, as in `lamina.autodiff.operands.split`.
        self.values = list(args)
        self.places = list(args)
        self.reads: list[int] = []
        self.own = False
        for i, arg in enumerate(args):
            kind = type(arg)
            if kind in _CLASSES:
                self._tensor(interpreter, i, arg)
            elif kind is list or kind is tuple:
                inner = _Given(interpreter, arg, {})
                self.values[i], self.places[i] = kind(inner.values), kind(inner.places)
                self._join(inner)
        self.kwargs = self.place_kwargs = kwargs
        if kwargs:
            inner = _Given(interpreter, list(kwargs.values()), {})
            self.kwargs = dict(zip(kwargs, inner.values, strict=True))
            self.place_kwargs = dict(zip(kwargs, inner.places, strict=True))
            self._join(inner)

    def _join(self, inner: _Given) -> None:
        self.reads += inner.reads
        self.own = self.own or inner.own

    def step(self, name: str, call: Any) -> Step:
        """The step that calls something with these arguments."""
        return Step(name, call, self.places, self.place_kwargs, self.reads)

    def _tensor(self, interpreter: RecordInterpreter, i: int, arg: Any) -> None:
        """Take a wrapper apart that is argument `i`."""
        if not arg.interpreter.alive:
            arg = strip_dead(arg)  # it may stand for a value of this level
        while type(arg) is RecordedTensor and arg.slot is None:
            self.own = self.own or arg.interpreter is interpreter
            arg = arg.value
        value: Any = arg
        place: Any = arg
        if type(arg) is RecordedTensor:
            recorder: Any = arg.interpreter
            if recorder is interpreter:
                value, place = arg.value, Slot(arg.slot)
                self.reads.append(arg.slot)
                self.own = True
            elif recorder.closed is not None:
                place = arg.value  # only its shape will be read, or there is an error now
        self.values[i] = value
        self.places[i] = place


class RecordInterpreter(Interpreter):
    """One active level that writes down a program.

    Attributes:
        name: The transform, for messages.
        what: What its inputs are called, for messages.
        closed: What is differentiated at present, if an op on a value of this level is an error:
            values are then not to be read any more.
    """

    wrapper = RecordedTensor
    keeps_values = True  # the program keeps what its ops are given
    transform: ClassVar[str] = ""  # no transform of users: `explain` has nothing to say of it

    def __init__(self, name: str, what: str) -> None:
        super().__init__()
        self.name = self.transform = name  # type: ignore[misc] # for the trace log
        self.what = what
        self.closed: str | None = None
        self.steps: list[Step] = []
        self.size = 0

    def __str__(self) -> str:
        """The transform as the user wrote it."""
        return self.name

    def input(self, value: Any) -> RecordedTensor:
        """The next input of the program, before any op; `value` has its shape, and is zero."""
        return self._wrap(value, self._new_slot())

    def constant(self, value: Any) -> RecordedTensor:
        """Wrap a value that the program does not compute."""
        return self._wrap(value, None)

    def is_constant(self, wrapper: Any) -> bool:
        """Whether the program does not compute it."""
        return wrapper.slot is None

    def rebind(self, target: Any, new: Any) -> None:
        """Stand for another value from now on."""
        target.value, target.slot = new.value, new.slot

    def _new_slot(self) -> int:
        self.size += 1
        return self.size - 1

    def _wrap(self, value: Any, slot: int | None) -> RecordedTensor:
        stride = None if value.is_contiguous() else value.stride()
        out: RecordedTensor = box(RecordedTensor, value, value.shape, stride)
        out.interpreter = self
        out.value = value
        out.recipe = None
        out.slot = slot
        return out

    def process(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op on zeros and write it down."""
        if self.mutated:
            refresh_all(self, args, kwargs)
        known = facts(op)
        if known.mutated:
            return mutate(self, op, args, kwargs)
        given = _Given(self, args, kwargs)
        if not given.own:
            out = pass_down(self, op, tuple(given.values), given.kwargs)
            return map_tensors(self._value, out)  # what was adopted on the way is of no use here
        if given.reads:
            out = self._record(known, given)
        else:
            out = map_tensors(self.constant, lower(self, op, tuple(given.values), given.kwargs))
        if self.is_own(args[0]) and (
            known.is_view or (known.may_be_view and made_as_view(out, args[0]))
        ):
            record_views(out, op, args, kwargs)
        return out

    def _value(self, tensor: Any) -> Any:
        return tensor.value if self.is_own(tensor) else tensor

    def _record(self, known: OpFacts, given: _Given) -> Any:
        op = known.op
        if op is _CHECK_ERRORS:
            return None  # of zeros it says nothing
        if known.shape_alone:
            return map_tensors(self.constant, lower(self, op, tuple(given.values), given.kwargs))
        if self.closed is not None:
            if _reads_shapes_alone(op, given.places):
                return lower(self, op, tuple(given.values), given.kwargs)
            raise self.not_linear(self.closed, "its derivative depends on the input")
        if known.is_random:
            raise self.not_linear(known.name, "it draws random numbers")
        out = lower(self, op, tuple(given.values), given.kwargs)
        if not _all_tensors(out):
            raise self.not_linear(known.name, "it asks for a Python value, which is not known yet")
        fixed = FIXED.get(op, ())
        if fixed and any(type(place) is Slot for place in given.places[1:]):
            fixed = ()
        return self.append(given.step(known.name, in_any_layout(known)), out, fixed)

    def append(self, step: Step, out: Any, fixed: Collection[int] = ()) -> Any:
        """Write down a step that gives `out` from zeros; return the outputs as wrappers.

        Those at the places `fixed` are not for the program to compute.
        """
        self.steps.append(step)
        if isinstance(out, Tensor):
            slot = self._new_slot()
            step.outs.append(slot)
            return self._wrap(out, slot)
        step.single = False
        wrapped = []
        for at, item in enumerate(out):
            place = None if item is None or at in fixed else self._new_slot()
            step.outs.append(place)
            wrapped.append(None if item is None else self._wrap(item, place))
        return type(out)(wrapped)

    def program(self, outputs: Sequence[Any]) -> Program:
        """What has been written down that leads to `outputs`; constants are handed out."""
        places = _Given(self, outputs, {}).places
        return Program(self.name, self.size, self.steps, places)

    def origin(self, value: RecordedTensor) -> str:
        """The op that gave a value, for messages."""
        return next(step.name for step in self.steps if value.slot in step.outs)

    def not_linear(self, name: str, why: str) -> Exception:
        """The error for an op that is not linear in the values of this level."""
        return NotLinearError(
            message(
                f"{self.name} met {name}, which is not linear in the {self.what}",
                self.where(),
                why,
                f"to fix: use linear ops of the {self.what} alone",
            )
        )


_CHECK_ERRORS = aten._linalg_check_errors.default


# The backward of a padding is given what was padded, and looks at its shape.
_PADDINGS = frozenset(
    getattr(aten, f"{kind}_pad{rank}d_backward").default
    for kind in ("reflection", "replication")
    for rank in (1, 2, 3)
)


def _reads_shapes_alone(op: Any, places: Sequence[Any]) -> bool:
    """Whether an op of a pullback reads no element of the values that are among its arguments."""
    held = {i for i, place in enumerate(places) if type(place) is Slot}
    if op in _PADDINGS:
        return held == {1}
    if op is aten.convolution_backward.default:
        # (ct, input, weight, ..., output_mask): each of the two for the cotangent of the other
        input_needed, weight_needed, _ = places[-1]
        return held == ({2} if weight_needed else {1}) and not (input_needed and weight_needed)
    return False


def _all_tensors(out: Any) -> bool:
    if isinstance(out, (list, tuple)):
        return all(item is None or isinstance(item, Tensor) for item in out)
    return isinstance(out, Tensor)


@applying(RecordInterpreter)
def _apply(
    interpreter: RecordInterpreter, custom: Custom, args: tuple[Any, ...], needs: Needs
) -> Applied:
    """An `autograd.Function` on values of the program is one step of it."""
    given = _Given(interpreter, args, {})
    applied = apply_custom(custom, tuple(given.values), needs)
    if not given.reads:
        return applied.lifted(args, [map_tensors(interpreter.constant, o) for o in applied.outs])
    if interpreter.closed is not None:
        raise interpreter.not_linear(interpreter.closed, "its derivative depends on the input")
    if any(needs) and None in applied.sources:
        raise interpreter.not_linear(
            custom.name, "it is differentiated again, and its forward saves an intermediate value"
        )

    def call(*values: Any) -> Any:
        out = apply_here(custom, values)
        return out if isinstance(out, tuple) else (out,)

    outs = interpreter.append(given.step(custom.name, call), applied.outs)
    return applied.lifted(args, outs)
