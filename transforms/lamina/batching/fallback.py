"""The last resort: run an op once per example and stack the results."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lamina.batching.looped import LOOPED
from lamina.batching.table import RULES
from lamina_core.config import config
from lamina_core.errors import DataDependentError, FallbackWarning, MissingRuleError, message
from lamina_core.schema import OpFacts

__all__ = ["loop_over_examples", "note_fallback"]

Tensor = torch.Tensor
_WARNED: set[str] = set()


def note_fallback(interpreter: Any, known: OpFacts) -> None:
    """Say once per op that it runs example by example, or refuse to."""
    reason = LOOPED.get(known.op)
    if config.fallback == "error":
        raise interpreter.error(
            MissingRuleError,
            f"no batching rule for {known.name}" + (f": {reason}" if reason else ""),
            "registered overloads of the same op: "
            + (", ".join(RULES.siblings(known.op)) or "none"),
            "" if reason else "to fix: add one, as transforms/lamina/batching/rules/README.md says",
            f"{'to fix:' if reason else 'or'} loop over the examples, with "
            'lamina.config.fallback = "warn"',
        )
    if config.fallback == "warn" and known.name not in _WARNED:
        _WARNED.add(known.name)
        advice = "add a rule (torch.library.register_vmap for an op of your own), or "
        warnings.warn(
            message(
                f"no batching rule for {known.name}: it runs example by example, which is slow",
                interpreter.where(),
                reason or "",
                f"to fix: {'' if reason else advice}silence this with "
                'lamina.config.fallback = "silent"',
            ),
            FallbackWarning,
            stacklevel=2,
        )


def loop_over_examples(
    interpreter: Any,
    op: Any,
    values: list[Any],
    dims: tuple[Any, ...],
    kwargs: dict[str, Any],
    kwarg_dims: dict[str, int | None],
) -> tuple[Any, Any]:
    """Run `op` on each example; the batch dim of every output is 0.

    With no examples the op runs once on zeros, to learn the shapes of its outputs.
    """
    size = interpreter.batch_size

    def example(index: int) -> Any:
        args = [_take(value, dim, index, size) for value, dim in zip(values, dims, strict=True)]
        inner = {k: _take(v, kwarg_dims.get(k), index, size) for k, v in kwargs.items()}
        return op(*args, **inner)

    outs = [example(index) for index in range(size or 1)]
    return _stack(interpreter, op, outs, size)


def _take(value: Any, dim: Any, index: int, size: int) -> Any:
    if isinstance(dim, list):
        return [_take(v, d, index, size) for v, d in zip(value, dim, strict=True)]
    if dim is None:
        return value
    if not size:
        shape = list(value.shape)
        del shape[dim]
        return value.new_zeros(shape)
    return value.select(dim, index)


def _stack(interpreter: Any, op: Any, outs: list[Any], size: int) -> tuple[Any, Any]:
    first = outs[0]
    if isinstance(first, Tensor):
        if first.is_quantized:  # a stack would have the scale of the first
            raise interpreter.error(
                DataDependentError,
                f"{op} gives each example a quantised tensor, with a scale of its own",
                "to fix: use torch.fake_quantize_per_tensor_affine, which stays in floating point",
            )
        if any(out.shape != first.shape for out in outs):
            raise interpreter.error(
                DataDependentError,
                f"{op} gives examples outputs of different shapes",
                f"shapes: {', '.join(str(list(out.shape)) for out in outs[:4])}",
                "to fix: use an op whose output shape does not depend on values",
            )
        return (torch.stack(outs) if size else first.new_empty((0, *first.shape))), 0
    if isinstance(first, (tuple, list)):
        columns = [
            _stack(interpreter, op, [out[i] for out in outs], size) for i in range(len(first))
        ]
        return type(first)(c[0] for c in columns) if type(first) is list else tuple(
            c[0] for c in columns
        ), [c[1] for c in columns]
    if any(out != first for out in outs):
        raise interpreter.error(
            DataDependentError,
            f"{op} gives examples different Python values, such as {outs[:4]}",
            "to fix: use an op that returns a tensor",
        )
    return first, None
