"""How a derivative is declared: once, for both modes.

| declaration | for | statement |
|---|---|---|
| `pointwise(op, *products)` | elementwise ops | per operand, `t` times the partial derivative |
| `linear(op, transpose)` | ops linear in their one operand | the transposed map |
| `multilinear(op, *transposes)` | ops linear in each operand | the transposed map in each |
| `constant(*ops)` | ops whose outputs have no derivative | - |
| `fixed(op, *places)` | outputs that the first operand has no say in | beside a rule |
| `@decomposition(op)` | kernels without a formula of their own | the same in other ops |
| `@vjp_rule(op)`, `@jvp_rule(op)` | the rest | by hand |

# NOTE [Names say what is saved]
The parameters of a product or transpose name what it needs besides its first one: `out` is the
result, `x`, `y`, `z` the tensor operands in order, `x_shape` and `x_dtype` facts of an operand that
keep no memory, any other name an argument of the op's schema. Only what is named is kept as a
residual. `pointwise(aten.tanh.default, lambda t, out: t * (1 - out * out))` keeps the result and
not the operand.

A product is linear in `t` and elementwise, so it is its own transpose: it serves tangents and
cotangents alike. For complex values the pullback follows PyTorch's conjugate convention:
`x_ct = conj(product(conj(ct)))`, and its real part for a real operand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lamina_core.errors import RuleError, message
from lamina_core.overloads import is_absent
from lamina_core.rules import RuleTable
from lamina_core.schema import OpFacts, facts
from lamina_core.schema_record import check

__all__ = [
    "FIXED",
    "FORWARD",
    "REVERSE",
    "Constant",
    "Linear",
    "Multilinear",
    "Needed",
    "Pointwise",
    "constant",
    "declare",
    "decomposition",
    "fixed",
    "jvp_rule",
    "linear",
    "multilinear",
    "pointwise",
    "unbroadcast",
    "vjp_rule",
]

REVERSE = RuleTable("vjp")
FORWARD = RuleTable("jvp")
FIXED: dict[Any, frozenset[int]] = {}

_OPERANDS = "xyzw"


class Needed:
    """A product or transpose, with what its parameters name resolved to places.

    Attributes:
        function: The declared function.
        places: For each parameter behind the first: ("out",), ("operand", i), ("shape", i),
            ("dtype", i) or ("arg", name).
        only: For the hot paths, what is needed if that is at most one thing: "none", "out", "x",
            "y", or the default value of an argument in a tuple; None if it is more.
        tensors: Whether a tensor may be among what is needed.
    """

    __slots__ = ("function", "getters", "only", "places", "tensors")

    def __init__(self, function: Callable[..., Any], known: OpFacts) -> None:
        self.function = function
        names = list(inspect.signature(function).parameters)[1:]
        self.places = tuple(_place(name, known) for name in names)
        self.getters = tuple(_getter(place, known) for place in self.places)
        self.only: Any = {
            (): "none",
            (("out",),): "out",
            (("operand", 0),): "x",
            (("operand", 1),): "y",
        }.get(self.places)
        at = (*known.tensor_args, *known.list_args)
        named = {known.arg_names[position] for position in at} | set(known.tensor_kwargs)
        self.tensors = any(
            place[0] in ("out", "operand") or (place[0] == "arg" and place[1] in named)
            for place in self.places
        )
        if self.only is None and len(self.places) == 1 and self.places[0][0] == "arg":
            self.only = (default(known, self.places[0][1]),)

    def collect(self, out: Any, operands: Any, args: Any, kwargs: Any) -> list[Any]:
        """What the function needs, taken from the values of one call."""
        return [getter(out, operands, args, kwargs) for getter in self.getters]


def _getter(place: tuple[Any, ...], known: OpFacts) -> Callable[..., Any]:
    """How one thing is found in a call `(out, operands, args, kwargs)`."""
    match place:
        case ("out",):
            return lambda out, operands, args, kwargs: out
        case ("operand", i):
            return lambda out, operands, args, kwargs: operands[i]
        case ("shape", i):
            return lambda out, operands, args, kwargs: operands[i].shape
        case ("dtype", i):
            return lambda out, operands, args, kwargs: operands[i].dtype
        case (_, name):
            if name not in known.positional:
                return lambda out, operands, args, kwargs: argument(known, name, args, kwargs)
            # HOT: usually given by its place.
            at = known.positional.index(name)
            return lambda out, operands, args, kwargs: (
                args[at] if at < len(args) else argument(known, name, args, kwargs)
            )
    raise AssertionError(place)


def _place(name: str, known: OpFacts) -> tuple[Any, ...]:
    if name == "out":
        return ("out",)
    if name in _OPERANDS:
        return ("operand", _OPERANDS.index(name))
    letter, _, fact = name.partition("_")
    if letter in _OPERANDS and fact in ("shape", "dtype"):
        return (fact, _OPERANDS.index(letter))
    if name not in known.arg_names:
        raise RuleError(
            message(
                f"a derivative of {known.name} names {name!r}, which is no argument of the op",
                f"arguments of the op: {', '.join(known.arg_names)}",
                f"to fix: name one of these, or out, or an operand: {', '.join(_OPERANDS)}",
            )
        )
    return ("arg", name)


def argument(known: OpFacts, name: str, args: Any, kwargs: Any) -> Any:
    """The value of a non-tensor argument in one call, or the schema's default."""
    if name in kwargs:
        return kwargs[name]
    if name in known.positional:
        position = known.positional.index(name)
        if position < len(args):
            return args[position]
    return default(known, name)


