"""Derivatives that others give, by declaration or by hand; what a rule answers is checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lamina.autodiff import declare
from lamina.extending.everywhere import Decorator, is_given
from lamina_core.errors import RuleError, message
from lamina_core.overloads import is_absent
from lamina_core.schema import facts
from lamina_core.signature import need_out_of_place, need_signature, overload_of

__all__ = ["constant", "jvp_rule", "linear", "multilinear", "pointwise", "vjp_rule"]


def vjp_rule(*ops: Any, replace: bool = False) -> Decorator:
    """Register the decorated function as the reverse-mode derivative of some overloads.

    It has the parameters of the op behind `needs`, is called with values of the level below, and
    returns `(out, residuals, pullback)`:

    * `needs`: for each tensor operand, in the order of the op, whether it is differentiated; lists
      of tensors count as so many operands.
    * `residuals`: a tuple with all that the pullback needs. What is in it can be offloaded, and
      computed again by a checkpoint; what a closure hides cannot.
    * `pullback(residuals, needs, *cotangents)`: for each operand its cotangent, or None for zero.
      An output that has none gives the cotangent None.

    Forward mode is then the transpose of the pullback; a `jvp_rule` is faster. Both have to be made
    of torch calls without writes, random numbers or branches on values: they are differentiated and
    batched like any code.

    Args:
        ops: The overloads, or ops made by `torch.library.custom_op`.
        replace: Whether the rule may take the place of another.

    Raises:
        RuleError: If there is a rule already, or the function cannot be called like the op.

    Example:
        >>> import torch
        >>> from lamina import grad
        >>> from lamina.extend import vjp_rule
        >>> @torch.library.custom_op("lamina_docs::cube", mutates_args=())
        ... def cube(x: torch.Tensor) -> torch.Tensor:
        ...     return x**3
        >>> @vjp_rule(cube)
        ... def rule(needs, x):
        ...     return cube(x), (x,), pullback
        >>> def pullback(residuals, needs, ct):
        ...     (x,) = residuals
        ...     return (3 * x**2 * ct,)
        >>> grad(grad(cube))(torch.tensor(2.0))
        tensor(12.)
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for op in map(overload_of, ops):
            need_signature("vjp rule", op, rule, ("needs",))
            need_out_of_place("vjp rule", op)
            declare.REVERSE.register(op, _reversed(op, rule), replace=replace, given=True)
        return rule

    return register


