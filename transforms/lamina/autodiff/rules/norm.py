"""Derivatives of normalisations: layer and group norm, and what batch norm shares with them.

All are one function seen through different reshapes: `xhat = (x - mean) * rstd`, with statistics
taken over some dims, and an affine map.

# NOTE [Statistics are operands]
The `*_backward` ops take mean and rstd as operands, and the rules here differentiate them as such,
while the rule of the forward op pulls the cotangents of mean and rstd back to x. Each rule is then
a plain partial derivative, and derivatives of every order come out exact; the rules of the
`*_backward` ops are in `norm_backward.py`. PyTorch's formulas take the statistics for functions of
x that need no cotangent: the user's autograd is therefore given ours (`lamina.autodiff.outside`).
"""

from __future__ import annotations

from typing import Any

from lamina.autodiff.declare import jvp_rule, vjp_rule
from lamina.autodiff.outside import whole
from lamina.autodiff.shapes import asked_outside
from lamina_core.dispatch import followed
from lamina_core.overloads import aten

# -- what the families share -----------------------------------------------------------------------


def _as(value: Any, like: Any) -> Any:
    """In the dtype of `like`: half-precision inputs meet float32 statistics."""
    return value if value is None or value.dtype is like.dtype else value.to(like.dtype)


def _plus(first: Any, second: Any) -> Any:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _size(shape: Any, dims: list[int]) -> Any:
    count = 1
    for dim in dims:
        count = count * shape[dim]
    return count


def _of_statistics(x: Any, mean: Any, rstd: Any, mean_ct: Any, rstd_ct: Any, dims: Any) -> Any:
    """The cotangent of x from those of its mean and rstd; `d rstd / d x = -rstd^2 xhat / n`."""
    total = None
    count = _size(x.shape, dims)
    if mean_ct is not None:
        total = (mean_ct / count).expand(x.shape)
    if rstd_ct is not None:
        total = _plus(total, (rstd_ct * rstd.pow(3) / -count) * (x - mean))
    return total


def _statistics_t(x: Any, mean: Any, rstd: Any, x_t: Any, dims: Any) -> tuple[Any, Any]:
    """The tangents of mean and rstd."""
    mean_t = x_t.mean(dims, keepdim=True)
    rstd_t = -rstd.pow(3) * ((x - mean) * x_t).mean(dims, keepdim=True)
    return mean_t, rstd_t


def _affine(xhat: Any, xhat_t: Any, weight: Any, weight_t: Any, bias_t: Any, shape: Any) -> Any:
    """The tangent of `xhat * weight + bias`."""
    total = xhat_t
    if total is not None and weight is not None:
        total = total * weight
    if weight_t is not None:
        total = _plus(total, xhat * weight_t)
    if bias_t is not None:
        total = _plus(total, bias_t.expand(shape))
    return total


def _shaped(value: Any, shape: Any) -> Any:
    return None if value is None else value.reshape(shape)


# -- layer norm ------------------------------------------------------------------------------------


def _last(x: Any, normalized_shape: Any) -> list[int]:
    return list(range(x.dim() - len(normalized_shape), x.dim()))


