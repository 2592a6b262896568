"""Derivatives of batch norm and RMS norm; see `norm` for what the normalisations share.

`aten.batch_norm` decomposes to `native_batch_norm` (or to cuDNN's, whose formula is borrowed). In
training the op writes the running statistics itself, although its schema does not say so: the
values below are handed to it as they are, so whoever owns the buffers sees the update.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import decomposition, jvp_rule, unbroadcast, vjp_rule
from lamina.autodiff.outside import whole, whole_in
from lamina.autodiff.rules.matmul import conj
from lamina.autodiff.rules.norm import (
    _as,
    _normalised_t,
    _of_statistics,
    _plus,
    _shaped,
    _statistics_t,
)
from lamina.autodiff.rules.norm_backward import _each_as, _second
from lamina_core.dispatch import followed
from lamina_core.half import widened
from lamina_core.overloads import aten


def _over_channels(x: Any) -> tuple[list[int], list[int]]:
    """The shape that broadcasts a tensor of C channels over x, and all dims but that of C."""
    rank = x.dim()
    return [1, -1] + [1] * (rank - 2), [0, *range(2, rank)]


@whole(aten._native_batch_norm_legit.default, aten.native_batch_norm.default)
@vjp_rule(aten._native_batch_norm_legit.default, aten.native_batch_norm.default)
def native_batch_norm_rule(
    needs: Any,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """[N, C, *S], 4 times [C] -> [N, C, *S], mean [C], rstd [C] (empty in evaluation)."""
    outs = followed(
        aten.native_batch_norm.default,
        *(x, weight, bias, running_mean, running_var, training, momentum, eps),
    )
    # The running statistics are only read in evaluation; in training they have just been written.
    fixed = (None, None) if training else (running_mean, running_var)
    residuals = (x, weight, *fixed, outs[1], outs[2], training, eps)
    return outs, residuals, _batch_norm_pullback


def _batch_norm_pullback(residuals: Any, needs: Any, ct: Any, mean_ct: Any, rstd_ct: Any) -> Any:
    x, weight, running_mean, running_var, mean, rstd, training, eps = residuals
    cts = (None, None, None)
    if ct is not None:
        statistics = (running_mean, running_var, mean, rstd, training, eps)
        cts = followed(
            aten.native_batch_norm_backward.default, ct, x, weight, *statistics, list(needs[:3])
        )
    if training and needs[0] and (mean_ct is not None or rstd_ct is not None):
        shape, dims = _over_channels(x)
        seen = [_shaped(value, shape) for value in (mean, rstd, mean_ct, rstd_ct)]
        cts = (_plus(cts[0], _as(_of_statistics(x, *seen, dims), x)), *cts[1:])
    return (*cts, None, None)


def _fixed(running_mean: Any, running_var: Any, mean: Any, rstd: Any, live: bool, eps: Any) -> Any:
    """The statistics in force."""
    return (mean, rstd) if live else (running_mean, (running_var + eps).rsqrt())


@jvp_rule(aten._native_batch_norm_legit.default, aten.native_batch_norm.default)
def native_batch_norm_jvp(
    tangents: Any,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """[N, C, *S], 4 times [C] -> [N, C, *S], mean [C], rstd [C] (empty in evaluation)."""
    x_t, weight_t, bias_t, *_ = tangents
    outs = followed(
        aten.native_batch_norm.default,
        *(x, weight, bias, running_mean, running_var, training, momentum, eps),
    )
    if x_t is None and weight_t is None and bias_t is None:
        return outs, (None, None, None)
    shape, dims = _over_channels(x)
    found = _fixed(running_mean, running_var, outs[1], outs[2], training, eps)
    mean, rstd = (_shaped(value, shape) for value in found)
    seen = (x_t, _shaped(weight_t, shape), _shaped(bias_t, shape))
    out_t = _normalised_t(x, mean, rstd, _shaped(weight, shape), seen, dims, training)
    mean_t = rstd_t = None
    if training and x_t is not None:
        both = _statistics_t(x, mean, rstd, x_t, dims)
        mean_t, rstd_t = (value.reshape(outs[1].shape) for value in both)
    return outs, (_as(out_t, x), mean_t, rstd_t)


@whole(aten.native_batch_norm_backward.default)
@vjp_rule(aten.native_batch_norm_backward.default)
def native_batch_norm_backward_rule(
    needs: Any,
    ct: Any,
    x: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    save_mean: Any,
    save_invstd: Any,
    train: bool,
    eps: float,
    output_mask: Any,
) -> Any:
    """ct, x, weight and statistics -> x_ct, weight_ct, bias_ct."""
    statistics = (running_mean, running_var, save_mean, save_invstd)
    out = followed(
        aten.native_batch_norm_backward.default,
        *(ct, x, weight, *statistics, train, eps, output_mask),
    )
    residuals = (ct, x, weight, *statistics, train, eps)
    return out, residuals, _native_batch_norm_backward_pullback


def _native_batch_norm_backward_pullback(
    residuals: Any, needs: Any, x_cc: Any, weight_cc: Any, bias_cc: Any
) -> Any:
    ct, x, weight, running_mean, running_var, mean, rstd, live, eps = residuals
    shape, dims = _over_channels(x)
    mean, rstd = _fixed(running_mean, running_var, mean, rstd, live, eps)
    given = (ct, x, *(_shaped(value, shape) for value in (mean, rstd, weight)))
    cts = (x_cc, _shaped(weight_cc, shape), _shaped(bias_cc, shape))
    wanted = (needs[0], needs[1], needs[5], needs[6], needs[2])
    found = _second(given, wanted, cts, dims, live)
    ct_ct, x_ct, mean_ct, rstd_ct, weight_ct = _each_as(found, (ct, x, mean, rstd, weight))
    if not live:
        mean_ct = rstd_ct = None
    return ct_ct, x_ct, weight_ct, None, None, mean_ct, rstd_ct


@decomposition(aten.batch_norm_backward.default)
def batch_norm_backward(
    grad_out: Any,
    input: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    save_mean: Any,
    save_var: Any,
    update: bool,
    eps: float,
    output_mask: Any,
    reserve: Any,
) -> Any:
    """The backward of any backend; what its kernel has reserved is not needed here.

    PyTorch's formula gives the saved statistics no cotangent, so they are computed again.
    """
    if update:
        outs = aten.native_batch_norm.default(input, weight, None, None, None, True, 0.0, eps)
        _, save_mean, save_var = outs
    statistics = (running_mean, running_var, save_mean, save_var)
    return aten.native_batch_norm_backward.default(
        grad_out, input, weight, *statistics, update, eps, output_mask
    )


@decomposition(aten.cudnn_batch_norm_backward.default)
def cudnn_batch_norm_backward(
    input: Any,
    grad_output: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    save_mean: Any,
    save_var: Any,
    epsilon: float,
    reserveSpace: Any,
) -> Any:
    """The same for training, with the arguments in another order."""
    statistics = (running_mean, running_var, save_mean, save_var)
    return batch_norm_backward(
        grad_output, input, weight, *statistics, True, epsilon, [True, True, True], reserveSpace
    )


# -- the same under other names --------------------------------------------------------------------


def _native(*args: Any) -> Any:
    return followed(aten.native_batch_norm.default, *args)


@whole_in(aten._native_batch_norm_legit.no_stats)
@decomposition(aten._native_batch_norm_legit.no_stats)
def batch_norm_without_statistics(
    x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> Any:
    """[N, C, *S], twice [C] -> [N, C, *S], mean [C], rstd [C]."""
    return _native(x, weight, bias, None, None, training, momentum, eps)


@whole_in(aten._native_batch_norm_legit_no_training.default)
@decomposition(aten._native_batch_norm_legit_no_training.default)
def batch_norm_in_evaluation(x: Any, *parameters_and_momentum: Any) -> Any:
    """[N, C, *S], 4 times [C] -> [N, C, *S], and two empty tensors."""
    *parameters, momentum, eps = parameters_and_momentum
    return _native(x, *parameters, False, momentum, eps)


@whole_in(aten._native_batch_norm_legit_functional.default)
@decomposition(aten._native_batch_norm_legit_functional.default)
def batch_norm_functional(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> Any:
    """[N, C, *S], 4 times [C] -> as `native_batch_norm`, and the new running statistics."""
    new = (mean.clone(), var.clone())
    return *_native(x, weight, bias, *new, training, momentum, eps), *new


def _reserved(x: Any) -> Any:
    """What a backend keeps for its backward, which is not used here."""
    return x.new_empty([0], dtype=torch.uint8)


@whole_in(aten._batch_norm_no_update.default)
@decomposition(aten._batch_norm_no_update.default)
def batch_norm_no_update(x: Any, *rest: Any) -> Any:
    """[N, C, *S], 4 times [C] -> [N, C, *S], two empty tensors and the reserve."""
    return *batch_norm_in_evaluation(x, *rest), _reserved(x)


@whole_in(aten._batch_norm_with_update.default)
@decomposition(aten._batch_norm_with_update.default)
def batch_norm_with_update(x: Any, *parameters_and_momentum: Any) -> Any:
    """[N, C, *S], 4 times [C] -> [N, C, *S], mean [C], rstd [C], and the reserve."""
    *parameters, momentum, eps = parameters_and_momentum
    return *_native(x, *parameters, True, momentum, eps), _reserved(x)


@whole_in(aten._batch_norm_with_update_functional.default)
@decomposition(aten._batch_norm_with_update_functional.default)
def batch_norm_with_update_functional(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    """[N, C, *S], 4 times [C] -> as `_batch_norm_with_update`, and the new running statistics."""
    new = (mean.clone(), var.clone())
    return *batch_norm_with_update(x, weight, bias, *new, momentum, eps), *new


# -- RMS norm --------------------------------------------------------------------------------------


@vjp_rule(aten.rms_norm.default)
def rms_norm_rule(
    needs: Any, x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    """[*B, *S], S, [*S] -> [*B, *S]; half precision is normalised in float32."""
    wide, rstd, dims = _rms(x, normalized_shape, eps)
    out = wide * rstd
    out = _as(out if weight is None else out * weight, x)
    return out, (x, rstd, weight, dims), _rms_norm_pullback


def _rms(x: Any, normalized_shape: Any, eps: float | None) -> Any:
    """X in float32 at least, the reciprocal of its root mean square, and the dims that is over.

    Raises:
        RuntimeError: The last dims of x are not of the shape.
    """
    inner = x.shape[max(x.dim() - len(normalized_shape), 0) :]
    if not normalized_shape or tuple(inner) != tuple(normalized_shape):
        raise RuntimeError(f"rms_norm over {[*normalized_shape]} of shape {[*x.shape]}")
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    wide = widened(x)
    if eps is None:
        eps = torch.finfo(wide.dtype).eps
    return wide, (_square(wide).mean(dims, keepdim=True) + eps).rsqrt(), dims


def _square(x: Any) -> Any:
    return x * x  # a complex x too: that is what PyTorch's norm of complex values does


def _rms_norm_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    x, rstd, weight, dims = residuals
    wide, factor = _as(x, rstd), rstd
    xhat = wide * factor
    x_ct = weight_ct = None
    if needs[0]:
        dy = ct if weight is None else ct * conj(weight)
        slope = (dy * conj(xhat)).mean(dims, keepdim=True)
        x_ct = _as(conj(factor) * (dy - conj(xhat) * slope), x)
    if needs[1]:
        weight_ct = _as(unbroadcast(ct * conj(xhat), weight.shape), weight)
    return x_ct, weight_ct


@jvp_rule(aten.rms_norm.default)
def rms_norm_jvp(
    tangents: Any, x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    """[*B, *S], S, [*S] -> [*B, *S]."""
    x_t, weight_t = tangents
    wide, rstd, dims = _rms(x, normalized_shape, eps)
    xhat = wide * rstd
    out = _as(xhat if weight is None else xhat * weight, x)
    out_t = None
    if x_t is not None:
        out_t = rstd * (x_t - xhat * (x_t * xhat).mean(dims, keepdim=True))
        out_t = out_t if weight is None else out_t * weight
    if weight_t is not None:
        out_t = _plus(out_t, xhat * weight_t)
    return out, _as(out_t, x)
