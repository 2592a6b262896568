"""Random ops under vmap: one draw per example, one draw for all, or an error.

What a seed reproduces: under "different" the numbers of one op are drawn in one call for the whole
batch, in batch-first order; under "same" they are drawn as outside vmap.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.vmap.dims import ensure_batched, logical_shape, pad_rank
from lamina_core.dispatch import lower
from lamina_core.errors import RandomnessError
from lamina_core.schema import OpFacts

__all__ = ["batch_random"]

aten = torch.ops.aten


def batch_random(
    interpreter: Any, known: OpFacts, values: list[Any], dims: tuple[Any, ...], kwargs: Any
) -> tuple[Any, Any]:
    """Run a random op (never an in-place one) as `randomness` says.

    Raises:
        RandomnessError: With `randomness="error"`, or where "same" is asked for a batched operand.
    """
    op = known.op
    size = interpreter.batch_size
    batched = any(d is not None for d in _flat(dims))
    if op is aten.native_dropout.default and (not values[2] or values[1] in (0.0, 1.0)):
        # All or nothing is kept, so nothing is drawn.
        out, mask = lower(interpreter, op, tuple(values), kwargs)
        return (out, mask), (dims[0], dims[0])
    if interpreter.randomness == "error":
        raise interpreter.error(
            RandomnessError,
            f"{known.name} draws random numbers, and vmap was not told what that means",
            'to fix: pass randomness="different" for a draw per example, or "same" for one for all',
        )
    if interpreter.randomness == "same":
        if not batched:
            return lower(interpreter, op, tuple(values), kwargs), None
        return _same_for_all(interpreter, known, values, dims, kwargs)
    if not known.tensor_args and not known.list_args:
        position = next(
            (i for i, name in enumerate(known.positional) if name in ("size", "n")), None
        )
        if position is not None and known.positional[position] == "size":
            args = list(values)
            args[position] = [size, *args[position]]
            return lower(interpreter, op, tuple(args), kwargs), 0
        outs = [lower(interpreter, op, tuple(values), kwargs) for _ in range(max(size, 1))]
        return torch.stack(outs)[:size], 0
    if op._schema.name in _BATCH_FREE:
        args = [
            ensure_batched(v, d, size) if isinstance(v, torch.Tensor) else v
            for v, d in zip(values, dims, strict=True)
        ]
        args = _pad_all(args, values, dims)
        out = lower(interpreter, op, tuple(args), kwargs)
        return out, 0
    return _one_by_one(interpreter, op, values, dims, kwargs)


# Ops that draw each element on its own, so a batch dim in front changes nothing but the shape.
_BATCH_FREE = frozenset(
    f"aten::{name}"
    for name in (
        "_standard_gamma",
        "bernoulli",
        "binomial",
        "cauchy",
        "exponential",
        "geometric",
        "log_normal",
        "native_dropout",
        "normal",
        "normal_functional",
        "poisson",
        "rand_like",
        "randint_like",
        "randn_like",
        "random",
        "rrelu_with_noise",
        "uniform",
    )
)


def _flat(dims: Any) -> list[Any]:
    found = []
    for dim in dims:
        found.extend(dim if isinstance(dim, list) else [dim])
    return found


def _pad_all(args: list[Any], values: list[Any], dims: tuple[Any, ...]) -> list[Any]:
    """Give all batched tensors one rank, so that operands of different ranks broadcast."""
    ranks = [
        value.dim() - (dim is not None)
        for value, dim in zip(values, dims, strict=True)
        if isinstance(value, torch.Tensor)
    ]
    rank = max(ranks)
    out = []
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.dim() < rank + 1:
            missing = rank + 1 - arg.dim()
            arg = arg.reshape(arg.shape[0], *([1] * missing), *arg.shape[1:])
        out.append(arg)
    return out


# Ops that look at the shape, dtype and device of their first operand, and not at its values.
_SHAPE_ONLY = frozenset(
    f"aten::{name}"
    for name in (
        "cauchy",
        "exponential",
        "geometric",
        "log_normal",
        "normal_functional",
        "rand_like",
        "randint_like",
        "randn_like",
        "random",
        "uniform",
    )
)


def _same_for_all(
    interpreter: Any, known: OpFacts, values: list[Any], dims: tuple[Any, ...], kwargs: Any
) -> tuple[Any, Any]:
    """One draw for batched operands: of what does not depend on their values."""
    name = known.op._schema.name
    size = interpreter.batch_size

    def draw(op: Any, *args: Any, **kwargs: Any) -> Any:
        return lower(interpreter, op, args, kwargs)

    if name in _SHAPE_ONLY or known.op is aten.bernoulli.p:
        return draw(known.op, _example(values[0], dims[0]), *values[1:], **kwargs), None
    if known.op in (aten.bernoulli.default, aten.bernoulli.Tensor):
        last = len(values) - 1 if known.op is aten.bernoulli.Tensor else 0
        p, shape = values[last], _example(values[0], dims[0])
        uniform = draw(aten.uniform.default, shape.to(p.dtype), **kwargs)
        p = pad_rank(p, dims[last], uniform.dim())
        return (uniform < p).to(values[0].dtype), None if dims[last] is None else 0
    if name == "aten::native_dropout":
        x, p, _ = values
        scaled, mask = draw(known.op, _example(x, dims[0]) + 1, p, True)
        x = ensure_batched(x, dims[0], size)
        return (x * scaled, mask), (0, None)
    if known.op in _NORMAL:
        return _normal(draw, values, dims, kwargs), 0
    if name == "aten::multinomial":
        return _multinomial(
            draw, ensure_batched(values[0], dims[0], size), *values[1:], **kwargs
        ), 0
    raise interpreter.error(
        RandomnessError,
        f'{known.name} draws from batched parameters, and randomness="same" asks for one draw',
        'to fix: use randomness="different"',
    )


_NORMAL = (aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor)


def _example(x: Any, x_bdim: int | None) -> Any:
    """Zeros of the shape, dtype and device of one example."""
    return x.new_zeros(logical_shape(x, x_bdim))


def _normal(draw: Any, values: list[Any], dims: tuple[Any, ...], kwargs: Any) -> Any:
    """One draw of standard normal numbers, scaled: mean + std z, with z of their shape."""
    std = values[1] if len(values) > 1 else 1.0
    both = list(zip((values[0], std), (*dims, None)[:2], strict=True))
    tensors = [(v, d) for v, d in both if isinstance(v, torch.Tensor)]
    shape = torch.broadcast_shapes(*[logical_shape(v, d) for v, d in tensors])
    z = draw(aten.normal_functional.default, tensors[0][0].new_zeros(shape), **kwargs)
    mean, std = (pad_rank(v, d, z.dim()) if isinstance(v, torch.Tensor) else v for v, d in both)
    return (mean + std * z).detach()  # PyTorch gives `normal` a derivative of 0


def _multinomial(draw: Any, p: Any, count: int, replacement: bool = False, **kwargs: Any) -> Any:
    """[B, *, n] -> [B, *, count]: equal rows of weights give equal draws.

    With replacement by the inverse of the distribution function, at one uniform number per draw;
    without by a race, in which category k needs an exponential time of rate p[k].
    """
    if replacement:
        level = draw(aten.uniform.default, p.new_zeros([*p.shape[1:-1], count]), **kwargs)
        reached = p.cumsum(-1) / p.sum(-1, keepdim=True)
        # Rounding must not leave a number above the last level, nor give it to a weight of 0.
        reached = reached / reached[..., -1:]
        level = level.expand(*p.shape[:-1], count).contiguous()
        return torch.searchsorted(reached, level, right=True)
    times = draw(aten.exponential.default, p.new_zeros(p.shape[1:]), **kwargs)
    return (p / times).topk(count, -1).indices


def _one_by_one(
    interpreter: Any, op: Any, values: list[Any], dims: tuple[Any, ...], kwargs: Any
) -> tuple[Any, Any]:
    size = interpreter.batch_size
    outs = []
    for index in range(size):
        args = [v if d is None else v.select(d, index) for v, d in zip(values, dims, strict=True)]
        outs.append(lower(interpreter, op, tuple(args), kwargs))
    if isinstance(outs[0], torch.Tensor):
        return torch.stack(outs), 0
    return tuple(torch.stack(column) for column in zip(*outs, strict=True)), (0,) * len(outs[0])
