"""What each kind of declaration means in reverse mode: what it keeps, and its pullback.

`hand_rule` is for what is written by hand. The others have two forms: `*_rule` gives the general
rule `(needs, *args) -> (out, residuals, pullback)`; the other pullbacks belong to the short ways in
`reverse`, which keep less.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import Linear, Multilinear, Pointwise, unbroadcast
from lamina.autodiff.operands import operands_of
from lamina.autodiff.shapes import in_dtype
from lamina_core.schema import OpFacts

__all__ = [
    "binary_pullback",
    "hand_rule",
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


def hand_rule(known: OpFacts, rule: Any) -> Any:
    """A rule by hand, with cotangents cast to the dtypes of their primals where these differ.

    PyTorch's engine does so behind every formula, and a rule has it in no other way: an op that
    promotes its operands has a cotangent of the dtype that they were promoted to.
    """
    positions, others = known.tensor_args, bool(known.list_args or known.tensor_kwargs)

    def cast(needs: Any, *args: Any, **kwargs: Any) -> Any:
        found = rule(needs, *args, **kwargs)
        if found is NotImplemented or found[2] is None:
            return found
        out, residuals, pullback = found
        first = out if isinstance(out, Tensor) else _first_tensor(out)
        dtype = None if first is None else first.dtype
        # HOT: mostly there is one dtype, beside that of indices.
        for position in positions:
            if position < len(args):
                x = args[position]
                if x is not None and x.dtype is not dtype and x.dtype not in _INDICES:
                    break
        else:
            if not others:
                return found
        dtypes = [None if x is None else x.dtype for x in operands_of(known, args, kwargs)]
        if all(own is None or own is dtype or own in _INDICES for own in dtypes):
            return found
        return out, (pullback, dtypes, *residuals), _cast_pullback

    return cast


_INDICES = frozenset((torch.bool, torch.int64, torch.int32, torch.uint8))


def _first_tensor(outs: Any) -> Any:
    return next((out for out in outs if isinstance(out, Tensor)), None)


def _cast_pullback(residuals: Any, needs: Any, *cts: Any) -> Any:
    """Residuals: a pullback, the dtypes of the operands, the residuals of the pullback."""
    pullback, dtypes, *rest = residuals
    return [
        ct if ct is None else in_dtype(ct, dtype)
        for ct, dtype in zip(pullback(tuple(rest), needs, *cts), dtypes, strict=True)
    ]


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
        cts.append(in_dtype(unbroadcast(x_ct, shape), dtype))
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
    x_ct = None if ct is None else in_dtype(function(ct, *saved), dtype)
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
        dtypes = [x.dtype for x in operands]
        if out.is_floating_point() and any(dtype is not out.dtype for dtype in dtypes):
            operands = [x.to(out.dtype) for x in operands]  # products take one dtype
        plan: list[Any] = []
        saved: list[Any] = []
        for i, transpose in enumerate(transposes):
            if not needs[i]:
                plan.append(None)
                continue
            found = transpose.collect(out, operands, args, kwargs)
            plan.append((transpose.function, len(saved), len(found), dtypes[i]))
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
        else in_dtype(entry[0](ct, *saved[entry[1] : entry[1] + entry[2]]), entry[3])
        for entry in plan
    ]
