"""Derivatives of pooling, and of sampling at given points.

Average pools are linear: op and `*_backward` op are each other's transpose, and nothing but a shape
is kept. Maximum pools pick elements: the indices are kept, tangents are gathered with them, and so
are second cotangents. `grid_sample` is linear in the image, of which only a shape is kept where
the points have no derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lamina.autodiff.declare import jvp_rule, linear, vjp_rule
from lamina.autodiff.shapes import stand_in
from lamina_core.overloads import aten

# -- averages --------------------------------------------------------------------------------------


def _average(op: Any, backward_op: Any) -> None:
    """Declare `avg_pool` and its backward op as transposes of each other."""

    def spread(
        ct: Any,
        x_shape: Any,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        ceil_mode: Any,
        count_include_pad: Any,
        divisor_override: Any,
    ) -> Any:
        shown = stand_in(ct, x_shape)
        options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return backward_op(ct, shown, *options)

    def gathered(
        ct: Any,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        ceil_mode: Any,
        count_include_pad: Any,
        divisor_override: Any,
    ) -> Any:
        return op(ct, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    linear(op, spread)
    linear(backward_op, gathered)


_average(aten.avg_pool2d.default, aten.avg_pool2d_backward.default)
_average(aten.avg_pool3d.default, aten.avg_pool3d_backward.default)


def _adaptive_average(op: Any, backward_op: Any, rank: int) -> None:
    linear(op, lambda ct, x_shape: backward_op(ct, stand_in(ct, x_shape)))
    linear(backward_op, lambda ct, x_shape: op(ct, x_shape[-rank:]))


_adaptive_average(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default, 2)
_adaptive_average(aten._adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d_backward.default, 3)


# -- maxima ----------------------------------------------------------------------------------------


def _picked(x: Any, indices: Any, rank: int) -> Any:
    """[*B, *S], indices [*B, *T] into the flattened S -> [*B, *T]."""
    return x.flatten(-rank).gather(-1, indices.flatten(-rank)).reshape(indices.shape)


def _maximum(op: Any, backward_op: Any, rank: int, order: Callable[..., tuple[Any, ...]]) -> None:
    """Register a max pool `(x, *options) -> (out, indices)` and its backward op.

    `order(indices, options)` gives what the backward op takes behind `(ct, x)`.
    """

    @vjp_rule(op)
    def rule(needs: Any, x: Any, *options: Any) -> Any:
        out, indices = op(x, *options)
        return (out, indices), (x, indices, options, backward_op, order), _maximum_pullback

    @jvp_rule(op)
    def pushforward(tangents: Any, x: Any, *options: Any) -> Any:
        out, indices = op(x, *options)
        return (out, indices), (_picked(tangents[0], indices, rank), None)

    linear(backward_op, lambda ct, indices: _picked(ct, indices, rank))


def _maximum_pullback(residuals: Any, needs: Any, ct: Any, indices_ct: Any) -> Any:
    x, indices, options, backward_op, order = residuals
    return (None if ct is None else backward_op(ct, x, *order(indices, options)),)


def _window(indices: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """kernel_size, stride, padding, dilation, ceil_mode, each where it was given, then indices."""
    defaults = (None, [], 0, 1, False)
    return (*options, *defaults[len(options) :], indices)


def _adaptive(indices: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    return (indices,)


_maximum(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool2d_backward.default, 2, _adaptive)
_maximum(aten.adaptive_max_pool3d.default, aten.adaptive_max_pool3d_backward.default, 3, _adaptive)
_maximum(
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    2,
    _window,
)
_maximum(
    aten.max_pool3d_with_indices.default,
    aten.max_pool3d_with_indices_backward.default,
    3,
    _window,
)


# -- sampling --------------------------------------------------------------------------------------


def _grid_sampler(op: Any, backward_op: Any) -> None:
    @vjp_rule(op)
    def rule(needs: Any, x: Any, grid: Any, *settings: Any) -> Any:
        """[N, C, *S], [N, *S', d] -> [N, C, *S']"""
        residuals = (x if needs[1] else None, x.shape, grid, settings, backward_op)
        return op(x, grid, *settings), residuals, _grid_sampler_pullback


def _grid_sampler_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    x, shape, grid, settings, backward_op = residuals
    if x is None:
        x = stand_in(ct, shape)
    return backward_op(ct, x, grid, *settings, list(needs))


_grid_sampler(aten.grid_sampler_2d.default, aten.grid_sampler_2d_backward.default)
_grid_sampler(aten.grid_sampler_3d.default, aten.grid_sampler_3d_backward.default)
