"""How an op is batched: by rule, family, decomposition or loop. `resolve` picks, once per op.

A handler has the signature `(interpreter, op, args, kwargs)`. It finds its own wrappers among the
arguments, calls the rule on their values and wraps what comes back.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from lamina.batching.agreement import validated
from lamina.batching.batched import BatchedTensor, wrap, wrap_exact
from lamina.batching.dims import EmptyBatchError, batch_first
from lamina.batching.elementwise import elementwise_handler
from lamina.batching.fallback import loop_over_examples, note_fallback
from lamina.batching.operands import pass_unbatched, unwrap
from lamina.batching.randomness import batch_random
from lamina.batching.states import (
    depends_on_data,
    is_plain_pointwise,
    of_fixed_shape,
    random_decomposition,
)
from lamina.batching.table import RULES, Info
from lamina.batching.writes import in_place_handler
from lamina.decompose.table import decomposition_of, made_of
from lamina_core.admission import admitting, decompose_handler
from lamina_core.config import config
from lamina_core.dispatch import under_autocast, watched
from lamina_core.errors import DataDependentError, RuleError
from lamina_core.handlers import Handler
from lamina_core.overloads import aten
from lamina_core.recipe import ViewRecipe, root_of
from lamina_core.refusals import refused
from lamina_core.rules import Rule
from lamina_core.schema import OpFacts, facts
from lamina_core.scopes import run_at
from lamina_core.views import record_views
from lamina_core.wrapper import made_as_view

__all__ = ["resolve"]

Tensor = torch.Tensor
_VIEW = aten.view.default
_GOES_BY_STRIDES = (
    aten.as_strided.default,
    aten.as_strided_scatter.default,
    aten.contiguous.default,
)


def resolve(op: Any) -> Handler:
    """The handler of an op: its rule, else its family, its decomposition, or the loop."""
    known = facts(op)
    rule = RULES.lookup(op)
    if rule is not None:
        if rule.state == "decomposed":
            return decompose_handler(known, rule.function)
        handle = _rule_handler(rule, known)
        if (known.is_view or known.may_be_view) and known.tensor_args == (0,):
            handle = _view_handler(rule, known, handle)
            if op is _VIEW:
                handle = _exact_view_handler(handle)
        if op in _GOES_BY_STRIDES:
            handle = _example_handler(handle)
        return under_autocast(op, admitting(known, handle))
    if known.mutated and decomposition_of(op) is None:
        return in_place_handler(known)
    if known.is_random:
        return _random_handler(known)
    if known.is_pointwise and is_plain_pointwise(known):
        return elementwise_handler(known)
    if depends_on_data(op):
        return _data_dependent_handler(known)
    decomposition = made_of(op)
    if decomposition is not None:
        return decompose_handler(known, decomposition)
    return _fallback_handler(known)


def _rule_handler(rule: Rule, known: OpFacts) -> Handler:
    function = rule.function

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        values, dims, inner, kwarg_dims, batched, own, grads = unwrap(
            interpreter, known, args, kwargs
        )
        if grads and not interpreter.watch:
            interpreter.watch = True
            return watched(interpreter, handle, op, args, kwargs)
        if not batched:
            return pass_unbatched(interpreter, op, args, kwargs, own)
        if known.is_view and not interpreter.is_own(args[0]):
            # A captured tensor seen from a place of each example: writing there is refused later.
            args = (interpreter.lift(args[0], None), *args[1:])
        info = interpreter.info
        if kwarg_dims:
            info = Info(interpreter, info.batch_size, info.randomness)
            info.kwarg_dims = kwarg_dims
        try:
            answer = function(info, dims, *values, **inner)
        except EmptyBatchError:
            answer = loop_over_examples(interpreter, op, values, dims, inner, kwarg_dims)
        if answer is NotImplemented:  # the rule leaves this case to the decomposition
            parts: Any = made_of(op)
            with run_at(interpreter, autocast=known.is_composite):
                return parts(*args, **kwargs)
        out, out_dims = answer
        if config.debug:
            _check(interpreter, rule, out, out_dims)
        if isinstance(out, Tensor) and known.returns == ("tensor",):
            # A rule that hands its operand through, as `contiguous` may, keeps the identity.
            if values and out is values[0] and out_dims == dims[0]:
                return args[0]
            how = _how(args[0]) if known.is_view else wrap
            wrapped: Any = how(interpreter, out, out_dims)
        else:
            wrapped = interpreter.wrap_out(out, out_dims)
        if (
            known.is_view or (known.may_be_view and _shows_view(args[0], out))
        ) and interpreter.is_own(args[0]):
            return record_views(wrapped, op, args, kwargs)
        return wrapped

    return handle


def _view_handler(rule: Rule, known: OpFacts, general: Handler) -> Handler:
    """The handler of a view op, with a short cut for a batched operand."""
    function: Any = rule.function
    is_view = known.is_view

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: views are half of what a transformer does.
        x = args[0]
        kind = type(x)
        if (
            kwargs
            or kind is not BatchedTensor
            or x.interpreter is not interpreter
            or x.bdim is None
            or config.debug
        ):
            return general(interpreter, op, args, kwargs)
        value, rest = x.value, args[1:]
        try:
            answer = function(interpreter.info, (x.bdim,), value, *rest)
        except EmptyBatchError:
            answer = NotImplemented
        if answer is NotImplemented:
            return general(interpreter, op, args, kwargs)
        out, out_dims = answer
        if not isinstance(out, Tensor):
            return record_views(interpreter.wrap_out(out, out_dims, _how(x)), op, args, kwargs)
        if out is value and out_dims == x.bdim:
            return x
        how = wrap if x.bdim == 0 else _how(x)
        wrapped = how(interpreter, out, out_dims)
        if is_view or _shows_view(x, out):
            wrapped.recipe = ViewRecipe(x, op, rest, kwargs, None)
        return wrapped

    return handle


def _how(x: Any) -> Any:
    """How a view of a tensor is wrapped."""
    return wrap_exact if type(x) is BatchedTensor and x.bdim and root_of(x).is_input else wrap


def _example_handler(handle: Handler) -> Handler:
    """The handler of an op for which the strides of an example count.

    Its rule takes a contiguous value for one whose examples are, as computed ones are.
    """

    @wraps(handle)
    def of_examples(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        if type(x) is BatchedTensor and x.interpreter is interpreter and x.bdim and x.strides:
            first = wrap(interpreter, batch_first(x.value, x.bdim), 0)
            first.recipe, first.is_input = x.recipe, x.is_input
            args = (first, *args[1:])
        return handle(interpreter, op, args, kwargs)

    return of_examples


def _exact_view_handler(handle: Handler) -> Handler:
    """The handler of `view`, which refuses the layouts that it refuses outside.

    Its rule copies where it must, for what is computed inside may be laid out in another way than
    outside. Views of an argument, or of what shows as contiguous, are laid out as they are there.
    """

    @wraps(handle)
    def exact(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        if type(x) is BatchedTensor and x.strides is not None and x.interpreter is interpreter:
            root = root_of(x)
            if root is not x and (root.is_input or root.strides is None):
                own = refused(interpreter, op, args, kwargs)
                if own is not None:
                    raise own
        return handle(interpreter, op, args, kwargs)

    return exact


def _shows_view(x: Any, out: Any) -> bool:
    """Whether an op that may be a view is one, by the layout that user code sees.

    Where an example looks contiguous it is, also if the batch dim lies between dims that had to be
    merged: the result is then a copy, like that of `view`.
    """
    return x.strides is None or made_as_view(out, x.value)


def _check(interpreter: Any, rule: Rule, out: Any, out_dims: Any) -> None:
    """What LAMINA_DEBUG=1 holds against every answer of a batching rule."""
    outs = out if isinstance(out, (tuple, list)) else [out]
    dims = out_dims if isinstance(out_dims, (tuple, list)) else [out_dims] * len(outs)
    if len(outs) != len(dims):
        raise interpreter.error(
            RuleError,
            f"a wrong answer of the batching rule {rule.owner}",
            f"{len(outs)} outputs and {len(dims)} out_dims",
        )
    for value, bdim in zip(outs, dims, strict=True):
        if isinstance(value, (tuple, list)):
            _check(interpreter, rule, value, bdim)
        elif isinstance(value, Tensor) and bdim is not None:
            size = value.shape[bdim] if 0 <= bdim < value.dim() else None
            if size != interpreter.batch_size:
                raise interpreter.error(
                    RuleError,
                    f"a wrong answer of the batching rule {rule.owner}",
                    f"output of shape {list(value.shape)} with batch dim {bdim}, "
                    f"but the batch size is {interpreter.batch_size}",
                )


def _random_handler(known: OpFacts) -> Handler:
    made_of = random_decomposition(known.op)

    def decomposed(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # Also without own arguments: the level has its say about each draw.
        with run_at(interpreter, autocast=known.is_composite):
            return made_of(*args, **kwargs)

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        values, dims, inner, _, _, _, grads = unwrap(interpreter, known, args, kwargs)
        if grads and not interpreter.watch:
            interpreter.watch = True
            return watched(interpreter, handle, op, args, kwargs)
        out, out_dims = batch_random(interpreter, known, values, dims, inner)
        return interpreter.wrap_out(out, out_dims)

    return handle if made_of is None else decomposed


def _data_dependent_handler(known: OpFacts) -> Handler:
    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        _, _, _, _, batched, own, _ = unwrap(interpreter, known, args, kwargs)
        if not batched:
            return pass_unbatched(interpreter, op, args, kwargs, own)
        if torch.Tag.dynamic_output_shape in op.tags:
            raise interpreter.error(
                DataDependentError,
                f"{known.name} would give each example an output of its own shape",
                f"to fix: use {of_fixed_shape(op)}",
            )
        answer = validated(args[0].value)
        if answer is not None:
            return answer
        raise interpreter.error(
            DataDependentError,
            f"{known.name} needs one Python value, but there are {interpreter.batch_size}",
            "it comes from .item(), float(), bool(), int() or an `if` on a batched tensor",
            "to fix: use torch.where in place of an `if`, and tensor ops in place of .item()",
        )

    return handle


def _fallback_handler(known: OpFacts) -> Handler:
    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        values, dims, inner, kwarg_dims, batched, own, grads = unwrap(
            interpreter, known, args, kwargs
        )
        if grads and not interpreter.watch:
            interpreter.watch = True
            return watched(interpreter, handle, op, args, kwargs)
        if not batched:
            return pass_unbatched(interpreter, op, args, kwargs, own)
        note_fallback(interpreter, known)
        out, out_dims = loop_over_examples(interpreter, op, values, dims, inner, kwarg_dims)
        return interpreter.wrap_out(out, out_dims)

    return handle