@vjp_rule(aten.layer_norm.default)
def layer_norm_rule(
    needs: Any,
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """[*B, *S], S, [*S], [*S] -> [*B, *S]."""
    (out, _, _), residuals, _ = native_layer_norm_rule(
        needs, x, normalized_shape, weight, bias, eps
    )
    return out, residuals, _layer_norm_pullback


@whole(aten.native_layer_norm.default)
@vjp_rule(aten.native_layer_norm.default)
def native_layer_norm_rule(
    needs: Any, x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float
) -> Any:
    """[*B, *S], S, [*S], [*S] -> [*B, *S], mean [*B, *1], rstd [*B, *1]."""
    outs = followed(aten.native_layer_norm.default, x, normalized_shape, weight, bias, eps)
    residuals = (x, normalized_shape, outs[1], outs[2], weight, bias)
    return outs, residuals, _layer_norm_pullback


def _layer_norm_pullback(
    residuals: Any, needs: Any, ct: Any, mean_ct: Any = None, rstd_ct: Any = None
) -> Any:
    x, shape, mean, rstd, weight, bias = residuals
    cts = (None, None, None)
    if ct is not None:
        cts = followed(
            aten.native_layer_norm_backward.default,
            *(ct, x, shape, mean, rstd, weight, bias, list(needs)),
        )
    if needs[0] and (mean_ct is not None or rstd_ct is not None):
        term = _of_statistics(x, mean, rstd, mean_ct, rstd_ct, _last(x, shape))
        cts = (_plus(cts[0], _as(term, x)), *cts[1:])
    return cts


def _layer_norm_jvp(tangents: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    x_t, weight_t, bias_t = tangents
    outs = followed(aten.native_layer_norm.default, x, shape, weight, bias, eps)
    _, mean, rstd = outs
    xhat_t = xhat = None
    if x_t is not None:
        # The Jacobian of x -> xhat is symmetric, so its pullback pushes tangents as well. Without a
        # weight to tell it by, the kernel takes statistics of the dtype of x alone.
        xhat_t = followed(
            aten.native_layer_norm_backward.default,
            *(_as(value, mean) for value in (x_t, x)),
            shape,
            mean,
            rstd,
            None,
            None,
            [True, False, False],
        )[0]
    if weight_t is not None:
        xhat = (x - mean) * rstd
    out_t = _as(_affine(xhat, xhat_t, weight, weight_t, bias_t, x.shape), x)
    return outs, (out_t, None, None)


@jvp_rule(aten.layer_norm.default)
def layer_norm_jvp(
    tangents: Any,
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """[*B, *S], S, [*S], [*S] -> [*B, *S]."""
    outs, outs_t = _layer_norm_jvp(tangents, x, normalized_shape, weight, bias, eps)
    return outs[0], outs_t[0]


@jvp_rule(aten.native_layer_norm.default)
def native_layer_norm_jvp(
    tangents: Any, x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float
) -> Any:
    """[*B, *S], S, [*S], [*S] -> [*B, *S], mean [*B, *1], rstd [*B, *1]."""
    outs, outs_t = _layer_norm_jvp(tangents, x, normalized_shape, weight, bias, eps)
    if tangents[0] is not None:
        dims = _last(x, normalized_shape)
        outs_t = (outs_t[0], *_statistics_t(x, outs[1], outs[2], tangents[0], dims))
    return outs, outs_t


# -- group norm ------------------------------------------------------------------------------------


class _Groups:
    """The reshapes under which a group norm is a normalisation over dims 2 and 3."""

    def __init__(self, batch: Any, channels: Any, area: Any, groups: int) -> None:
        self.full = (batch, groups, channels // groups, area)
        self.statistics = (batch, groups, 1, 1)
        self.channels = (1, groups, channels // groups, 1)

    def given(self, ct: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, ...]:
        return (
            _shaped(ct, self.full),
            _shaped(x, self.full),
            _shaped(mean, self.statistics),
            _shaped(rstd, self.statistics),
            _shaped(weight, self.channels),
        )


@vjp_rule(aten.native_group_norm.default)
def native_group_norm_rule(
    needs: Any,
    x: Any,
    weight: Any,
    bias: Any,
    N: Any,
    C: Any,
    HxW: Any,
    group: int,
    eps: float,
) -> Any:
    """[N, C, *S], [C], [C] -> [N, C, *S], mean [N, group], rstd [N, group]."""
    outs = aten.native_group_norm.default(x, weight, bias, N, C, HxW, group, eps)
    return outs, (x, outs[1], outs[2], weight, (N, C, HxW, group)), _group_norm_pullback


def _group_norm_pullback(residuals: Any, needs: Any, ct: Any, mean_ct: Any, rstd_ct: Any) -> Any:
    x, mean, rstd, weight, sizes = residuals
    cts: Any = (None, None, None)
    if ct is not None and asked_outside(ct, x, weight):
        cts = _group_norm_cts(residuals, needs, ct)
    elif ct is not None:
        cts = aten.native_group_norm_backward.default(
            ct.contiguous(), x, mean, rstd, weight, *sizes, list(needs)
        )
    if needs[0] and (mean_ct is not None or rstd_ct is not None):
        shapes = _Groups(*sizes)
        _, rows, mean, rstd, _ = shapes.given(None, x, mean, rstd, None)
        seen = (_shaped(mean_ct, shapes.statistics), _shaped(rstd_ct, shapes.statistics))
        term = _of_statistics(rows, mean, rstd, *seen, [2, 3])
        cts = (_plus(cts[0], _as(term, x).reshape(x.shape)), *cts[1:])
    return cts


def _group_norm_cts(residuals: Any, needs: Any, ct: Any) -> Any:
    """What `native_group_norm_backward` gives, by ops that PyTorch can differentiate."""
    *tensors, weight, sizes = residuals
    shapes = _Groups(*sizes)
    ct, rows, mean, rstd, scale = shapes.given(ct, *tensors, weight)
    xhat = (rows - mean) * rstd
    x_ct = weight_ct = bias_ct = None
    if needs[0]:
        dy = ct if scale is None else ct * scale
        inner = dy - dy.mean([2, 3], keepdim=True)
        x_ct = rstd * (inner - xhat * (dy * xhat).mean([2, 3], keepdim=True))
        x_ct = _as(x_ct, tensors[0]).reshape(tensors[0].shape)
    if needs[1]:
        weight_ct = _as((ct * xhat).sum([0, 3]).flatten(), weight)
    if needs[2]:
        bias_ct = ct.sum([0, 3]).flatten()
    return x_ct, weight_ct, bias_ct


@jvp_rule(aten.native_group_norm.default)
def native_group_norm_jvp(
    tangents: Any,
    x: Any,
    weight: Any,
    bias: Any,
    N: Any,
    C: Any,
    HxW: Any,
    group: int,
    eps: float,
) -> Any:
    """[N, C, *S], [C], [C] -> [N, C, *S], mean [N, group], rstd [N, group]."""
    x_t, weight_t, bias_t = tangents
    outs = aten.native_group_norm.default(x, weight, bias, N, C, HxW, group, eps)
    shapes = _Groups(N, C, HxW, group)
    x_t, rows, mean, rstd, weight = shapes.given(x_t, x, outs[1], outs[2], weight)
    out_t = _normalised_t(
        rows,
        mean,
        rstd,
        weight,
        (x_t, _shaped(weight_t, shapes.channels), _shaped(bias_t, shapes.channels)),
        [2, 3],
    )
    mean_t = rstd_t = None
    if x_t is not None:
        mean_t, rstd_t = _statistics_t(rows, mean, rstd, x_t, [2, 3])
        mean_t, rstd_t = mean_t.reshape(outs[1].shape), rstd_t.reshape(outs[2].shape)
    return outs, (_as(out_t, x).reshape(x.shape), mean_t, rstd_t)


def _normalised_t(
    x: Any, mean: Any, rstd: Any, weight: Any, tangents: Any, dims: Any, live: bool = True
) -> Any:
    """The tangent of an affine normalisation; `live` as in `_second`."""
    x_t, weight_t, bias_t = tangents
    xhat = (x - mean) * rstd
    xhat_t = None
    if x_t is not None:
        xhat_t = x_t
        if live:
            slope = (x_t * xhat).mean(dims, keepdim=True)
            xhat_t = x_t - x_t.mean(dims, keepdim=True) - xhat * slope
        xhat_t = xhat_t * rstd
    return _affine(xhat, xhat_t, weight, weight_t, bias_t, x.shape)
