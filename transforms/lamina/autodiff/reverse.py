"""Reverse mode: the interpreter of `vjp` and `grad`, and how declarations are recorded."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lamina.autodiff import rules as _rules
from lamina.autodiff.borrowed import borrowed_vjp
from lamina.autodiff.declare import (
    REVERSE,
    Constant,
    Linear,
    Multilinear,
    Pointwise,
)
from lamina.autodiff.declared import (
    binary_pullback,
    hand_rule,
    linear_pullback,
    linear_rule,
    multilinear_rule,
    pointwise_rule,
    same_dtype_pullback,
    saved_for,
    unary_plain_pullback,
    unary_pullback,
)
from lamina.autodiff.hooks import GradFn
from lamina.autodiff.operands import (
    Split,
    constant_outputs,
    derivative_state,
    pass_through,
    split,
)
from lamina.autodiff.parts import PARTS, part_pullback
from lamina.autodiff.tape import Node
from lamina.autodiff.wrappers import TrackedTensor, track, track_like
from lamina.decompose.table import decomposition_of, made_of
from lamina_core.admission import decompose_handler
from lamina_core.alias import mutate
from lamina_core.config import config
from lamina_core.dispatch import call_first, call_one, call_two, under_autocast
from lamina_core.handlers import Handler, HandlerInterpreter
from lamina_core.recipe import ViewRecipe
from lamina_core.schema import OpFacts, facts
from lamina_core.views import record_views
from lamina_core.wrapper import made_as_view

__all__ = ["ReverseInterpreter", "apply_vjp", "record", "state_of"]

Tensor = torch.Tensor
_is_grad_enabled = torch.is_grad_enabled
_rules.load()


class ReverseInterpreter(HandlerInterpreter):
    """One active reverse-mode level."""

    wrapper = TrackedTensor
    transform = "vjp"
    differentiates = True
    keeps_values = True
    handlers: ClassVar[dict[int, Handler]] = REVERSE.handlers

    def __init__(self, name: str = "vjp") -> None:
        super().__init__()
        self.name = name

    def __str__(self) -> str:
        """The transform as the user wrote it."""
        return self.name

    @staticmethod
    def resolve(op: Any) -> Handler:
        """The handler of an op."""
        return _resolve(op)

    @classmethod
    def explain_op(cls, op: Any) -> str:
        """The state of an overload and the owner of its rule."""
        return REVERSE.describe(op, state_of(op))

    def leaf(self, value: Any) -> TrackedTensor:
        """Wrap an argument that is differentiated with respect to."""
        self.look(value)
        out = track(self, value, Node("input", None, (), (), ()))
        out.is_input = True
        if config.debug:
            out.fault()
        return out

    def argument(self, value: Any) -> TrackedTensor:
        """Wrap an argument that is not differentiated, but may be written to."""
        out = self.constant(value)
        out.is_input = True
        return out

    def constant(self, value: Any) -> TrackedTensor:
        """Wrap a value that does not depend on the differentiated arguments."""
        self.look(value)
        return track(self, value, None)

    def is_constant(self, wrapper: Any) -> bool:
        """Whether a wrapper has no place on the tape."""
        return wrapper.node is None

    def rebind(self, target: Any, new: Any) -> None:
        """Stand for another value from now on."""
        target.value = new.value
        if self.tracking() or target.node is None:
            # A write under no_grad changes the value alone, as in PyTorch.
            target.node, target.index = new.node, new.index
        target.logical, target.strides = new.logical, new.strides

    def grad_fn(self, wrapper: Any) -> Any:
        """The op that made a wrapper; None for an input, as PyTorch has it."""
        return None if wrapper.node.pullback is None else GradFn(wrapper.node)

    def register_hook(self, wrapper: Any, hook: Any) -> Any:
        """See `lamina_core.answers.register_hook`."""
        return GradFn(wrapper.node).register_tensor_hook(wrapper.index, hook)

    def tracking(self) -> bool:
        """Whether ops are recorded: not so under `torch.no_grad()`."""
        return self.grad_enabled and _is_grad_enabled()


# -- finding the handler of an op ------------------------------------------------------------------


def state_of(op: Any) -> str:
    """Which of the five states of `lamina_core.rules.STATES` an op is in under reverse mode."""
    return derivative_state(REVERSE, op)


def _resolve(op: Any) -> Any:
    known = facts(op)
    rule = REVERSE.lookup(op)
    if rule is None:
        if decomposition_of(op) is not None:
            return decompose_handler(known, decomposition_of(op))
        if known.mutated:
            return mutate
        if known.is_composite:
            return decompose_handler(known, op.decompose)
        return _rule_handler(known, None)
    if rule.state == "decomposed":
        return decompose_handler(known, rule.function)
    if isinstance(rule.function, Pointwise):
        return _pointwise_handler(known, rule.function)
    if isinstance(rule.function, Constant):
        return _constant_handler(known)
    if isinstance(rule.function, Linear):
        return _linear_handler(known, rule.function)
    return under_autocast(op, _rule_handler(known, rule_function(op)))


def rule_function(op: Any) -> Any:
    """The rule `(needs, *args, **kwargs)` of an op, made from its declaration; None if borrowed."""
    rule = REVERSE.lookup(op)
    if rule is None:
        return None
    match rule.function:
        case Pointwise() as declared:
            return pointwise_rule(declared)
        case Linear() as declared:
            return linear_rule(declared)
        case Multilinear() as declared:
            return multilinear_rule(declared)
        case by_hand:
            return hand_rule(facts(op), by_hand)


def _constant_handler(known: OpFacts) -> Any:
    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        cut = split(interpreter, known, args, kwargs)
        out = pass_through(interpreter, handle, op, args, kwargs, cut)
        if out is NotImplemented:
            out = constant_outputs(interpreter, known, args, cut)
            if known.is_view:
                record_views(out, op, args, kwargs)
        return out

    return handle


def _rule_handler(known: OpFacts, rule: Any) -> Any:
    """The handler of a rule `(needs, *args, **kwargs)`; None stands for the borrowed derivative."""

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        cut = split(interpreter, known, args, kwargs)
        out = pass_through(interpreter, handle, op, args, kwargs, cut)
        if out is not NotImplemented:
            return out
        positions = positions_of(interpreter, cut)
        if not any(positions) or not interpreter.tracking():
            out = constant_outputs(interpreter, known, args, cut)
        else:
            out = record(interpreter, known, rule, cut, positions)
            if out is NotImplemented:  # the rule leaves this call to the ops it is made of
                return decompose_handler(known, made_of(op))(interpreter, op, args, kwargs)
            if isinstance(out, Tensor) and cut.args and out is cut.args[0]:
                return args[0]
        if (
            known.is_view or (known.may_be_view and made_as_view(out, args[0]))
        ) and interpreter.is_own(args[0]):
            return record_views(out, op, args, kwargs)
        return out

    return handle


def positions_of(interpreter: Any, cut: Split) -> tuple[tuple[Node, int] | None, ...]:
    """The tape position of each operand; None for constants."""
    wrapper = TrackedTensor
    return tuple(
        [
            (o.node, o.index)
            if type(o) is wrapper and o.interpreter is interpreter and o.node is not None
            else None
            for o in cut.operands
        ]
    )


def apply_vjp(
    interpreter: Any, known: OpFacts, rule: Any, needs: tuple[bool, ...], args: Any, kwargs: Any
) -> Any:
    """Run a rule on values: `(out, residuals, pullback)`, the last None where out is constant."""
    if rule is None:
        return borrowed_vjp(interpreter, known, needs, args, kwargs)
    return rule(needs, *args, **kwargs)


def record(interpreter: Any, known: OpFacts, rule: Any, cut: Split, positions: Any) -> Any:
    """Run a rule and put its node on the tape."""
    needs = tuple([position is not None for position in positions])
    found = apply_vjp(interpreter, known, rule, needs, cut.args, cut.kwargs)
    if found is NotImplemented:
        return found
    out, residuals, pullback = found
    if isinstance(out, Tensor):
        if pullback is None or not (out.is_floating_point() or out.is_complex()):
            return track(interpreter, out, None)
        return track(interpreter, out, Node(known.name, pullback, residuals, needs, positions))
    if not isinstance(out, (list, tuple)):
        return out  # a number or a bool, such as `equal` gives
    outs = list(out)
    node = None
    if pullback is not None:
        node = Node(known.name, pullback, residuals, needs, positions, len(outs))
    wrapped = [
        (
            track(interpreter, o, node if o.is_floating_point() or o.is_complex() else None, i)
            if isinstance(o, Tensor)
            else o
        )
        for i, o in enumerate(outs)
    ]
    return wrapped if known.returns == ("list",) else tuple(wrapped)


# -- the short ways of declarations ----------------------------------------------------------------

_NO = (None,)
_ONE = (True,)


def _pointwise_handler(known: OpFacts, declared: Pointwise) -> Any:
    rule = pointwise_rule(declared)
    functions = [product and product.function for product in declared.products]
    only = [product and product.only for product in declared.products]
    positions = known.tensor_args
    call, name = known.call, known.name

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        cut = split(interpreter, known, args, kwargs)
        out = pass_through(interpreter, fast, op, args, kwargs, cut)
        if out is not NotImplemented:
            return out
        places = positions_of(interpreter, cut)
        if not any(places) or not interpreter.tracking():
            return constant_outputs(interpreter, known, args, cut)
        return record(interpreter, known, rule, cut, places)

    def unary(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: one operand, and its derivative needs the operand, the result, or neither.
        x = args[0]
        if type(x) is TrackedTensor and x.interpreter is interpreter and x.node is not None:
            value = x.value
            if interpreter.grad_enabled and _is_grad_enabled():
                if len(args) == 1 and not kwargs:
                    out = call_one(op, call, value)
                else:
                    out = call(value, *args[1:], **kwargs)
                dtype = out.dtype
                if dtype is value.dtype and dtype.is_floating_point:
                    place = ((x.node, x.index),)
                    if wants == "none":
                        node = Node(name, unary_plain_pullback, (function,), _ONE, place, 1, _NO)
                    else:
                        saved = (function, value if wants == "x" else out)
                        node = Node(name, unary_pullback, saved, _ONE, place)
                    return track_like(x, out, node)
        return handle(interpreter, op, args, kwargs)

    def binary(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: two operands of one shape and dtype, or one and a Python number.
        if len(args) != 2 or kwargs or not (interpreter.grad_enabled and _is_grad_enabled()):
            return handle(interpreter, op, args, kwargs)
        x, y = args
        if type(x) is not TrackedTensor or x.interpreter is not interpreter:
            return handle(interpreter, op, args, kwargs)
        x_value, x_at, y_at = x.value, None, None
        if x.node is not None:
            x_at = (x.node, x.index)
        if type(y) is TrackedTensor and y.interpreter is interpreter:
            y_value = y.value
            if y.node is not None:
                y_at = (y.node, y.index)
            if (
                x.logical != y.logical
                or y.strides is not None
                or x_value.dtype is not y_value.dtype
            ):
                return handle(interpreter, op, args, kwargs)
        elif isinstance(y, Tensor):
            return handle(interpreter, op, args, kwargs)
        else:
            y_value = y
        if not (x_at or y_at) or not x_value.dtype.is_floating_point:
            return handle(interpreter, op, args, kwargs)
        out = call_two(op, call, x_value, y_value)
        if out.dtype is not x_value.dtype:
            return handle(interpreter, op, args, kwargs)
        saved = (
            functions[0] if x_at else None,
            saved_for(only[0], out, x_value, y_value) if x_at else None,
            functions[1] if y_at else None,
            saved_for(only[1], out, x_value, y_value) if y_at else None,
        )
        needs = (x_at is not None, y_at is not None)
        return track_like(x, out, Node(name, binary_pullback, saved, needs, (x_at, y_at)))

    fast = handle
    if positions == (0,) and only[0] in ("none", "out", "x"):
        function, wants = functions[0], only[0]
        fast = unary
    elif positions == (0, 1) and len(only) == 2 and all(wish is not None for wish in only):
        fast = binary
    return fast


def _linear_handler(known: OpFacts, declared: Linear) -> Any:
    general = _rule_handler(known, linear_rule(declared))
    if len(known.tensor_args) != 1 or known.list_args or known.tensor_kwargs:
        return general
    call, name, is_view, may_be_view = known.call, known.name, known.is_view, known.may_be_view
    function, getters = declared.transpose.function, declared.transpose.getters
    unversioned = None if declared.transpose.tensors else ()
    is_part = known.op in PARTS

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: one operand that is on the tape.
        x = args[0]
        if (
            type(x) is not TrackedTensor
            or x.interpreter is not interpreter
            or x.node is None
            or not (interpreter.grad_enabled and _is_grad_enabled())
        ):
            return general(interpreter, op, args, kwargs)
        value, rest = x.value, args[1:]
        out = call_first(op, call, value, rest, kwargs)
        if out is value:
            return x
        operands = (value,)
        saved = [getter(out, operands, args, kwargs) for getter in getters]
        place = ((x.node, x.index),)
        if is_part and not kwargs:
            residuals = (call, rest, function, *saved)
            node = Node(name, part_pullback, residuals, _ONE, place, 1, unversioned)
        elif out.dtype is value.dtype:
            residuals = (function, *saved)
            node = Node(name, same_dtype_pullback, residuals, _ONE, place, 1, unversioned)
        else:
            residuals = (function, 1, value.dtype, *saved)
            node = Node(name, linear_pullback, residuals, _ONE, place, 1, unversioned)
        wrapped = track(interpreter, out, node)
        if is_view or (may_be_view and made_as_view(out, value)):
            wrapped.recipe = ViewRecipe(x, op, rest, kwargs, None)
        return wrapped

    return handle
