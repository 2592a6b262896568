"""What each kind of declaration means in reverse mode: what it keeps, and its pullback.

Two forms of each: `*_rule` gives the general rule `(needs, *args) -> (out, residuals, pullback)`;
the other pullbacks belong to the short ways in `reverse`, which keep less.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import Linear, Multilinear, Pointwise, unbroadcast

__all__ = [
    "binary_pullback",
    "linear_pullback",
    "linear_rule",
    "multilinear_rule",
    "pointwise_rule",
    "same_dtype_pullback",
    "saved_for",
    "unary_plain_pullback",
    "unary_pullback",
]

Tensor = torch.Tensor


def _real_part_for(ct: Any, dtype: Any) -> Any:
    """A cotangent in the dtype of its primal: the real part where that is real."""
    if ct.dtype is dtype:
        return ct
    if ct.is_complex() and not dtype.is_complex:
        ct = ct.real
    return ct if ct.dtype is dtype else ct.to(dtype)


def _product(function: Any, ct: Any, saved: Any) -> Any:
    """Pull a cotangent back through an elementwise product; see NOTE [Names say what is saved]."""
    if ct.is_complex() or any(isinstance(s, Tensor) and s.is_complex() for s in saved):
        return function(ct.conj(), *saved).conj()
    return function(ct, *saved)


def pointwise_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    """Residuals: `plan` (per operand: product, places in `saved`, shape, dtype), then `saved`."""
    plan, *saved = residuals
    cts: list[Any] = []
    for entry in plan:
        if entry is None or ct is None:
            cts.append(None)
            continue
        function, places, shape, dtype = entry
        x_ct = _product(function, ct, [saved[p] for p in places])
        cts.append(_real_part_for(unbroadcast(x_ct, shape), dtype))
    return cts


def unary_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    """The usual case: one real operand of the output's dtype, one residual."""
    function, saved = residuals
    return (function(ct, saved),)


def unary_plain_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    """As above, for a product that needs nothing but the cotangent."""
    return (residuals[0](ct),)


def pointwise_rule(declared: Pointwise) -> Any:
    """The rule of an elementwise op; what several products need is saved once."""
    known, products, call = declared.known, declared.products, declared.known.call

    def rule(needs: Any, *args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        operands: list[Any] = [args[p] if p < len(args) else None for p in known.tensor_args]
        saved: list[Any] = []
        plan: list[Any] = []
        for i, operand in enumerate(operands):
            product = products[i] if i < len(products) else None
            if not needs[i] or product is None:
                plan.append(None)
                continue
            places = []
            for item in product.collect(out, operands, args, kwargs):
                at = next((j for j, s in enumerate(saved) if s is item), len(saved))
                if at == len(saved):
                    saved.append(item)
                places.append(at)
            plan.append((product.function, places, operand.shape, operand.dtype))
        if all(entry is None for entry in plan):
            return out, (), None
        return out, (plan, *saved), pointwise_pullback

    return rule


class Nothing:
    """Marks a product that needs nothing saved."""


def saved_for(wish: Any, out: Any, x: Any, y: Any) -> Any:
    """What a product with at most one wish (`Needed.only`) has to have saved."""
    if wish == "none":
        return Nothing
    if wish == "x":
        return x
    if wish == "y":
        return y
    return out if wish == "out" else wish[0]


def binary_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    """Two real operands of the output's shape and dtype, at most one residual for each."""
    function, saved, other, other_saved = residuals
    x_ct = y_ct = None
    if function is not None:
        x_ct = function(ct) if saved is Nothing else function(ct, saved)
    if other is not None:
        y_ct = other(ct) if other_saved is Nothing else other(ct, other_saved)
    return x_ct, y_ct


def linear_rule(declared: Linear) -> Any:
    """The rule of an op linear in its first operand."""
    known, transpose = declared.known, declared.transpose
    count = len(known.tensor_args)

    def rule(needs: Any, *args: Any, **kwargs: Any) -> Any:
        out = known.call(*args, **kwargs)
        x = args[0]
        if not needs[0]:
            return out, (), None
        saved = transpose.collect(out, [x], args, kwargs)
        return out, (transpose.function, count, x.dtype, *saved), linear_pullback

    return rule


def linear_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    """Residuals: the transpose, the number of operands, the dtype of the first, what is saved."""
    function, count, dtype, *saved = residuals
    x_ct = None if ct is None else _real_part_for(function(ct, *saved), dtype)
    return (x_ct, *[None] * (count - 1))


def same_dtype_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    """The usual case: one operand, of the output's dtype. Residuals: the transpose, what is saved.

    HOT: views are half of what a transformer does.
    """
    function, *saved = residuals
    return (function(ct, *saved),)


def multilinear_rule(declared: Multilinear) -> Any:
    """The rule of an op linear in each operand; each transpose has a part of what is saved."""
    known, transposes = declared.known, declared.transposes

    def rule(needs: Any, *args: Any, **kwargs: Any) -> Any:
        out = known.call(*args, **kwargs)
        operands = [args[p] for p in known.tensor_args]
        plan: list[Any] = []
        saved: list[Any] = []
        for i, transpose in enumerate(transposes):
            if not needs[i]:
                plan.append(None)
                continue
            found = transpose.collect(out, operands, args, kwargs)
            plan.append((transpose.function, len(saved), len(found), operands[i].dtype))
            saved.extend(found)
        return out, (plan, *saved), multilinear_pullback

    return rule


def multilinear_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    """Residuals: `plan` (per operand: transpose, start, count, dtype), then what is saved."""
    plan, *saved = residuals
    if ct is None:
        return [None] * len(plan)
    return [
        None
        if entry is None
        else _real_part_for(entry[0](ct, *saved[entry[1] : entry[1] + entry[2]]), entry[3])
        for entry in plan
    ]
