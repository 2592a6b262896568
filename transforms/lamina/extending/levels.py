"""`RuleInterpreter`: a level at which ops mean what a table of rules says of its own wrappers.

A new transform is a wrapper class, a subclass of this, and rules. What every level has to see to
beside its rules is done here: ops on captured tensors and constants, views and writes, composite
ops, `torch.autograd.Function`, the user's own autograd, and errors for all else. `lamina.extend`
is where it is explained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from lamina.custom.levels import derivative_levels
from lamina.decompose.table import decomposition_of, made_of
from lamina_core import pytree
from lamina_core.alias import mutate
from lamina_core.dispatch import lower, pass_down, watched
from lamina_core.errors import (
    MissingRuleError,
    MutationError,
    NotDifferentiableError,
    RuleError,
    message,
)
from lamina_core.function import Applied, Custom, Needs, applying
from lamina_core.handlers import Handler, HandlerInterpreter
from lamina_core.overloads import aten
from lamina_core.rules import RuleTable
from lamina_core.schema import OpFacts, facts
from lamina_core.scopes import run_at
from lamina_core.signature import need_out_of_place, need_signature, overload_of
from lamina_core.tensors import map_tensors, needs_guard, tensors_in
from lamina_core.views import record_views, refresh_all
from lamina_core.wrapper import LevelTensor, made_as_view, strip_dead

__all__ = ["RuleInterpreter"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


class RuleInterpreter(HandlerInterpreter):
    """One active level of a transform that is given by rules.

    A subclass names its `wrapper` and its `transform`, and says what a constant is. The slots of
    the wrapper class are its *fields*: what it holds besides its `value`.

    A subclass of a subclass has its rules too, and may replace them.

    Attributes:
        rules: The rules of the transform, by overload.
    """

    opaque = True
    rules: ClassVar[RuleTable]

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[tuple[Any, dict[str, Any]]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the transform a table, and see that it says what it must."""
        super().__init_subclass__(**kwargs)
        wrapper = getattr(cls, "wrapper", None)
        if not (isinstance(wrapper, type) and issubclass(wrapper, LevelTensor)):
            raise _unfinished(cls, "wrapper", "its subclass of LevelTensor", wrapper)
        if not (isinstance(cls.transform, str) and cls.transform):
            raise _unfinished(cls, "transform", "its name, for messages", cls.transform)
        for name in ("constant", "is_constant"):
            if getattr(cls, name) is getattr(RuleInterpreter, name):
                raise _unfinished(cls, name, "a method", None)
        cls.rules = RuleTable(cls.transform)
        cls.handlers = cls.rules.handlers

    # -- what a transform may say ------------------------------------------------------------------

    @classmethod
    def rule(cls, *ops: Any, replace: bool = False) -> Callable[[Any], Any]:
        """Register the decorated function as what the given overloads mean at a level of this kind.

        It is called as `rule(level, *args, **kwargs)`, with the arguments of the op, if one of its
        tensors is a wrapper of the level and no constant. All tensors it gets are wrappers of the
        level: others have been made constants. It returns wrappers of the level, or
        `NotImplemented` to leave a call to the ops that the op is made of.

        Args:
            ops: The overloads, or ops made by `torch.library.custom_op`.
            replace: Whether the rule may take the place of another.
        """

        def register(function: Any) -> Any:
            for op in map(overload_of, ops):
                need_signature(f"rule of {cls.transform}", op, function, ("level",))
                need_out_of_place(f"rule of {cls.transform}", op)
                cls.rules.register(op, function, replace=replace, given=True)
            RuleTable.forget_handlers()  # subclasses use it too
            return function

        return register

    @classmethod
    def family(cls, known: OpFacts) -> Callable[..., Any] | None:
        """The rule, made from its facts, of an op without one of its own; None if there is none."""
        return None

    def __str__(self) -> str:
        """The transform as the user wrote it."""
        return self.transform

    # -- wrappers ----------------------------------------------------------------------------------

    def argument(self, value: Any, **fields: Any) -> Any:
        """`wrap`, for an argument of the transform: its owner shall see what is written to it."""
        out = self.wrap(value, **fields)
        out.is_input = True
        self.arguments.append((out, {"value": value, **fields}))
        return out

    def results(self, tree: Any) -> Any:
        """The outputs of the user's function: every tensor as a wrapper of the level, up to date.

        To be called once, at the end: what was written to arguments is written to their owners too.
        """

        def own(leaf: Any) -> Any:
            leaf = strip_dead(leaf)
            if not isinstance(leaf, Tensor):
                return leaf
            if not self.is_own(leaf):
                return self.constant(leaf)
            refresh_all(self, (leaf,), {})
            return leaf

        found = pytree.tree_map(own, tree)
        self._write_back()
        return found

    def _write_back(self) -> None:
        """Let the caller see what was written to the arguments (NOTE [Writes])."""
        written = {id(wrapper) for wrapper in self.written}
        for wrapper, originals in self.arguments:
            if id(wrapper) not in written:
                continue
            news = {name: getattr(wrapper, name) for name in originals}
            pairs = [(originals[name], new) for name, new in news.items()]
            tensors = [(old, new) for old, new in pairs if isinstance(old, Tensor)]
            for old, new in tensors:
                if not isinstance(new, Tensor) or any(
                    old is other and new is not its for other, its in tensors
                ):
                    raise self.error(
                        MutationError,
                        f"what was written to an argument of shape {list(wrapper.shape)} does not "
                        "fit into the tensors that were passed for its fields",
                        f"the fields: value, {', '.join(self.wrapper.fields)}",
                        "to fix: pass a tensor of its own for each field, or write to a clone",
                    )
            with run_at(self.below):
                for old, new in tensors:
                    old.copy_(new)

    # -- how an op is handled ----------------------------------------------------------------------

    @classmethod
    def _rule_of(cls, op: Any) -> Any:
        tables = [base.__dict__["rules"] for base in cls.__mro__ if "rules" in base.__dict__]
        return next((rule for table in tables if (rule := table.lookup(op)) is not None), None)

    @classmethod
    def state_of(cls, op: Any) -> str:
        """Which of the states of `lamina_core.rules.STATES` an op is in under this transform."""
        known = facts(op)
        if cls._rule_of(op) is not None:
            return "rule"
        if known.mutated and decomposition_of(op) is None:
            counterpart = known.functional()
            return "missing" if counterpart is None else cls.state_of(counterpart)
        if _reads_no_element(known) or cls.family(known) is not None:
            return "family"
        return "missing" if _made_of(op) is None else "decomposed"

    @classmethod
    def explain_op(cls, op: Any) -> str:
        """The state of an overload and the owner of its rule."""
        rule = cls._rule_of(op)
        return cls.state_of(op) + (f" ({rule.owner})" if rule is not None else "")

    @classmethod
    def resolve(cls, op: Any) -> Handler:
        """The handler of an op: its rule, else a family, else the ops it is made of."""
        known = facts(op)
        rule = cls._rule_of(op)
        if rule is not None:
            return _handler(known, rule.function)
        if known.mutated and decomposition_of(op) is None:
            return mutate
        if _reads_no_element(known):
            return _handler(known, None)
        family = cls.family(known)
        if family is not None:
            return _handler(known, family)
        return _handler(known, _in_parts if _made_of(op) is not None else _missing)


