"""`LevelTensor`: the base of all wrappers, and the way an op on wrappers finds its interpreter.

A wrapper is a tensor without storage. It shows the logical shape, dtype and device, belongs to one
`Interpreter`, and holds a `value` of a lower level: a plain tensor, or a wrapper of a lower level.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lamina_core.config import tensor_summary
from lamina_core.errors import (
    CapturedTensorError,
    EscapedTensorError,
    MissingRuleError,
    message,
)
from lamina_core.level import Level
from lamina_core.mode import thread_mode
from lamina_core.outer import OuterState
from lamina_core.recipe import ViewRecipe
from lamina_core.schema import facts
from lamina_core.tensors import needs_guard, tensors_in
from lamina_core.torch_hooks.keys import CONJUGATE, NEGATIVE, set_excluded
from lamina_core.torch_hooks.tensors import TensorMeta, is_alias_of, make_wrapper, no_torch_function

__all__ = [
    "LevelTensor",
    "box",
    "highest_interpreter",
    "level_of",
    "made_as_view",
    "plain_of",
    "shares_memory",
    "strip_dead",
]

_default_dtype = torch.get_default_dtype

# Dtypes of a tensor without dims that indexing takes for a number, and asks for its one value.
_NUMBERS = frozenset(
    (
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
)


class _Kind(TensorMeta):
    """The class of the wrapper classes: see NOTE [Indices without dims] in `indexing`."""

    @property
    def __torch_function__(cls) -> Any:
        """What `torch.overrides` sees of the class: that an instance may have a door of its own."""
        return _some_have_one


def _some_have_one(*args: Any, **kwargs: Any) -> Any:
    """Stands for "not switched off"; what is called is the door of an instance."""
    return NotImplemented


class LevelTensor(torch.Tensor, metaclass=_Kind):
    """A tensor that stands for a value at one level of the interpreter stack.

    Attributes:
        interpreter: The interpreter that made the wrapper and handles the ops on it.
        value: What the wrapper stands for, one or more levels below.
        recipe: How this wrapper was viewed out of another, or None if it is no view.
        version: Counts the writes to this wrapper (see `lamina_core.alias`).
        reshaped: The version at which its shape or memory was last changed in place.
        former: What it was until then, which its views of that time are views of.
        is_input: Whether the memory belongs to an argument of the transform.
        is_lifted: Whether it only stands for a plain tensor, at a level that has to see ops on it.
        logical: The shape, of wrappers that keep it; reading it back from the tensor takes longer.
        claims_grad: What it says of `requires_grad`, whoever follows it; None for the truth.
    """

    # Slots keep an instance from needing a dict, which would double the cost of a wrapper: 1 us.
    __slots__ = ("interpreter", "recipe", "value")

    interpreter: Level
    value: Any
    recipe: ViewRecipe | None

    # Class-level defaults, for what few wrappers ever set (in a dict, then).
    version: int = 0
    reshaped: int = 0
    former: LevelTensor | None = None
    is_input: bool = False
    is_lifted: bool = False
    logical: Any = None
    claims_grad: bool | None = None

    # What a subclass adds in its slots, and which slots hold values of lower levels, for those who
    # look through a wrapper: all of them unless the class says so.
    fields: ClassVar[tuple[str, ...]] = ()
    holds: ClassVar[tuple[str, ...]] = ("value",)

    classes: ClassVar[set[type]] = set()

    # The ops of a wrapper are seen below, in `__torch_dispatch__`; nothing happens at this door.
    __torch_function__ = no_torch_function

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Remember every wrapper class, so that `type(x) in classes` tells wrappers apart."""
        super().__init_subclass__(**kwargs)
        slots = cls.__dict__.get("__slots__", ())
        cls.fields = (*cls.fields, *((slots,) if isinstance(slots, str) else slots))
        if "holds" not in cls.__dict__:
            cls.holds = ("value", *cls.fields)
        LevelTensor.classes.add(cls)

    @classmethod
    # The second route: see `lamina_core.dispatch`.
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Hand an op that no mode caught to the interpreter of the highest level involved."""
        set_excluded(CONJUGATE, False)
        set_excluded(NEGATIVE, False)
        if not kwargs and len(args) == 1 and type(args[0]) in _CLASSES:
            interpreter = args[0].interpreter  # one operand: nothing to search
            if interpreter.alive:
                return interpreter.process(func, args, {})
        kwargs = kwargs or {}
        interpreter = highest_interpreter(args, kwargs)
        if interpreter is not None:
            return interpreter.process(func, args, kwargs)
        return _run_dead(func, args, kwargs)

    # Rebound in `lamina_core.indexing`.
    index_door: ClassVar[Any] = None

    def data_ptr(self) -> int:
        """Refused: there is no memory, and a kernel that is called by its own way would take 0."""
        raise self._without_memory()

    def __dlpack__(self, **how: Any) -> Any:
        """Refused: what another library is given is the address 0, from which it reads."""
        raise self._without_memory()

    def _without_memory(self) -> MissingRuleError:
        return MissingRuleError(
            message(
                f"the memory of {self!r} was asked for, which has none of its own",
                self.interpreter.where(),
                "to fix: register the kernel as an op (torch.library.custom_op), or call it inside "
                "an autograd.Function",
            )
        )

    def dead_value(self) -> Any:
        """What stands for this wrapper once its interpreter has been popped.

        Raises:
            CapturedTensorError: If the level is only asleep, and this has a derivative there.
            EscapedTensorError: If its value is not all that it stood for.
        """
        self.need_meaning()
        return self.value if self.recipe is None else _shown(self)

    def need_meaning(self) -> None:
        """Raise unless this wrapper stands for its value although its level is not active."""
        interpreter = self.interpreter
        if interpreter.asleep is not None and not interpreter.is_constant(self):
            raise CapturedTensorError(
                message(
                    f"a rule of {interpreter.asleep} uses a tensor that it is not given",
                    f"it belongs to level {interpreter.level}: {interpreter}",
                    f"captured: {self!r}",
                    "to fix: pass the tensor to the function, and save it for the rule",
                )
            )
        if not (interpreter.differentiates or interpreter.is_constant(self)):
            raise EscapedTensorError(
                message(
                    f"{type(self).__name__} of shape {list(self.shape)} is used after its "
                    "transform has returned",
                    f"escaped from level {interpreter.level}: {interpreter}",
                    "to fix: return the tensor from the function instead of storing it",
                )
            )

    def fault(self) -> str | None:
        """What is wrong with this wrapper, in words; None if nothing is.

        Asked of every wrapper that an op gives under `config.debug`: see `lamina_core.checking`.
        """
        return self.unlike(self.value, self.value.shape)

    def unlike(self, value: Any, size: Any) -> str | None:
        """How this wrapper differs from a value of which one example has the given shape."""
        if self.shape == size and self.dtype == value.dtype and self.device == value.device:
            return None
        mine, its = tensor_summary(self), tensor_summary(value)
        return f"{mine} on {self.device} stands for {its} on {value.device}"

    def example(self, value: Any) -> Any:
        """What this wrapper stands for; of many examples, one.

        Args:
            value: The plain tensor behind its value.
        """
        return value

    def describe(self) -> str:
        """The fields that the repr shows before the summary of the logical tensor."""
        return f"level={self.interpreter.level}"

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Show the class, the level and the logical tensor; the value follows after an arrow."""
        dead = "" if self.interpreter.alive else ", dead"
        return f"{type(self).__name__}({self.describe()}{dead}, {tensor_summary(self)})"