def _reversed(op: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(rule)
    def run(needs: Any, *args: Any, **kwargs: Any) -> Any:
        answer = rule(needs, *args, **kwargs)
        if not is_given(op, rule, answer):
            return answer
        if not (isinstance(answer, tuple) and len(answer) == 3 and isinstance(answer[1], tuple)):
            raise _wrong_answer("vjp rule", op, rule, answer, "(out, residuals, pullback)")
        out, residuals, pullback = answer
        if pullback is None:
            return answer
        return out, residuals, functools.partial(_pull, op, pullback)

    return run


def _pull(op: Any, pullback: Any, residuals: Any, needs: Any, *cotangents: Any) -> Any:
    found = pullback(residuals, needs, *cotangents)
    if not isinstance(found, (tuple, list)) or len(found) != len(needs):
        wanted = f"a tuple with an entry for each of the {len(needs)} tensor operands"
        raise _wrong_answer("pullback", op, pullback, found, wanted)
    return found


def jvp_rule(*ops: Any, replace: bool = False) -> Decorator:
    """Register the decorated function as the forward-mode derivative of some overloads.

    It has the parameters of the op behind `tangents`, is called with values of the level below, and
    returns `(out, out_t)`. `tangents` has one entry for each tensor operand, None for zero; so may
    `out_t` be None, and is a tuple where `out` is one.

    Args:
        ops: The overloads, or ops made by `torch.library.custom_op`.
        replace: Whether the rule may take the place of another.

    Raises:
        RuleError: If there is a rule already, or the function cannot be called like the op.

    Example:
        >>> import torch
        >>> from lamina import jvp
        >>> from lamina.extend import jvp_rule
        >>> @torch.library.custom_op("lamina_docs::fourth", mutates_args=())
        ... def fourth(x: torch.Tensor) -> torch.Tensor:
        ...     return x**4
        >>> @jvp_rule(fourth)
        ... def rule(tangents, x):
        ...     return fourth(x), 4 * x**3 * tangents[0]
        >>> jvp(fourth, (torch.tensor(2.0),), (torch.tensor(1.0),))
        (tensor(16.), tensor(32.))
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for op in map(overload_of, ops):
            need_signature("jvp rule", op, rule, ("tangents",))
            need_out_of_place("jvp rule", op)
            declare.FORWARD.register(op, _forwarded(op, rule), replace=replace, given=True)
        return rule

    return register


def _forwarded(op: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(rule)
    def run(tangents: Any, *args: Any, **kwargs: Any) -> Any:
        answer = rule(tangents, *args, **kwargs)
        if not is_given(op, rule, answer):
            return answer
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise _wrong_answer("jvp rule", op, rule, answer, "(out, out_t)")
        out, out_t = answer
        several = isinstance(out, (tuple, list))
        if several and out_t is None:
            return answer
        if several != isinstance(out_t, (tuple, list)) or (several and len(out) != len(out_t)):
            raise _wrong_answer("jvp rule", op, rule, out_t, "a tangent or None for each output")
        return answer

    return run


def _wrong_answer(kind: str, op: Any, rule: Any, answer: Any, wanted: str) -> RuleError:
    count = f" of {len(answer)}" if isinstance(answer, (tuple, list)) else ""
    return RuleError(
        message(
            f"the {kind} of {op} returned a {type(answer).__name__}{count}",
            f"the {kind}: {rule.__module__}.{getattr(rule, '__qualname__', rule)}",
            f"to fix: return {wanted}",
        )
    )


def pointwise(op: Any, *products: Callable[..., Any] | None, replace: bool = False) -> None:
    """Declare the derivative of an elementwise op, for both modes.

    Args:
        op: The overload, or an op made by `torch.library.custom_op`.
        products: For each tensor operand the product of `t` and the partial derivative, a function
            of `t` and of what it names: `out` the result, `x`, `y`, `z` the tensor operands in
            order, `x_shape` and `x_dtype` facts that keep no memory, any other name an argument of
            the op. Only what is named is kept. None stands for an operand without derivative.
        replace: Whether it may take the place of another.

    Raises:
        RuleError: If there is a rule already, or the products do not fit the op.

    Example:
        >>> import torch
        >>> from lamina import grad
        >>> from lamina.extend import pointwise
        >>> @torch.library.custom_op("lamina_docs::scaled_exp", mutates_args=())
        ... def scaled_exp(x: torch.Tensor, scale: float) -> torch.Tensor:
        ...     return torch.exp(x * scale)
        >>> pointwise(scaled_exp, lambda t, out, scale: t * out * scale)
        >>> grad(lambda x: scaled_exp(x, 2.0))(torch.tensor(0.0))
        tensor(2.)
    """
    op = overload_of(op)
    count = _need_declarable("pointwise", op, products)
    if not is_absent(op) and len(products) > count:
        raise RuleError(
            message(
                f"{len(products)} products for {op}, which has {count} tensor operands",
                "to fix: give one for each, None for one without derivative",
            )
        )
    first = next((product for product in products if product), None)
    _declare(op, declare.Pointwise, (products,), first, replace)


def linear(op: Any, transpose: Callable[..., Any], *, replace: bool = False) -> None:
    """Declare an op that is linear in its first operand, by its transpose, for both modes.

    Args:
        op: The overload, or an op made by `torch.library.custom_op`.
        transpose: The cotangent of the operand, a function of the cotangent `ct` and of what it
            names, as in `pointwise`.
        replace: Whether it may take the place of another.

    Raises:
        RuleError: If there is a rule already, or the transpose does not fit the op.

    Example:
        >>> import torch
        >>> from lamina import linear_transpose
        >>> from lamina.extend import linear
        >>> @torch.library.custom_op("lamina_docs::padded", mutates_args=())
        ... def padded(x: torch.Tensor, count: int) -> torch.Tensor:
        ...     return torch.cat([x, x.new_zeros(count)])
        >>> linear(padded, lambda ct, x_shape: ct[: x_shape[0]])
        >>> linear_transpose(lambda x: padded(x, 2), torch.ones(3))(torch.arange(5.0))
        (tensor([0., 1., 2.]),)
    """
    op = overload_of(op)
    _need_declarable("linear", op, (transpose,))
    _declare(op, declare.Linear, (transpose,), transpose, replace)


def multilinear(op: Any, *transposes: Callable[..., Any], replace: bool = False) -> None:
    """Declare an op that is linear in each of its tensor operands, for both modes.

    Args:
        op: The overload, or an op made by `torch.library.custom_op`.
        transposes: For each tensor operand the transpose in it, as in `linear`.
        replace: Whether it may take the place of another.

    Raises:
        RuleError: If there is a rule already, or the transposes do not fit the op.
    """
    op = overload_of(op)
    count = _need_declarable("multilinear", op, transposes)
    if not is_absent(op) and len(transposes) != count:
        raise RuleError(
            message(
                f"{len(transposes)} transposes for {op}, which has {count} tensor operands",
                "to fix: give one for each",
            )
        )
    _declare(op, declare.Multilinear, (transposes,), transposes[0], replace)


def constant(*ops: Any, replace: bool = False) -> None:
    """Declare ops whose outputs have no derivative with respect to anything.

    Args:
        ops: The overloads, or ops made by `torch.library.custom_op`.
        replace: Whether it may take the place of another declaration.

    Raises:
        RuleError: If there is a rule already.
    """
    for op in map(overload_of, ops):
        _need_declarable("constant", op, ())
        _declare(op, declare.Constant, (), None, replace)


def _declare(op: Any, make: type, products: Any, first: Any, replace: bool) -> None:
    """Register a declaration in the tables of both modes, or in none."""
    restore = declare.REVERSE.kept()
    try:
        declare.declare(op, make, products, first, replace=replace, given=True)
    except RuleError:
        restore()
        raise


def _need_declarable(kind: str, op: Any, functions: Any) -> int:
    """Raise unless an op can be declared so; the number of its tensor operands."""
    if is_absent(op):
        return 0
    need_out_of_place(f"{kind} derivative", op)
    for function in functions:
        if function is not None and not (
            callable(function) and list(inspect.signature(function).parameters)
        ):
            raise RuleError(
                message(
                    f"a {kind} derivative of {op} has to be a function of the cotangent, and of "
                    "what it names besides",
                    f"got: {function!r}",
                )
            )
    known = facts(op)
    count = len(known.tensor_args)
    if kind != "constant" and (known.list_args or known.tensor_kwargs or not count):
        raise RuleError(
            message(
                f"a {kind} derivative of {op}, whose tensors are not all positional arguments",
                f"the op: {op._schema}",
                "to fix: use @vjp_rule",
            )
        )
    return count
