"""Derivatives of losses.

`cross_entropy_loss` is `log_softmax` and `nll_loss_forward`, which is linear in the
log-probabilities; the plain case is one node. `l1_loss` and `kl_div` decompose to elementwise ops.
The others are an elementwise function and a reduction: a table gives the slope in each operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina.autodiff.declare import fixed, jvp_rule, linear, unbroadcast, vjp_rule
from lamina.autodiff.shapes import stand_in
from lamina_core.overloads import aten

where = torch.where

_MEAN, _SUM = 1, 2  # the numbers that ATen gives the reductions; 0 is none


# -- negative log-likelihood -----------------------------------------------------------------------


def _negative_log_likelihood(op: Any, backward_op: Any) -> None:
    """Register both rules of an op `(x, target, ...) -> (out, total_weight)`, linear in x."""

    @vjp_rule(op)
    def rule(
        needs: Any, x: Any, target: Any, weight: Any, reduction: int, ignore_index: Any
    ) -> Any:
        out, total = op(x, target, weight, reduction, ignore_index)
        settings = (reduction, ignore_index)
        residuals = (x.shape, target, weight, total, settings, backward_op)
        return (out, total), residuals, _nll_pullback

    @jvp_rule(op)
    def pushforward(tangents: Any, x: Any, *rest: Any) -> Any:
        outs = op(x, *rest)
        return outs, None if tangents[0] is None else (op(tangents[0], *rest)[0], None)

    def gathered(ct: Any, target: Any, weight: Any, reduction: Any, ignore_index: Any) -> Any:
        return op(ct, target, weight, reduction, ignore_index)[0]

    linear(backward_op, gathered)
    fixed(op, 1)  # the total weight is that of the targets


def _nll_pullback(residuals: Any, needs: Any, ct: Any, total_ct: Any) -> Any:
    shape, target, weight, total, settings, backward_op = residuals
    if ct is None:
        return None, None, None
    shown = stand_in(ct, shape)
    return backward_op(ct, shown, target, weight, *settings, total), None, None


@vjp_rule(aten.cross_entropy_loss.default)
def cross_entropy(
    needs: Any,
    x: Any,
    target: Any,
    weight: Any = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """[N, C] or [C] scores, [N] or [] classes -> [] or [N]. Anything else decomposes."""
    if weight is not None or label_smoothing or target.is_floating_point() or x.dim() > 2:
        return NotImplemented
    log_p = torch.log_softmax(x, -1)
    out, total = aten.nll_loss_forward(log_p, target, None, reduction, ignore_index)
    return out, (log_p, target, total, (reduction, ignore_index)), _cross_entropy_pullback


def _cross_entropy_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    log_p, target, total, settings = residuals
    if ct is None:
        return None, None, None
    log_p_ct = aten.nll_loss_backward(ct, log_p, target, None, *settings, total)
    return aten._log_softmax_backward_data(log_p_ct, log_p, -1, log_p.dtype), None, None


_negative_log_likelihood(aten.nll_loss_forward.default, aten.nll_loss_backward.default)
_negative_log_likelihood(aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default)


# -- an elementwise function and a reduction -------------------------------------------------------


def _reduced(value: Any, reduction: int) -> Any:
    if reduction == _MEAN:
        return value.mean()
    return value.sum() if reduction == _SUM else value


def _loss_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    x, y, extra, reduction, slopes = residuals
    if ct is None:
        return [None] * len(needs)
    if reduction == _MEAN:
        ct = ct / torch.broadcast_shapes(x.shape, y.shape).numel()
    cts: list[Any] = [None] * len(needs)
    for i, operand in enumerate((x, y)):
        if needs[i]:
            cts[i] = unbroadcast(ct * slopes[i](x, y, *extra), operand.shape)
    return cts


def _loss(op: Any, place: int, *slopes: Callable[..., Any]) -> None:
    """Register both rules of a loss `(x, y, ...)`.

    `place` is where the reduction stands among the arguments; `slopes` are the derivatives in x and
    y, functions of the arguments without the reduction.
    """
    schema = op._schema.arguments
    defaults = tuple(argument.default_value for argument in schema)

    def complete(args: Any, kwargs: Any) -> Any:
        full = list(args) + [
            kwargs.get(a.name, d)
            for a, d in zip(schema[len(args) :], defaults[len(args) :], strict=True)
        ]
        x, y = full[:2]
        reduction = full.pop(place)
        return x, y, tuple(full[2:]), reduction

    @vjp_rule(op)
    def rule(needs: Any, *args: Any, **kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        x, y, extra, reduction = complete(args, kwargs)
        return out, (x, y, extra, reduction, slopes), _loss_pullback

    @jvp_rule(op)
    def pushforward(tangents: Any, *args: Any, **kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        x, y, extra, reduction = complete(args, kwargs)
        total = None
        for tangent, slope in zip(tangents, slopes, strict=False):
            if tangent is not None:
                term = tangent * slope(x, y, *extra)
                total = term if total is None else total + term
        if total is None:
            return out, None
        if reduction == _MEAN:
            total = total.expand(torch.broadcast_shapes(x.shape, y.shape))
        return out, _reduced(total, reduction)


def _bce_x(x: Any, y: Any, weight: Any) -> Any:
    slope = (x - y) / (x * (1 - x)).clamp_min(1e-12)
    return slope if weight is None else slope * weight


def _bce_y(x: Any, y: Any, weight: Any) -> Any:
    slope = (-x).log1p() - x.log()  # infinite at 0 and 1, though the loss bounds the logarithms
    return slope if weight is None else slope * weight


def _logits_x(x: Any, y: Any, weight: Any, pos_weight: Any) -> Any:
    """`sigmoid(x) - y`, as two terms that keep their digits where the sigmoid is close to y."""
    hit = y if pos_weight is None else y * pos_weight
    slope = (1 - y) * x.sigmoid() - hit * (-x).sigmoid()
    return slope if weight is None else slope * weight


def _logits_y(x: Any, y: Any, weight: Any, pos_weight: Any) -> Any:
    slope = -x
    if pos_weight is not None:
        log = torch.nn.functional.logsigmoid
        slope = log(-x) - pos_weight * log(x)
    return slope if weight is None else slope * weight


def _huber_slope(x: Any, y: Any, delta: float) -> Any:
    """The bounds belong to the lines, whose second derivative is 0."""
    gap = x - y
    return where(gap.abs() >= delta, gap.sign() * delta, gap)  # a NaN stays one


def _smooth_l1_slope(x: Any, y: Any, beta: float) -> Any:
    gap = x - y
    return gap.sign() if beta == 0 else where(gap.abs() >= beta, gap.sign(), gap / beta)


def _soft_margin_slope(x: Any, y: Any) -> Any:
    """PyTorch's quotient of exponentials overflows."""
    return -y * (-y * x).sigmoid()


_loss(aten.binary_cross_entropy.default, 3, _bce_x, _bce_y)
_loss(aten.binary_cross_entropy_with_logits.default, 4, _logits_x, _logits_y)
_loss(aten.huber_loss.default, 2, _huber_slope, lambda x, y, delta: -_huber_slope(x, y, delta))
_loss(aten.mse_loss.default, 2, lambda x, y: 2 * (x - y), lambda x, y: 2 * (y - x))
_loss(
    aten.smooth_l1_loss.default,
    2,
    _smooth_l1_slope,
    lambda x, y, beta: -_smooth_l1_slope(x, y, beta),
)
_loss(aten.soft_margin_loss.default, 2, _soft_margin_slope, lambda x, y: _soft_margin_slope(y, x))
