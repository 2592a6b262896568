"""Ops that users define with `torch.library`: their batching rules, and writes to arguments.

`resolve` and `state_of` are those of `handlers.py` and `states.py` with this in front. A rule that
was registered with `torch.library.register_vmap` is used; it runs as code of the level below.
PyTorch keeps the rule of an op made by `custom_op` beside the op, and hides any other in its
dispatcher, so `register_vmap` is patched once to remember those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from lamina.batching import handlers, states
from lamina.batching.batched import wrap
from lamina.batching.dims import ensure_batched
from lamina.batching.fallback import loop_over_examples, note_fallback
from lamina.batching.operands import unwrap
from lamina_core.alias import mutate_copies
from lamina_core.dispatch import watched
from lamina_core.errors import RuleError
from lamina_core.handlers import Handler
from lamina_core.schema import OpFacts, facts
from lamina_core.scopes import run_at
from lamina_core.torch_hooks.registry import OpOverload, custom_ops, has_kernel_for

__all__ = ["need_answer", "registered_rule", "resolve", "state_of", "wrap_answer"]

Tensor = torch.Tensor
Rule = Callable[..., Any]

# The namespaces of ops that PyTorch itself defines, which users cannot register rules for.
_OF_TORCH = frozenset(("aten", "prims", "prim", "torch_nn", "quantized"))

_remembered: dict[str, Rule] = {}
_register_vmap: Any = torch.library.register_vmap


@functools.wraps(_register_vmap)
def _registering(op: Any, func: Rule | None = None, /, *, lib: Any = None) -> Any:
    """`torch.library.register_vmap`, which remembers what it registers."""
    if func is None:
        return lambda rule: _registering(op, rule, lib=lib)
    answer = _register_vmap(op, func, lib=lib)
    if isinstance(op, OpOverload):
        _remembered[op.name()] = func
    elif isinstance(op, str):
        _remembered[op.removesuffix(".default")] = func
    return answer


torch.library.register_vmap = _registering


def registered_rule(op: Any) -> Rule | None:
    """The rule that a user registered for an op with PyTorch, or None."""
    name = op.name()
    definition = custom_ops.get(name)
    if definition is not None:
        return definition._vmap_fn
    # An op may be gone, with its library, and another have taken its name.
    has_kernel = has_kernel_for(name, "FuncTorchBatched")
    return _remembered.get(name) if has_kernel else None


def state_of(op: Any) -> str:
    """Which of the five states of `lamina_core.rules.STATES` an op is in under vmap."""
    if op.namespace not in _OF_TORCH:
        if registered_rule(op) is not None:
            return "rule"
        if _only_writes(facts(op)):
            return "generic"
    return states.state_of(op)


def resolve(op: Any) -> Handler:
    """The handler of an op, decided once; whether a user gave it a rule is asked on each call."""
    handler = handlers.resolve(op)
    return handler if op.namespace in _OF_TORCH else _user_handler(facts(op), handler)


def _only_writes(known: OpFacts) -> bool:
    """Whether an op writes to its arguments and has no form that does not."""
    return bool(known.mutated) and known.functional() is None


def _user_handler(known: OpFacts, otherwise: Handler) -> Handler:
    def handle(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        rule = registered_rule(op)
        if rule is None and not _only_writes(known):
            return otherwise(interpreter, op, args, kwargs)
        _, _, _, _, batched, _, grads = unwrap(interpreter, known, args, kwargs)
        if grads and not interpreter.watch:
            interpreter.watch = True
            return watched(interpreter, handle, op, args, kwargs)
        if not batched:
            return otherwise(interpreter, op, args, kwargs)
        if not known.mutated:
            return _run(interpreter, known, rule, args, kwargs)

        def write(args: Any, kwargs: Any, copies: list[Any]) -> Any:
            for copy in copies:
                if copy.bdim is None:
                    value = ensure_batched(copy.value, None, interpreter.batch_size)
                    interpreter.rebind(copy, wrap(interpreter, value.clone(), 0))
            return _run(interpreter, known, rule, args, kwargs)

        return mutate_copies(interpreter, known, args, kwargs, write)

    return handle


def _run(interpreter: Any, known: OpFacts, rule: Rule | None, args: Any, kwargs: Any) -> Any:
    """By the user's rule if there is one, else example by example."""
    values, dims, inner, kwarg_dims, _, _, _ = unwrap(interpreter, known, args, kwargs)
    if rule is None:
        note_fallback(interpreter, known)
        out, out_dims = loop_over_examples(interpreter, known.op, values, dims, inner, kwarg_dims)
        return interpreter.wrap_out(out, out_dims)
    with run_at(interpreter.below):
        answer = rule(interpreter.info, dims, *values, **inner)
    return wrap_answer(interpreter, known.name, answer)


def wrap_answer(interpreter: Any, name: str, answer: Any) -> Any:
    """Wrap the `(output, out_dims)` of a user's rule.

    Raises:
        RuleError: If it is no such pair, or the dims do not fit the outputs.
    """
    return interpreter.wrap_out(*need_answer(interpreter, name, answer))


def need_answer(interpreter: Any, name: str, answer: Any) -> tuple[Any, Any]:
    """The `(output, out_dims)` of a user's rule, with a dim counted from the front for each output.

    Raises:
        RuleError: If it is no such pair, or the dims do not fit the outputs.
    """
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise interpreter.error(
            RuleError,
            f"the vmap of {name} returned {type(answer).__name__}",
            "to fix: return a pair (output, out_dims)",
        )
    out, dims = answer
    return out, _fitting_dims(interpreter, name, out, dims)


def _fitting_dims(interpreter: Any, name: str, out: Any, dim: Any) -> Any:
    if isinstance(out, (tuple, list)):
        if dim is None or isinstance(dim, int):
            dim = (dim,) * len(out)
        if not isinstance(dim, (tuple, list)) or len(dim) != len(out):
            raise interpreter.error(
                RuleError,
                f"the vmap of {name} returned {len(out)} outputs and out_dims {dim!r}",
                "to fix: return one int or None for each output",
            )
        return [_fitting_dims(interpreter, name, o, d) for o, d in zip(out, dim, strict=True)]
    if not isinstance(out, Tensor):
        return None
    interpreter.look(out)
    if dim is None:
        return None
    rank = out.dim()
    size = interpreter.batch_size
    if not isinstance(dim, int) or not -rank <= dim < rank or out.shape[dim] != size:
        raise interpreter.error(
            RuleError,
            f"the vmap of {name} returned an output of shape {list(out.shape)} with "
            f"out_dims {dim!r}",
            f"to fix: name a dim of size {size}, the batch size, or None",
        )
    return dim % rank
