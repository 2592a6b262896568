"""Forward mode: the interpreter of `jvp`, and how each kind of declaration pushes tangents."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch

from lamina.autodiff import rules as _rules
from lamina.autodiff.borrowed import borrowed_jvp
from lamina.autodiff.declare import (
    FORWARD,
    REVERSE,
    Constant,
    Linear,
    Multilinear,
    Pointwise,
)
from lamina.autodiff.operands import (
    Split,
    constant_outputs,
    derivative_state,
    in_any_layout,
    pass_through,
    split,
)
from lamina.autodiff.reverse import ReverseInterpreter, apply_vjp, rule_function
from lamina.autodiff.shapes import in_dtype
from lamina.autodiff.tape import backward
from lamina.autodiff.wrappers import DualTensor, dual, dual_like
from lamina.decompose.table import decomposition_of, made_of
from lamina_core.admission import decompose_handler
from lamina_core.alias import mutate
from lamina_core.dispatch import call_first, call_one, call_two, under_autocast
from lamina_core.handlers import Handler, HandlerInterpreter
from lamina_core.mode import mode_off
from lamina_core.recipe import ViewRecipe
from lamina_core.schema import OpFacts, facts
from lamina_core.scopes import run_at
from lamina_core.views import record_views
from lamina_core.wrapper import made_as_view

__all__ = ["ForwardInterpreter", "state_of"]

Tensor = torch.Tensor
_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled
_rules.load()


class ForwardInterpreter(HandlerInterpreter):
    """One active forward-mode level."""

    wrapper = DualTensor
    transform = "jvp"
    differentiates = True
    handlers: ClassVar[dict[int, Handler]] = FORWARD.handlers

    def __init__(self, name: str = "jvp") -> None:
        super().__init__()
        self.name = name
        self.in_inference = _is_inference()

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
        return FORWARD.describe(op, state_of(op))

    def lift(self, value: Any, tangent: Any) -> DualTensor:
        """Wrap an argument with its tangent."""
        for item in (value, tangent):
            if item is not None:
                self.look(item)
        out = dual(self, value, tangent)
        out.is_input = True
        return out

    def constant(self, value: Any) -> DualTensor:
        """Wrap a value whose tangent is zero."""
        self.look(value)
        return dual(self, value, None)

    def is_constant(self, wrapper: Any) -> bool:
        """Whether the tangent of a wrapper is zero."""
        return wrapper.tangent is None

    def tracking(self) -> bool:
        """Whether tangents are pushed: as in PyTorch, under `no_grad` too."""
        return _pushing(self)

    def keep_derivative(self, old: Any, new: Any) -> Any:
        """The primal of one wrapper with the tangent of another."""
        return dual(self, new.value, old.tangent)

    def rebind(self, target: Any, new: Any) -> None:
        """Stand for another primal and tangent from now on."""
        target.value = new.value
        target.tangent = new.tangent
        target.logical, target.strides = new.logical, new.strides


def _pushing(interpreter: Any) -> bool:
    """Whether tangents are pushed: `no_grad` concerns reverse mode alone, inference mode both.

    Inference mode around the transform, like `no_grad` there, does not reach inside.
    """
    return interpreter.grad_enabled and (
        _is_grad_enabled() or not _is_inference() or interpreter.in_inference
    )


def state_of(op: Any) -> str:
    """Which of the five states of `lamina_core.rules.STATES` an op is in under forward mode."""
    return derivative_state(FORWARD, op)


def _resolve(op: Any) -> Any:
    known = facts(op)
    rule = FORWARD.lookup(op)
    if rule is None:
        if decomposition_of(op) is not None:
            return decompose_handler(known, decomposition_of(op))
        if known.mutated:
            return mutate
        if known.is_composite:
            return decompose_handler(known, op.decompose)
        return _rule_handler(known, _generic_rule(known))
    declaration = rule.function
    if rule.state == "decomposed":
        return decompose_handler(known, declaration)
    if isinstance(declaration, Pointwise):
        return _pointwise_handler(known, declaration)
    if isinstance(declaration, Linear):
        return _linear_handler(known, declaration)
    if isinstance(declaration, Multilinear):
        return _rule_handler(known, _multilinear_rule(declaration))
    if isinstance(declaration, Constant):
        return _rule_handler(known, None)

    def by_hand(interpreter: Any, tangents: Any, args: Any, kwargs: Any) -> Any:
        return declaration(tangents, *args, **kwargs)

    return under_autocast(op, _rule_handler(known, by_hand))


def _rule_handler(known: OpFacts, rule: Any) -> Any:
    """The handler of a rule `(interpreter, tangents, args, kwargs)`; None for constant outputs."""

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        cut = split(interpreter, known, args, kwargs)
        out = pass_through(interpreter, handle, op, args, kwargs, cut)
        if out is not NotImplemented:
            return out
        tangents = _tangents_of(interpreter, cut)
        if rule is None or tangents is None:
            out = constant_outputs(interpreter, known, args, cut)
        else:
            found = rule(interpreter, tangents, cut.args, cut.kwargs)
            if found is NotImplemented:  # the rule leaves this call to the ops it is made of
                return decompose_handler(known, made_of(op))(interpreter, op, args, kwargs)
            value, tangent = found
            if isinstance(value, Tensor) and cut.args and value is cut.args[0]:
                return args[0]
            out = _wrap(interpreter, known, value, tangent)
        if (
            known.is_view or (known.may_be_view and made_as_view(out, args[0]))
        ) and interpreter.is_own(args[0]):
            return record_views(out, op, args, kwargs)
        return out

    return handle


def _tangents_of(interpreter: Any, cut: Split) -> tuple[Any, ...] | None:
    """One tangent or None per operand; None altogether if all are zero or ops are not followed."""
    if not _pushing(interpreter):
        return None
    tangents = tuple(
        [
            o.tangent if type(o) is DualTensor and o.interpreter is interpreter else None
            for o in cut.operands
        ]
    )
    return tangents if any(t is not None for t in tangents) else None


def _wrap(interpreter: Any, known: OpFacts, value: Any, tangent: Any) -> Any:
    if isinstance(value, Tensor):
        if tangent is not None:
            if not (value.is_floating_point() or value.is_complex()):
                tangent = None
            elif tangent.dtype is not value.dtype:  # of operands of several dtypes
                tangent = in_dtype(tangent, value.dtype)
        return dual(interpreter, value, tangent)
    if isinstance(value, (tuple, list)):
        tangents = tangent if isinstance(tangent, (tuple, list)) else [None] * len(value)
        items = [_wrap(interpreter, known, v, t) for v, t in zip(value, tangents, strict=True)]
        return items if known.returns == ("list",) else tuple(items)
    return value


# -- declarations ----------------------------------------------------------------------------------


def _as_output(tangent: Any, out: Any) -> Any:
    """A tangent in the shape and dtype of its primal."""
    tangent = in_dtype(tangent, out.dtype)
    return tangent if tangent.shape == out.shape else tangent.expand(out.shape)


def _pointwise_rule(declared: Pointwise) -> Any:
    known, products = declared.known, declared.products

    def rule(interpreter: Any, tangents: Any, args: Any, kwargs: Any) -> Any:
        out = known.call(*args, **kwargs)
        operands = [args[p] if p < len(args) else None for p in known.tensor_args]
        total = None
        for i, tangent in enumerate(tangents):
            product = products[i] if i < len(products) else None
            if tangent is None or product is None:
                continue
            term = product.function(tangent, *product.collect(out, operands, args, kwargs))
            total = term if total is None else total + term
        return out, None if total is None else _as_output(total, out)

    return rule


def _pointwise_handler(known: OpFacts, declared: Pointwise) -> Any:
    """As in reverse mode, with a way past the general machinery for the usual cases."""
    general = _rule_handler(known, _pointwise_rule(declared))
    functions: list[Any] = [product and product.function for product in declared.products]
    only = [product and product.only for product in declared.products]
    call = known.call

    def unary(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: one operand with a tangent.
        x = args[0]
        if (
            len(args) != 1
            or kwargs
            or type(x) is not DualTensor
            or x.interpreter is not interpreter
            or x.tangent is None
            or not _pushing(interpreter)
        ):
            return general(interpreter, op, args, kwargs)
        value = x.value
        out = call_one(op, call, value)
        if out.dtype is not value.dtype:
            return general(interpreter, op, args, kwargs)
        if wants == "none":
            return dual_like(x, out, function(x.tangent))
        return dual_like(x, out, function(x.tangent, value if wants == "x" else out))

    def binary(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: two operands of one shape and dtype, or one and a Python number.
        if len(args) != 2 or kwargs or not _pushing(interpreter):
            return general(interpreter, op, args, kwargs)
        x, y = args
        if type(x) is not DualTensor or x.interpreter is not interpreter:
            return general(interpreter, op, args, kwargs)
        x_value, x_t, y_t = x.value, x.tangent, None
        if type(y) is DualTensor and y.interpreter is interpreter:
            y_value, y_t = y.value, y.tangent
            if (
                x.logical != y.logical
                or y.strides is not None
                or x_value.dtype is not y_value.dtype
            ):
                return general(interpreter, op, args, kwargs)
        elif isinstance(y, Tensor):
            return general(interpreter, op, args, kwargs)
        else:
            y_value = y
        if x_t is None and y_t is None:
            return general(interpreter, op, args, kwargs)
        out = call_two(op, call, x_value, y_value)
        if out.dtype is not x_value.dtype:
            return general(interpreter, op, args, kwargs)
        out_t = None
        if x_t is not None:
            out_t = _push(functions[0], only[0], x_t, out, x_value, y_value)
        if y_t is not None:
            term = _push(functions[1], only[1], y_t, out, x_value, y_value)
            out_t = term if out_t is None else out_t + term
        return dual_like(x, out, out_t)

    positions = known.tensor_args
    if positions == (0,) and only[0] in ("none", "out", "x"):
        function, wants = functions[0], only[0]
        return unary
    if positions == (0, 1) and len(only) == 2 and all(wish is not None for wish in only):
        return binary
    return general


def _push(function: Any, wish: Any, tangent: Any, out: Any, x: Any, y: Any) -> Any:
    """One term of the tangent of a binary op."""
    if wish == "none":
        return function(tangent)
    if wish == "x":
        return function(tangent, x)
    if wish == "y":
        return function(tangent, y)
    return function(tangent, out if wish == "out" else wish[0])


def _linear_rule(declared: Linear) -> Any:
    known = declared.known
    push = in_any_layout(known)

    def rule(interpreter: Any, tangents: Any, args: Any, kwargs: Any) -> Any:
        out = known.call(*args, **kwargs)
        return out, None if tangents[0] is None else push(tangents[0], *args[1:], **kwargs)

    return rule


def _linear_handler(known: OpFacts, declared: Linear) -> Any:
    """As in reverse mode, with a way past the general machinery for one operand with a tangent."""
    general = _rule_handler(known, _linear_rule(declared))
    if len(known.tensor_args) != 1 or known.list_args or known.tensor_kwargs:
        return general
    call, push = known.call, in_any_layout(known)
    is_view, may_be_view = known.is_view, known.may_be_view

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: as the views of a transformer.
        x = args[0]
        if (
            type(x) is not DualTensor
            or x.interpreter is not interpreter
            or x.tangent is None
            or not _pushing(interpreter)
        ):
            return general(interpreter, op, args, kwargs)
        value, rest = x.value, args[1:]
        out = call_first(op, call, value, rest, kwargs)
        if out is value:
            return x
        if out.dtype is not value.dtype:
            return general(interpreter, op, args, kwargs)
        wrapped = dual(interpreter, out, push(x.tangent, *rest, **kwargs))
        if is_view or (may_be_view and made_as_view(out, value)):
            wrapped.recipe = ViewRecipe(x, op, rest, kwargs, None)
        return wrapped

    return handle


def _multilinear_rule(declared: Multilinear) -> Any:
    known = declared.known

    def rule(interpreter: Any, tangents: Any, args: Any, kwargs: Any) -> Any:
        out = known.call(*args, **kwargs)
        total = None
        for position, tangent in zip(known.tensor_args, tangents, strict=True):
            if tangent is not None:
                swapped = list(args)
                swapped[position] = tangent
                term = known.call(*swapped, **kwargs)
                total = term if total is None else total + term
        return out, total

    return rule


# -- ops without a forward rule --------------------------------------------------------------------


def _generic_rule(known: OpFacts) -> Any:
    """PyTorch's forward formula where it has one, else the transpose of the pullback."""

    def rule(interpreter: Any, tangents: Any, args: Any, kwargs: Any) -> Any:
        if REVERSE.lookup(known.op) is None:
            found = borrowed_jvp(interpreter, known, tangents, args, kwargs)
            if found is not None:
                return found
        return _by_two_vjps(interpreter, known, tangents, args, kwargs)

    return rule