_CLASSES = LevelTensor.classes


def _shown(wrapper: Any) -> Any:
    """The value of a dead view, made again if what it views was written to since."""
    chain = []
    while wrapper.recipe is not None:
        chain.append(wrapper)
        wrapper = wrapper.recipe.parent
    value = wrapper.dead_value()
    for view in reversed(chain):
        recipe, parent = view.recipe, view.recipe.parent
        parent.need_meaning()
        if value is parent.value and parent.version == recipe.version:
            value = view.value
        else:
            out = recipe.op(value, *recipe.args, **recipe.kwargs)
            value = out if recipe.index is None else out[recipe.index]
    return value


def box(cls: type[LevelTensor], value: Any, size: Any, stride: Any) -> Any:
    """A wrapper of a logical size (and stride, unless contiguous) like the value otherwise.

    HOT: without dtype and device the wrapper costs 0.8 us, with them 1.3.
    """
    dtype = value.dtype
    if value.is_cpu and dtype is _default_dtype():
        return make_wrapper(cls, size) if stride is None else make_wrapper(cls, size, stride)
    out = make_wrapper(cls, size, stride, dtype=dtype, device=value.device)
    if not size and dtype in _NUMBERS:
        out.__torch_function__ = LevelTensor.index_door
    return out


def level_of(value: Any) -> int:
    """The level of a value: 0 for anything that is not a wrapper of a live interpreter."""
    if type(value) in _CLASSES and value.interpreter.alive:
        return int(value.interpreter.level)
    return 0


def highest_interpreter(args: Any, kwargs: dict[str, Any]) -> Level | None:
    """The live interpreter of the highest level among the wrappers in the arguments of an op."""
    best = None
    level = 0
    for arg in args:
        kind = type(arg)
        if kind in _CLASSES:
            candidate = arg.interpreter
            if candidate.level > level and candidate.alive:
                best, level = candidate, candidate.level
        elif kind is list or kind is tuple:
            candidate = highest_interpreter(arg, {})
            if candidate is not None and candidate.level > level:
                best, level = candidate, candidate.level
    if kwargs:
        candidate = highest_interpreter(list(kwargs.values()), {})
        if candidate is not None and candidate.level > level:
            best = candidate
    return best


def strip_dead(arg: Any) -> Any:
    """Replace dead wrappers in one argument by what stands for them."""
    kind = type(arg)
    if kind in _CLASSES:
        while type(arg) in _CLASSES and not arg.interpreter.alive:
            arg = arg.dead_value()
        return arg
    if kind is list or kind is tuple:
        return kind([strip_dead(item) for item in arg])
    return arg


def _run_dead(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op whose wrappers are all dead: on what stands for them, at the present level.

    Called below autograd, so the keys of the caller are brought back for the values.
    """
    args = tuple([strip_dead(arg) for arg in args])
    kwargs = {key: strip_dead(value) for key, value in kwargs.items()}
    if facts(op).is_view and not any(needs_guard(tensor) for tensor in tensors_in(args, kwargs)):
        return op(*args, **kwargs)  # outside the transforms, C++ makes a view of it that it tracks
    outer = thread_mode().outer or _PRISTINE
    with outer.guard():
        return op(*args, **kwargs)


_PRISTINE = OuterState()


def plain_of(value: Any) -> Any:
    """The plain tensor at the bottom of a stack of wrappers."""
    while type(value) in _CLASSES:
        value = value.value
    return value


def made_as_view(out: Any, base: Any) -> bool:
    """Whether an op that is a view where memory allows it has made one of `base`.

    A level below may know it for a view although it was copied: see NOTE [Writes].
    """
    while type(out) in _CLASSES and type(base) in _CLASSES:
        if out.recipe is not None and out.recipe.parent is base:
            return True
        out, base = out.value, base.value
    return shares_memory(out, base)


def shares_memory(first: Any, second: Any) -> bool:
    """Whether two values lie in the same memory at level 0."""
    return bool(is_alias_of(plain_of(first), plain_of(second)))
