"""How an op is batched: by rule, family, decomposition or loop. `resolve` picks, once per op.

A handler has the signature `(interpreter, op, args, kwargs)`. It finds its own wrappers among the
arguments, calls the rule on their values and wraps what comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina.decompositions import decomposition_of
from lamina.vmap.batched import BatchedTensor, wrap, wrap_like
from lamina.vmap.dims import EmptyBatchError, pad_rank
from lamina.vmap.fallback import loop_over_examples, note_fallback
from lamina.vmap.randomness import batch_random
from lamina.vmap.states import (
    decomposition_under_vmap,
    depends_on_data,
    is_plain_pointwise,
    random_decomposition,
)
from lamina.vmap.table import RULES, Info
from lamina.vmap.writes import in_place_handler
from lamina_core.alias import record_views
from lamina_core.config import config
from lamina_core.dispatch import (
    call_one,
    call_two,
    lower,
    map_tensors,
    needs_guard,
    pass_down,
    tensors_in,
    under_autocast,
    watched,
)
from lamina_core.errors import (
    DataDependentError,
    RuleError,
)
from lamina_core.interpreter import run_at
from lamina_core.rules import Rule
from lamina_core.schema import OpFacts, facts
from lamina_core.wrapper import LevelTensor, shares_memory, strip_dead

__all__ = ["Handler", "resolve", "unwrap"]

Handler = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]
_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


def resolve(op: Any) -> Handler:
    """The handler of an op: its rule, else its family, its decomposition, or the loop."""
    known = facts(op)
    rule = RULES.lookup(op)
    if rule is not None:
        if rule.state == "decomposed":
            return _decompose_handler(known, rule.function)
        return under_autocast(op, _rule_handler(rule, known))
    if known.mutated and decomposition_of(op) is None:
        return in_place_handler(known)
    if known.is_random:
        return _random_handler(known)
    if known.is_pointwise and is_plain_pointwise(known):
        return _unary_handler(known) if len(known.tensor_args) == 1 else _nary_handler(known)
    if depends_on_data(op):
        return _data_dependent_handler(known)
    decomposition = decomposition_under_vmap(op)
    if decomposition is not None:
        return _decompose_handler(known, decomposition)
    return _fallback_handler(known)


def _unary_handler(known: OpFacts) -> Handler:
    call = known.call
    position = known.tensor_args[0]
    if position:
        return _nary_handler(known)

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: the most frequent op of all.
        x = args[0]
        if type(x) is BatchedTensor and x.interpreter is interpreter:
            if len(args) == 1 and not kwargs:
                return wrap_like(x, call_one(op, call, x.value))
            return wrap_like(x, call(x.value, *args[1:], **kwargs))
        return _pass_down(interpreter, op, args, kwargs)

    return handle


def _nary_handler(known: OpFacts) -> Handler:
    call = known.call
    positions = known.tensor_args
    first_two = positions[:2] == (0, 1)

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        # HOT: two operands of one shape and dtype, one batched at least, or one and a number.
        if first_two and len(args) == 2 and not kwargs:
            x, y = args
            if type(x) is BatchedTensor and x.interpreter is interpreter:
                bdim = x.bdim
                if type(y) is BatchedTensor and y.interpreter is interpreter:
                    if (
                        bdim is not None
                        and x.logical == y.logical
                        and y.strides is None
                        and (
                            bdim == y.bdim
                            or (bdim == 0 and y.bdim is None and x.value.dtype is y.value.dtype)
                        )
                    ):
                        return wrap_like(x, call_two(op, call, x.value, y.value))
                elif type(y) is Tensor:
                    if (
                        bdim == 0
                        and x.logical == y.shape
                        and x.value.dtype is y.dtype
                        and y.is_contiguous()
                        and not needs_guard(y)
                    ):
                        return wrap_like(x, call_two(op, call, x.value, y))
                elif type(y) is float or type(y) is int:
                    return wrap_like(x, call_two(op, call, x.value, y))
            elif (
                type(x) is Tensor
                and type(y) is BatchedTensor
                and y.interpreter is interpreter
                and y.bdim == 0
                and y.logical == x.shape
                and y.value.dtype is x.dtype
                and x.is_contiguous()
                and not needs_guard(x)
            ):
                return wrap_like(y, call(x, y.value))
        values = list(args)
        operands = []
        rank = 0
        for position in positions:
            if position >= len(args):
                break
            arg = args[position]
            if arg is None:
                continue
            if type(arg) in _CLASSES and not arg.interpreter.alive:
                arg = strip_dead(arg)  # it may stand for a value of this level
            if type(arg) is BatchedTensor and arg.interpreter is interpreter:
                operands.append((position, arg.value, arg.bdim))
            elif isinstance(arg, Tensor):
                if type(arg) not in _CLASSES and not interpreter.watch and needs_guard(arg):
                    interpreter.watch = True
                    return watched(interpreter, handle, op, args, kwargs)
                operands.append((position, arg, None))
            else:
                continue
            rank = max(rank, arg.dim())
        if all(bdim is None for _, _, bdim in operands):
            return _pass_down(interpreter, op, args, kwargs)
        promoted = _promote(args, operands)
        for position, value, bdim in operands:
            value = pad_rank(value, bdim, rank)
            dtype = promoted.get(position)
            values[position] = value if dtype is None else value.to(dtype)
        return wrap(interpreter, call(*values, **kwargs), 0)

    return handle


def _promote(args: Any, operands: Any) -> dict[int, Any]:
    """The dtypes to which batched logical 0-d operands must be cast.

    A 0-d tensor yields to one with dims in type promotion; batched, it has a dim and would not.
    """
    numeric = [entry for entry in operands if entry[1].dtype is not torch.bool]
    if len({value.dtype for _, value, _ in numeric}) < 2:
        return {}
    scalars = [
        position for position, value, bdim in numeric if bdim is not None and value.dim() == 1
    ]
    if not scalars:
        return {}
    dtype = args[numeric[0][0]].dtype
    with_dims = [args[position] for position, _, _ in numeric]
    proxies = [torch.empty([0] * min(t.dim(), 1), dtype=t.dtype) for t in with_dims]
    proxy = proxies[0]
    for other in proxies[1:]:
        dtype = torch.result_type(proxy, other)
        rank = max(proxy.dim(), other.dim())
        proxy = torch.empty([0] * rank, dtype=dtype)
    return dict.fromkeys(scalars, dtype)


# HOT: a flat loop; with a helper function per operand it costs twice as much.
def unwrap(interpreter: Any, known: OpFacts, args: Any, kwargs: Any) -> Any:
    """Values and in_dims of the arguments; `batched` says whether any is, `own` likewise."""
    values, dims = list(args), [None] * len(args)
    batched = own = grads = False
    count = len(values)
    for position in known.tensor_args:
        if position >= count:
            break
        arg = values[position]
        kind = type(arg)
        if kind is BatchedTensor and arg.interpreter is interpreter:
            own = True
            values[position] = arg.value
            if arg.bdim is not None:
                batched = True
                dims[position] = arg.bdim
        elif kind in _CLASSES:
            if not arg.interpreter.alive:  # it may stand for a value of this level
                arg = values[position] = strip_dead(arg)
                if interpreter.is_own(arg):
                    own, batched = True, batched or arg.bdim is not None
                    values[position], dims[position] = arg.value, arg.bdim
        elif isinstance(arg, Tensor) and needs_guard(arg):
            grads = True
    kwarg_dims: dict[str, int | None] = {}
    if known.list_args or known.tensor_kwargs:
        more: list[Any] = []
        kwargs = _unwrap_rest(interpreter, known, values, dims, kwargs, kwarg_dims, more)
        own = own or any(interpreter.is_own(arg) for arg in more)
        batched = batched or any(interpreter.is_own(arg) and arg.bdim is not None for arg in more)
        grads = grads or any(
            isinstance(arg, Tensor) and type(arg) not in _CLASSES and needs_guard(arg)
            for arg in more
        )
    return values, tuple(dims), kwargs, kwarg_dims, batched, own, grads


def _unwrap_rest(
    interpreter: Any,
    known: OpFacts,
    values: list[Any],
    dims: list[Any],
    kwargs: dict[str, Any],
    kwarg_dims: dict[str, int | None],
    more: list[Any],
) -> dict[str, Any]:
    """Values and dims in lists and keyword-only arguments; `more` collects what was found."""

    def one(arg: Any) -> tuple[Any, int | None]:
        arg = strip_dead(arg)
        more.append(arg)
        return (arg.value, arg.bdim) if interpreter.is_own(arg) else (arg, None)

    for position in known.list_args:
        if position < len(values) and values[position] is not None:
            pairs = [one(item) for item in values[position]]
            values[position] = [value for value, _ in pairs]
            dims[position] = [bdim for _, bdim in pairs]
    if known.tensor_kwargs:
        kwargs = dict(kwargs)
        for name in known.tensor_kwargs:
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name], kwarg_dims[name] = one(kwargs[name])
    return kwargs


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
            return _pass_down(interpreter, op, args, kwargs, own)
        info = interpreter.info
        if kwarg_dims:
            info = Info(interpreter, info.batch_size, info.randomness)
            info.kwarg_dims = kwarg_dims
        try:
            answer = function(info, dims, *values, **inner)
        except EmptyBatchError:
            answer = loop_over_examples(interpreter, op, values, dims, inner, kwarg_dims)
        if answer is NotImplemented:  # the rule leaves this case to the decomposition
            with run_at(interpreter, autocast=True):
                return op.decompose(*args, **kwargs)
        out, out_dims = answer
        if config.debug:
            _check(interpreter, rule, out, out_dims)
        if isinstance(out, Tensor) and known.returns == ("tensor",):
            # A rule that hands its operand through, as `contiguous` may, keeps the identity.
            if values and out is values[0] and out_dims == dims[0]:
                return args[0]
            wrapped: Any = wrap(interpreter, out, out_dims)
        else:
            wrapped = interpreter.wrap_out(out, out_dims)
        if (
            known.is_view or (known.may_be_view and shares_memory(out, values[0]))
        ) and interpreter.is_own(args[0]):
            return record_views(wrapped, op, args, kwargs)
        return wrapped

    return handle


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


def _pass_down(interpreter: Any, op: Any, args: Any, kwargs: Any, own: bool | None = None) -> Any:
    """An op without batched arguments: run it below; its result is the same for every example."""
    if own is None:
        own = any(interpreter.is_own(t) for t in tensors_in(args, kwargs))
    if not own:
        return pass_down(interpreter, op, args, kwargs)

    def unbox(tensor: Any) -> Any:
        return tensor.value if interpreter.is_own(tensor) else tensor

    values = [map_tensors(unbox, arg) for arg in args]
    inner = {key: map_tensors(unbox, value) for key, value in kwargs.items()}
    out = lower(interpreter, op, tuple(values), inner)
    if values and out is values[0]:
        return args[0]
    wrapped = map_tensors(interpreter.constant, out)
    if facts(op).is_view and interpreter.is_own(args[0]):
        return record_views(wrapped, op, args, kwargs)
    return wrapped


def _decompose_handler(known: OpFacts, decomposition: Any) -> Handler:
    composite = known.is_composite

    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        if not any(interpreter.is_own(t) for t in tensors_in(args, kwargs)):
            return pass_down(interpreter, op, args, kwargs)
        with run_at(interpreter, autocast=composite):
            return decomposition(*args, **kwargs)

    return handle


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
            return _pass_down(interpreter, op, args, kwargs, own)
        if torch.Tag.dynamic_output_shape in op.tags:
            raise interpreter.error(
                DataDependentError,
                f"{known.name} would give each example an output of its own shape",
                "to fix: use torch.where, a masked reduction or torch.nonzero_static",
            )
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
            return _pass_down(interpreter, op, args, kwargs, own)
        note_fallback(interpreter, known)
        out, out_dims = loop_over_examples(interpreter, op, values, dims, inner, kwarg_dims)
        return interpreter.wrap_out(out, out_dims)

    return handle
