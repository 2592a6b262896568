"""One step of a fused optimiser as ordinary ops; every transform may use this.

The kernels read the number of the step, and whether a gradient was infinite, as Python numbers, and
have no derivative. Here these are tensors: an ensemble of models is trained under `vmap`, and a
step can be differentiated. As in the kernels, half precision is computed in float32.

Sources of the formulas: the pages of `torch.optim.SGD`, `Adam`, `AdamW` and `Adagrad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina_core.overloads import aten

__all__ = ["OPTIMISERS"]

Row = tuple[Any, ...]


def _number(value: Any, dtype: Any) -> Any:
    """A Python number, or a tensor of one number as a 0-d tensor."""
    return value.reshape(()).to(dtype) if isinstance(value, torch.Tensor) else value


def _steps(
    step: Callable[..., Row],
    columns: tuple[Any, ...],
    steps: Any,
    lr: Any,
    maximize: bool,
    grad_scale: Any,
    found_inf: Any,
) -> list[list[Any]]:
    """Every parameter's step: columns of parameters, gradients and state to new ones.

    `step(rate, number, *row)` computes one, in the dtype of the row; `number` is that of the step.
    The new gradients are those without their scale. Where one was infinite all stays as it is.
    """
    outs: list[list[Any]] = [[] for _ in columns]
    present = [at for at, column in enumerate(columns) if len(column)]
    for index in range(len(columns[0])):
        old = [columns[at][index] for at in present]
        dtype = torch.promote_types(old[0].dtype, torch.float32)
        row = [x.to(dtype) for x in old]
        param, slope, *state = row
        if grad_scale is not None:
            slope = slope / _number(grad_scale, dtype)
        number = None if steps is None else _number(steps[index], dtype)
        ascent = -slope if maximize else slope
        param, *state = step(_number(lr, dtype), number, param, ascent, *state)
        for at, before, x, new in zip(present, old, row, (param, slope, *state), strict=True):
            # What is not changed is handed out as a copy, as by the kernels.
            after = before.clone() if new is x else new.to(before.dtype)
            if found_inf is not None:
                after = torch.where(found_inf.reshape(()) == 1, before, after)
            outs[at].append(after)
    return outs


def _adam(decoupled: bool) -> Callable[..., Any]:
    def fused_adam(
        self: Any,
        grads: Any,
        exp_avgs: Any,
        exp_avg_sqs: Any,
        max_exp_avg_sqs: Any,
        state_steps: Any,
        *,
        lr: Any,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
        grad_scale: Any = None,
        found_inf: Any = None,
    ) -> Any:
        """Lists of parameters, gradients, both moments, maxima of the second."""

        def step(
            rate: Any, number: Any, x: Any, slope: Any, mean: Any, square: Any, *top: Any
        ) -> Row:
            if weight_decay and decoupled:
                x = x - rate * weight_decay * x
            elif weight_decay:
                slope = slope + weight_decay * x
            mean = mean + (slope - mean) * (1 - beta1)
            square = square * beta2 + slope * slope * (1 - beta2)
            if amsgrad:
                top = (torch.maximum(top[0], square),)
            largest = top[0] if amsgrad else square
            scale = largest.sqrt() / (1 - beta2**number).sqrt() + eps
            return x - rate / (1 - beta1**number) * mean / scale, mean, square, *top

        columns = (self, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
        return tuple(_steps(step, columns, state_steps, lr, maximize, grad_scale, found_inf))

    return fused_adam


def _sgd(
    self: Any,
    grads: Any,
    momentum_buffer_list: Any,
    *,
    weight_decay: float,
    momentum: float,
    lr: Any,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
    grad_scale: Any = None,
    found_inf: Any = None,
) -> Any:
    """Lists of parameters, gradients and momenta."""

    def step(rate: Any, number: Any, x: Any, slope: Any, *moved: Any) -> Row:
        if weight_decay:
            slope = slope + weight_decay * x
        if momentum:
            if is_first_step:
                going = slope.clone()  # the gradient is handed out too
            else:
                going = moved[0] * momentum + slope * (1 - dampening)
            slope = slope + momentum * going if nesterov else going
            moved = (going,)
        return x - rate * slope, *moved

    columns = (self, grads, momentum_buffer_list)
    return tuple(_steps(step, columns, None, lr, maximize, grad_scale, found_inf))


def _adagrad(
    self: Any,
    grads: Any,
    state_sums: Any,
    state_steps: Any,
    *,
    lr: Any,
    lr_decay: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    grad_scale: Any = None,
    found_inf: Any = None,
) -> Any:
    """Lists of parameters, gradients and sums of squares."""

    def step(rate: Any, number: Any, x: Any, slope: Any, squares: Any) -> Row:
        if weight_decay:
            slope = slope + weight_decay * x
        squares = squares + slope * slope
        rate = rate / (1 + (number - 1) * lr_decay)
        return x - rate * slope / (squares.sqrt() + eps), squares

    columns = (self, grads, state_sums)
    return tuple(_steps(step, columns, state_steps, lr, maximize, grad_scale, found_inf))


def _adagrad_and_steps(self: Any, grads: Any, sums: Any, steps: Any, **rest: Any) -> Any:
    """The overload that also hands out the numbers of the steps, as they are."""
    return *_adagrad(self, grads, sums, steps, **rest), [number.clone() for number in steps]


OPTIMISERS: dict[Any, Callable[..., Any]] = {
    aten._fused_adagrad.default: _adagrad_and_steps,
    aten._fused_adagrad.tensor_lr: _adagrad,
    aten._fused_adam.default: _adam(decoupled=False),
    aten._fused_adam.tensor_lr: _adam(decoupled=False),
    aten._fused_adamw.default: _adam(decoupled=True),
    aten._fused_adamw.tensor_lr: _adam(decoupled=True),
    aten._fused_sgd.default: _sgd,
    aten._fused_sgd.tensor_lr: _sgd,
}