def _unfinished(cls: type, name: str, what: str, got: Any) -> RuleError:
    return RuleError(
        message(
            f"{cls.__name__} does not say its {name}",
            "" if got in (None, "") else f"got: {got!r}",
            f"to fix: define {name} in the class: {what}",
        )
    )


def _made_of(op: Any) -> Callable[..., Any] | None:
    """What an op can be run as. PyTorch's decompositions of random ops draw other numbers."""
    parts = _PARTS.get(op) or (decomposition_of if facts(op).is_random else made_of)(op)
    return op.decompose if parts is None and facts(op).is_composite else parts


def _copy(x: Any, src: Any, non_blocking: bool = False) -> Any:
    return src.to(device=x.device, dtype=x.dtype).expand(x.shape)


def _fill(x: Any, value: Any) -> Any:
    return value.to(device=x.device, dtype=x.dtype).expand(x.shape)


def _dropout(x: Any, p: float, train: bool | None) -> Any:
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    return x * keep * (0.0 if p == 1 else 1 / (1 - p)), keep


_PARTS: dict[Any, Callable[..., Any]] = {
    aten.copy.default: _copy,
    aten.fill.Tensor: _fill,
    aten.native_dropout.default: _dropout,
}
_RANDOM_LIKE = ("aten::rand_like", "aten::randint_like", "aten::randn_like")


def _reads_no_element(known: OpFacts) -> bool:
    return known.shape_alone or known.op._schema.name in _RANDOM_LIKE