def _by_two_vjps(interpreter: Any, known: OpFacts, tangents: Any, args: Any, kwargs: Any) -> Any:
    """J t as the transpose of ct -> J^T ct, which is linear: pull t back through the pullback."""
    needs = tuple(tangent is not None for tangent in tangents)
    out, residuals, pullback = apply_vjp(
        interpreter, known, rule_function(known.op), needs, args, kwargs
    )
    if pullback is None:
        return out, None
    single = isinstance(out, Tensor)
    outs = [out] if single else list(out)
    # Made before the level is entered, which would take them for its own.
    zeros = [
        torch.zeros_like(o)
        if isinstance(o, Tensor) and (o.is_floating_point() or o.is_complex())
        else None
        for o in outs
    ]
    with run_at(interpreter.below), ReverseInterpreter("jvp by two vjps") as inner:
        cts = [None if zero is None else inner.leaf(zero) for zero in zeros]
        # A pullback is rule code, although the level has just been entered. But what it does to
        # plain tensors alone, the level takes from the user's autograd unless it sees it.
        with nullcontext() if interpreter.watch else mode_off():
            pulled = pullback(residuals, needs, *cts)
    positions, seeds = [], []
    for x_ct, tangent in zip(pulled, tangents, strict=True):
        if tangent is not None and x_ct is not None and inner.is_own(x_ct):
            positions.append((x_ct.node, x_ct.index) if x_ct.node is not None else None)
            seeds.append(tangent)
    leaves = [ct.node for ct in cts if ct is not None]
    with mode_off():
        found = iter(backward(positions, seeds, leaves, release=True))
    out_t = [None if ct is None else next(found) for ct in cts]
    return (out, out_t[0]) if single else (outs, out_t)