_DEFAULTS: dict[int, dict[str, Any]] = {}


def default(known: OpFacts, name: str) -> Any:
    """The schema's default of an argument; None if it has none."""
    defaults = _DEFAULTS.get(id(known.op))
    if defaults is None:
        defaults = _DEFAULTS[id(known.op)] = {
            a.name: a.default_value for a in known.op._schema.arguments if a.has_default_value()
        }
    return defaults.get(name)


class Pointwise:
    """An elementwise op: per tensor operand a product, or None where there is no derivative."""

    def __init__(self, op: Any, products: tuple[Callable[..., Any] | None, ...]) -> None:
        self.known = facts(op)
        self.products = tuple(p and Needed(p, self.known) for p in products)


class Linear:
    """An op linear in its first operand, the only one that is differentiable."""

    def __init__(self, op: Any, transpose: Callable[..., Any]) -> None:
        self.known = facts(op)
        self.transpose = Needed(transpose, self.known)


class Multilinear:
    """An op linear in each of its tensor operands, the others held fixed."""

    def __init__(self, op: Any, transposes: tuple[Callable[..., Any], ...]) -> None:
        self.known = facts(op)
        self.transposes = tuple(Needed(t, self.known) for t in transposes)


class Constant:
    """An op without derivative: its outputs are constants at every level."""

    def __init__(self, op: Any) -> None:
        self.known = facts(op)


def declare(
    op: Any,
    make: type,
    products: Any,
    first: Any,
    *,
    replace: bool = False,
    given: bool = False,
    forward: Any = None,
) -> None:
    """Register a declaration for both modes.

    Args:
        op: The overload.
        make: `Pointwise`, `Linear`, `Multilinear` or `Constant`.
        products: What it is made with besides the op.
        first: A function of whoever declares it: messages name its module.
        replace: Whether it may take the place of another.
        given: Whether it is given by others, for the torch that they run.
        forward: What it is made with in forward mode, where that is something else, or a rule.
    """
    # What the products name cannot be looked up in an op that this torch lacks, or has otherwise.
    other = is_absent(op) or (check(op) is not None and not given)
    by_hand = callable(forward)
    for table, made_with in ((REVERSE, products), (FORWARD, forward or products)):
        if table is FORWARD and by_hand:
            table.register(op, forward)
            continue
        declaration: Any = Constant(op) if other else make(op, *made_with)
        # Messages about a second declaration name the module of the first.
        declaration.__module__ = getattr(first, "__module__", __name__)
        declaration.__qualname__ = f"{make.__name__}({op})"
        table.register(op, declaration, state="family", replace=replace, given=given)