def _handler(known: OpFacts, rule: Callable[..., Any] | None) -> Handler:
    """The handler of a rule `(level, *args, **kwargs)`; None stands for "reads no values"."""

    def handle(level: Any, op: Any, args: Any, kwargs: Any) -> Any:
        args = tuple([strip_dead(arg) for arg in args])
        kwargs = {key: strip_dead(value) for key, value in kwargs.items()}
        tensors = tensors_in(args, kwargs)
        own = [tensor for tensor in tensors if level.is_own(tensor)]
        if not level.watch and any(
            type(tensor) not in _CLASSES and needs_guard(tensor) for tensor in tensors
        ):
            level.watch = True
            return watched(level, handle, op, args, kwargs)
        if not own:
            return pass_down(level, op, args, kwargs)
        if rule is None or all(level.is_constant(tensor) for tensor in own):
            return _below(level, known, args, kwargs)

        if rule is _in_parts or rule is _missing:
            return rule(level, known, args, kwargs)

        def lift(tensor: Any) -> Any:
            return tensor if level.is_own(tensor) else _constant(level, tensor)

        lifted = [map_tensors(lift, arg) for arg in args]
        inner = {key: map_tensors(lift, value) for key, value in kwargs.items()}
        out = rule(level, *lifted, **inner)
        if out is NotImplemented:
            serve = _missing if _made_of(op) is None else _in_parts
            return serve(level, known, args, kwargs)
        map_tensors(lambda tensor: _need_own(level, known, tensor), out)
        return _with_recipe(level, known, out, op, args, kwargs)

    return handle


def _constant(level: Any, tensor: Any) -> Any:
    out = level.constant(tensor)
    if not level.is_own(out):
        raise level.error(
            RuleError,
            f"{type(level).__name__}.constant returned a {type(out).__name__} that is no wrapper "
            "of its level",
            "to fix: return self.wrap(value, ...)",
        )
    return out


def _below(level: Any, known: OpFacts, args: Any, kwargs: Any) -> Any:
    """Run an op on the values of constants; so are its results."""

    def value_of(tensor: Any) -> Any:
        return tensor.value if level.is_own(tensor) else tensor

    values = tuple([map_tensors(value_of, arg) for arg in args])
    inner = {key: map_tensors(value_of, value) for key, value in kwargs.items()}
    out = lower(level, known.op, values, inner)
    if values and out is values[0]:
        return args[0]
    return _with_recipe(level, known, map_tensors(level.constant, out), known.op, args, kwargs)


def _with_recipe(level: Any, known: OpFacts, out: Any, op: Any, args: Any, kwargs: Any) -> Any:
    if (known.is_view or (known.may_be_view and made_as_view(out, args[0]))) and level.is_own(
        args[0]
    ):
        return record_views(out, op, args, kwargs)
    return out


def _in_parts(level: Any, known: OpFacts, args: Any, kwargs: Any) -> Any:
    """Run an op as the ops it is made of, which the level sees."""
    parts: Any = _made_of(known.op)
    with run_at(level, autocast=known.is_composite):
        return parts(*args, **kwargs)


def _missing(level: Any, known: OpFacts, args: Any, kwargs: Any) -> Any:
    raise level.error(
        MissingRuleError,
        f"no {level.transform} rule for {known.name}",
        "registered overloads of the same op: "
        + (", ".join(level.rules.siblings(known.op)) or "none"),
        f"to fix: register one with @{type(level).__name__}.rule, or write the function with "
        "other ops",
    )


def _need_own(level: Any, known: OpFacts, tensor: Any) -> Any:
    if not level.is_own(tensor):
        rule = level._rule_of(known.op)
        raise level.error(
            RuleError,
            f"the {level.transform} rule of {known.name} returned a {type(tensor).__name__} that "
            "is no wrapper of its level",
            f"the rule: {rule.owner}" if rule else "the rule comes from family()",
            "to fix: return level.wrap(...), or level.constant(...) for what is a constant",
        )
    return tensor


@applying(RuleInterpreter)
def _run_forward(level: Any, custom: Custom, args: tuple[Any, ...], needs: Needs) -> Applied:
    """A `torch.autograd.Function` is its forward, at a level that has nothing else to say of it."""
    held = [getattr(arg, name) for arg in args if level.is_own(arg) for name in level.wrapper.holds]
    if any(isinstance(value, Tensor) and derivative_levels(value) for value in held):
        raise level.error(
            NotDifferentiableError,
            f"{custom.name} is an autograd.Function, of which {level.transform} runs the forward",
            "what it is given carries a derivative below, of which its backward says nothing",
            "to fix: write the function with ordinary ops, or say what it means with "
            f"@lamina.extend.applying({type(level).__name__})",
        )
    with run_at(level, autocast=True):
        return custom.forward(args, needs)
