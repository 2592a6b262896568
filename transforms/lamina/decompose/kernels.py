"""Kernels of one device or backend as the op that stands for them on all; for every transform.

Graphs that were exported or lowered call them by name. The op in their stead may pick the very same
kernel again, once it runs on plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina_core.overloads import aten

__all__ = ["KERNELS"]


# -- convolutions ----------------------------------------------------------------------------------

# (x, weight, bias, stride, ...) in an order of their own, which the schema tells.
_CONVOLUTIONS = [
    aten._conv_depthwise2d.default,
    aten._convolution.default,
    aten._mps_convolution.default,
    aten._mps_convolution_transpose.default,
    aten._nnpack_spatial_convolution.default,
    aten._slow_conv2d_forward.default,
    aten.conv_depthwise3d.default,
    aten.convolution_overrideable.default,
    aten.cudnn_convolution.default,
    aten.cudnn_convolution_add_relu.default,
    aten.cudnn_convolution_relu.default,
    aten.cudnn_convolution_transpose.default,
    aten.miopen_convolution.default,
    aten.miopen_convolution_add_relu.default,
    aten.miopen_convolution_relu.default,
    aten.miopen_convolution_transpose.default,
    aten.miopen_depthwise_convolution.default,
    aten.mkldnn_convolution.default,
    aten.slow_conv3d_forward.default,
    aten.slow_conv_dilated2d.default,
    aten.slow_conv_dilated3d.default,
    aten.slow_conv_transpose2d.default,
    aten.slow_conv_transpose3d.default,
]
_CONVOLUTION_BACKWARDS = [
    aten._slow_conv2d_backward.output_mask,
    aten.convolution_backward_overrideable.default,
    aten.mps_convolution_backward.default,
    aten.mps_convolution_transpose_backward.default,
]
# Without an argument for the groups: each channel is one.
_DEPTHWISE = (aten._conv_depthwise2d.default, aten.conv_depthwise3d.default)
# Of one image, without N, where the others are an error.
_TAKES_ONE = (
    aten.slow_conv_dilated2d.default,
    aten.slow_conv_dilated3d.default,
    aten.slow_conv_transpose3d.default,
)


class _Convolution:
    """The arguments of one call of a kernel, by the names that the kernels share."""

    def __init__(self, op: Any, args: Any, kwargs: Any) -> None:
        schema = op._schema.arguments
        given = {a.name: a.default_value for a in schema if a.has_default_value()}
        given |= dict(zip([a.name for a in schema], args, strict=False)) | kwargs
        self.given = given
        self.weight: Any = given["weight"]
        self.rank = self.weight.dim() - 2
        x: Any = given.get("input", given.get("self"))
        self.single = op in _TAKES_ONE and x.dim() == self.rank + 1
        self.x = x.unsqueeze(0) if self.single else x
        self.groups = self.x.shape[1] if op in _DEPTHWISE else given.get("groups", 1)
        self.transposed = given.get("transposed", "transpose" in op._schema.name)

    def settings(self) -> tuple[Any, ...]:
        """What `aten.convolution` takes behind the bias."""
        lists = (self.whole("stride", 1), self.whole("padding", 0), self.whole("dilation", 1))
        return (*lists, self.transposed, self.whole("output_padding", 0), self.groups)

    def whole(self, name: str, otherwise: int) -> list[int]:
        """An entry for each spatial dim."""
        entries = list(self.given.get(name, [otherwise]))
        return entries * self.rank if len(entries) == 1 else entries


def _forward(op: Any) -> Callable[..., Any]:
    def convolution(*args: Any, **kwargs: Any) -> Any:
        """[N, C, *S], [O, C / groups, *K], [O] -> [N, O, *S']; added to and cut off, for some."""
        call = _Convolution(op, args, kwargs)
        bias = call.given.get("bias")
        out = aten.convolution.default(call.x, call.weight, bias, *call.settings())
        if call.single:
            out = out.squeeze(0)
        if "z" in call.given:
            alpha = call.given["alpha"]
            out = torch.add(out, call.given["z"], alpha=1 if alpha is None else alpha)
        return out.relu() if op._schema.name.endswith("relu") else out

    return convolution


def _backward(op: Any) -> Callable[..., Any]:
    def convolution_backward(*args: Any, **kwargs: Any) -> Any:
        """[N, O, *S'], [N, C, *S], [O, C / groups, *K] -> those of x, weight and perhaps bias."""
        call = _Convolution(op, args, kwargs)
        ct, wanted = call.given["grad_output"], list(call.given["output_mask"])
        mask = [*wanted, False][:3]
        outs = aten.convolution_backward.default(
            ct, call.x, call.weight, [ct.shape[1]] if mask[2] else None, *call.settings(), mask
        )
        return tuple(outs)[: len(wanted)]

    return convolution_backward


# -- others ----------------------------------------------------------------------------------------


def _batch_norm_update_stats(
    input: Any, running_mean: Any, running_var: Any, momentum: float
) -> tuple[Any, Any]:
    """[N, C, *S] -> [C], [C]. Writes to the running statistics, which its schema does not say."""
    others = [dim for dim in range(input.dim()) if dim != 1]
    mean, var = input.mean(others), input.var(others, correction=0)
    count = input.numel() // input.shape[1]
    unbiased = var * count / (count - 1)
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            running.mul_(1 - momentum).add_(new * momentum)
    return mean, var


def _affine_grid(theta: Any, N: int, C: int, H: int, W: int) -> Any:
    return aten.affine_grid_generator.default(theta, [N, C, H, W], True)


def _affine_grid_backward(grad: Any, N: int, C: int, H: int, W: int) -> Any:
    return aten.affine_grid_generator_backward.default(grad, [N, C, H, W], True)


def _cudnn_batch_norm(input: Any, *rest: Any) -> tuple[Any, ...]:
    """Writes to the running statistics; the last output, the backend's reserve, is not used."""
    return *aten.native_batch_norm.default(input, *rest), input.new_empty([0], dtype=torch.uint8)


def _cudnn_grid_sampler(self: Any, grid: Any) -> Any:
    return aten.grid_sampler.default(self, grid, 0, 0, True)


def _cudnn_grid_sampler_backward(self: Any, grid: Any, grad_output: Any) -> Any:
    op = aten.grid_sampler_2d_backward.default
    return op(grad_output, self, grid, 0, 0, True, [True, True])


def _grid_sampler_fallback(
    input: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Any:
    op = aten.grid_sampler_2d.default
    return op(input, grid, interpolation_mode, padding_mode, align_corners)


def _grid_sampler_fallback_backward(grad_output: Any, input: Any, grid: Any, *how: Any) -> Any:
    return aten.grid_sampler_2d_backward.default(grad_output, input, grid, *how, [True, True])


def _add_relu(self: Any, other: Any, alpha: Any = 1) -> Any:
    return torch.relu(torch.add(self, other, alpha=alpha))


def _linear_combination(input: Any, coefficients: Any) -> Any:
    """[N, *S], [M, N] -> [M, *S]."""
    return torch.tensordot(coefficients, input, 1)


def _heads_in(qkv: Any, qkv_bias: Any, num_heads: int) -> tuple[Any, ...]:
    """[N, T, 3 * H * D], [3 * H * D] -> [N, H, T, D], three times, the first of them scaled."""
    whole = (qkv + qkv_bias).unflatten(-1, (3, num_heads, -1)).movedim((-3, -2), (0, 2))
    q, k, v = whole.unbind(0)
    return q * q.shape[-1] ** -0.5, k, v


KERNELS: dict[Any, Callable[..., Any]] = {
    **{op: _forward(op) for op in _CONVOLUTIONS},
    **{op: _backward(op) for op in _CONVOLUTION_BACKWARDS},
    aten._add_relu.Scalar: _add_relu,
    aten._compute_linear_combination.default: _linear_combination,
    aten._grid_sampler_2d_cpu_fallback.default: _grid_sampler_fallback,
    aten._grid_sampler_2d_cpu_fallback_backward.default: _grid_sampler_fallback_backward,
    aten._lazy_clone.default: torch.clone,
    aten._masked_scale.default: lambda self, mask, scale: self * mask.to(self.dtype) * scale,
    aten._transform_bias_rescale_qkv.default: _heads_in,
    aten.batch_norm_update_stats.default: _batch_norm_update_stats,
    aten.cudnn_affine_grid_generator.default: _affine_grid,
    aten.cudnn_affine_grid_generator_backward.default: _affine_grid_backward,
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten.cudnn_grid_sampler.default: _cudnn_grid_sampler,
    aten.cudnn_grid_sampler_backward.default: _cudnn_grid_sampler_backward,
    aten.dequantize.tensors: lambda tensors: [x.dequantize() for x in tensors],
    aten.miopen_batch_norm.default: aten.native_batch_norm.default,
}