def pointwise(op: Any, *products: Callable[..., Any] | None, forward: Any = None) -> None:
    """Declare an elementwise op by one product per tensor operand (see the module).

    `forward` has the products of forward mode, for an op that torch differentiates otherwise there,
    or is a rule by hand, for one whose terms are not simply added.
    """
    first = next((p for p in products if p), None)
    forward = forward if callable(forward) else forward and (forward,)
    declare(op, Pointwise, (products,), first, forward=forward)


def linear(op: Any, transpose: Callable[..., Any]) -> None:
    """Declare an op linear in its first operand by its transpose `(ct, ...)`."""
    declare(op, Linear, (transpose,), transpose)


def multilinear(op: Any, *transposes: Callable[..., Any]) -> None:
    """Declare an op linear in each operand by the transposes `(ct, ...)` in each."""
    declare(op, Multilinear, (transposes,), transposes[0])


def constant(*ops: Any) -> None:
    """Declare ops whose outputs do not depend differentiably on anything."""
    for op in ops:
        declare(op, Constant, (), None)


def fixed(op: Any, *places: int) -> None:
    """Declare outputs of an op, by their places, that its first operand has no influence on.

    They are known while that operand is not, which is what makes an op such as `nll_loss_forward`
    linear in it, though its pullback reads the total weight.
    """
    FIXED[op] = frozenset(places)


def decomposition(*ops: Any) -> Callable[[Any], Any]:
    """Register the decorated function as what the given overloads are made of, in both modes.

    It has the op's own signature and runs as code of the level, on the wrappers themselves, when an
    operand is one of them. Registered for the backward of a fused op it gives the second
    derivative: the first pullback calls the fused backward on values of the level below.
    """

    def register(function: Any) -> Any:
        for op in ops:
            REVERSE.register(op, function, state="decomposed")
            FORWARD.register(op, function, state="decomposed")
        return function

    return register


def vjp_rule(*ops: Any) -> Callable[[Any], Any]:
    """Register the decorated function as the reverse-mode rule of the given overloads.

    It is called as `rule(needs, *args, **kwargs)` with values of the level below and returns
    `(out, residuals, pullback)`. `needs` has one bool per tensor operand in schema order, lists of
    tensors flattened; the pullback `(residuals, needs, *cotangents)` returns one entry per operand,
    None where nothing is needed or the cotangent is zero.
    """

    def register(rule: Any) -> Any:
        for op in ops:
            REVERSE.register(op, rule)
        return rule

    return register


def jvp_rule(*ops: Any) -> Callable[[Any], Any]:
    """Register the decorated function as the forward-mode rule of the given overloads.

    It is called as `rule(tangents, *args, **kwargs)`, with one tangent or None (zero) per tensor
    operand in schema order, lists flattened, and returns `(out, out_t)`.
    """

    def register(rule: Any) -> Any:
        for op in ops:
            FORWARD.register(op, rule)
        return rule

    return register


def unbroadcast(ct: Any, shape: Any) -> Any:
    """Sum a cotangent over the dims that broadcasting added or stretched."""
    if ct.shape == shape:
        return ct
    extra = ct.dim() - len(shape)
    added = list(range(extra))
    stretched = [
        i + extra for i, size in enumerate(shape) if size == 1 and ct.shape[i + extra] != 1
    ]
    if not stretched:
        return ct.sum(added) if added else ct
    ct = ct.sum(added + stretched, True)
    return ct.reshape(shape) if extra else ct
