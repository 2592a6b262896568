"""Batching rules of elementwise ops that the family does not cover.

The family (`lamina.batching.elementwise`) takes every op that is tagged as elementwise and gives
one tensor. Here is what gives several, gives a Python value, or has its random numbers to itself.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.agreement import common_answer
from lamina.batching.dims import ensure_batched, logical_rank, logical_shape, pad_rank
from lamina.batching.table import batching_rule, decomposition
from lamina_core.errors import MutationError, message
from lamina_core.overloads import aten
from lamina_core.schema import facts

# Elementwise though not tagged so; some of their kernels do not broadcast: that of gelu_backward is
# oneDNN's in float32, and in bfloat16 on some machines. What torch makes the backward ops of
# differs from their kernels at kinks.
_OF_ONE_SHAPE = [
    aten._add_relu.Tensor,
    aten._dirichlet_grad.default,
    aten._prelu_kernel.default,
    aten._standard_gamma_grad.default,
    aten.elu_backward.default,
    aten.gelu_backward.default,
    aten.hardshrink_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.hardtanh_backward.default,
    aten.leaky_relu_backward.default,
    aten.log_sigmoid_backward.default,
    aten.mish_backward.default,
    aten.softplus_backward.default,
    aten.softshrink_backward.default,
]


def _register_of_one_shape(op: Any) -> None:
    places = facts(op).tensor_args

    @batching_rule(op, state="family")
    def of_one_shape(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, *S] each -> [B, *S]"""
        operands = [(args[place], in_dims[place]) for place in places]
        first, bdim = operands[0]
        if bdim is not None and all(d == bdim and x.shape == first.shape for x, d in operands):
            return op(*args, **kwargs), bdim
        rank = max(logical_rank(x, bdim) for x, bdim in operands)
        padded = torch.broadcast_tensors(*[pad_rank(x, bdim, rank) for x, bdim in operands])
        given = list(args)
        for place, x in zip(places, padded, strict=True):
            given[place] = x
        return op(*given, **kwargs), 0


for _op in _OF_ONE_SHAPE:
    _register_of_one_shape(_op)


@decomposition(aten.abs_.default)
def abs_(x: Any) -> Any:
    """[*S] -> [*S]. PyTorch refuses complex tensors, whose absolute values are real."""
    if x.is_complex():
        text = "aten.abs_.default writes real numbers to a complex tensor"
        raise MutationError(message(text, "to fix: use x.abs(), which gives a real tensor"))
    return x.copy_(x.abs())


@batching_rule(aten.equal.default)
def equal(info: Any, in_dims: Any, x: Any, y: Any) -> Any:
    """[B, *S], [B, *S] -> one bool for all examples. Where they disagree there is none to give."""
    if logical_shape(x, in_dims[0]) != logical_shape(y, in_dims[1]):
        return False, None
    size = info.batch_size
    x, y = (ensure_batched(v, d, size) for v, d in zip((x, y), in_dims, strict=True))
    same = (x == y).reshape(size, x[:1].numel()).all(1)
    return common_answer(info, same, "equal", "(x == y).all()"), None


@batching_rule(aten.log_sigmoid_forward.default)
def log_sigmoid_forward(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *S] -> [B, *S] and a buffer: [B, *S] on a CPU, nothing elsewhere"""
    out, buffer = aten.log_sigmoid_forward.default(x)
    return (out, buffer), (in_dims[0], in_dims[0] if buffer.dim() == x.dim() else None)


@batching_rule(aten.frexp.Tensor)
def frexp(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *S] -> mantissa [B, *S], exponent [B, *S]"""
    return tuple(torch.frexp(x)), (in_dims[0], in_dims[0])


@decomposition(aten.rrelu_with_noise_functional.default)
def rrelu_with_noise_functional(
    x: Any,
    noise: Any,
    lower: float = 0.125,
    upper: float = 1.0 / 3,
    training: bool = False,
    generator: Any = None,
) -> Any:
    """A slope drawn for each element below 0; only training draws."""
    if not training or not x.numel():
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2), noise
    slope = torch.empty_like(x).uniform_(lower, upper, generator=generator)
    return torch.where(x <= 0, x * slope, x), torch.where(x <= 0, slope, 1.0)
