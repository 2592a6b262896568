"""Batching rules of pooling, resampling and rearranging images.

They all map [N, C, *S], and most also [C, *S]: the batch dim joins N, or becomes it.
"""

from __future__ import annotations

from typing import Any

from lamina.batching.dims import (
    EmptyBatchError,
    batch_first,
    ensure_batched,
    fold,
    logical_rank,
    unfold,
)
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten
from lamina_core.schema import facts

# One op a line; the number of spatial dims of its first argument. All tensors share N.
_SPATIAL = {
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool2d_backward.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
    aten._adaptive_avg_pool3d_backward.default: 3,
    aten._upsample_bicubic2d_aa.default: 2,
    aten._upsample_bicubic2d_aa.vec: 2,
    aten._upsample_bilinear2d_aa.default: 2,
    aten._upsample_bilinear2d_aa.vec: 2,
    aten._upsample_lanczos2d_aa.default: 2,
    aten._upsample_lanczos2d_aa.vec: 2,
    aten._upsample_nearest_exact1d.default: 1,
    aten._upsample_nearest_exact1d.vec: 1,
    aten._upsample_nearest_exact2d.default: 2,
    aten._upsample_nearest_exact2d.vec: 2,
    aten._upsample_nearest_exact3d.default: 3,
    aten._upsample_nearest_exact3d.vec: 3,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool2d_backward.default: 2,
    aten.adaptive_max_pool3d.default: 3,
    aten.adaptive_max_pool3d_backward.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool2d_backward.default: 2,
    aten.avg_pool3d.default: 3,
    aten.avg_pool3d_backward.default: 3,
    aten.col2im.default: 1,
    aten.fractional_max_pool2d_backward.default: 2,
    aten.fractional_max_pool3d_backward.default: 3,
    aten.im2col.default: 2,
    aten.max_pool1d.default: 1,
    aten.max_pool1d_with_indices.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool2d_with_indices_backward.default: 2,
    aten.max_pool3d.default: 3,
    aten.max_pool3d_with_indices.default: 3,
    aten.max_pool3d_with_indices_backward.default: 3,
    aten.max_unpool2d.default: 2,
    aten.max_unpool3d.default: 3,
    aten.reflection_pad1d.default: 1,
    aten.reflection_pad1d_backward.default: 1,
    aten.reflection_pad2d.default: 2,
    aten.reflection_pad2d_backward.default: 2,
    aten.reflection_pad3d.default: 3,
    aten.reflection_pad3d_backward.default: 3,
    aten.replication_pad1d.default: 1,
    aten.replication_pad1d_backward.default: 1,
    aten.replication_pad2d.default: 2,
    aten.replication_pad2d_backward.default: 2,
    aten.replication_pad3d.default: 3,
    aten.replication_pad3d_backward.default: 3,
    aten.upsample_bicubic2d.default: 2,
    aten.upsample_bicubic2d.vec: 2,
    aten.upsample_bilinear2d.default: 2,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_linear1d.default: 1,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_nearest1d.default: 1,
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_nearest2d.default: 2,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_nearest3d.default: 3,
    aten.upsample_nearest3d.vec: 3,
    aten.upsample_trilinear3d.default: 3,
    aten.upsample_trilinear3d.vec: 3,
}
# Backward ops whose third argument is the size of the input, N included.
_SIZED = [
    aten._upsample_bicubic2d_aa_backward.default,
    aten._upsample_bilinear2d_aa_backward.default,
    aten._upsample_lanczos2d_aa_backward.default,
    aten._upsample_nearest_exact1d_backward.default,
    aten._upsample_nearest_exact2d_backward.default,
    aten._upsample_nearest_exact3d_backward.default,
    aten.upsample_bicubic2d_backward.default,
    aten.upsample_bilinear2d_backward.default,
    aten.upsample_linear1d_backward.default,
    aten.upsample_nearest1d_backward.default,
    aten.upsample_nearest2d_backward.default,
    aten.upsample_nearest3d_backward.default,
    aten.upsample_trilinear3d_backward.default,
]


def _into_n(info: Any, in_dims: Any, op: Any, spatial: int, args: Any, kwargs: Any) -> Any:
    """Run `op` with the batch dim of every tensor in N."""
    size = info.batch_size
    has_n = logical_rank(args[0], in_dims[0]) > spatial + 1
    if size and not has_n and not args[0].numel():
        raise EmptyBatchError  # some kernels take no channels where there is no N, and only there
    values = list(args)
    places = facts(op).tensor_args
    for at in places:
        value = args[at]
        join = (
            fold(value, in_dims[at], 0, size) if has_n else ensure_batched(value, in_dims[at], size)
        )
        # Some kernels of several tensors read their memory, whatever the strides.
        values[at] = join.contiguous() if len(places) > 1 else join
    out = op(*values, **kwargs)
    if not has_n:
        return out, 0
    if isinstance(out, (tuple, list)):
        return tuple(unfold(o, 0, size) for o in out), 0
    return unfold(out, 0, size), 0


def _register_spatial(op: Any, spatial: int) -> None:
    @batching_rule(op, state="family")
    def into_n(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, N, C, *S] -> [B, N, C, *S'], or the same without N."""
        return _into_n(info, in_dims, op, spatial, args, kwargs)


def _register_sized(op: Any) -> None:
    @batching_rule(op, state="family")
    def sized(
        info: Any, in_dims: Any, ct: Any, output_size: Any, input_size: Any, *rest: Any
    ) -> Any:
        """[B, N, C, *S'] -> [B, N, C, *S]"""
        n, *others = input_size
        size = info.batch_size
        out = op(fold(ct, in_dims[0], 0, size), output_size, [size * n, *others], *rest)
        return unfold(out, 0, size), 0


for _op, _spatial in _SPATIAL.items():
    _register_spatial(_op, _spatial)
for _op in _SIZED:
    _register_sized(_op)


@batching_rule(aten.affine_grid_generator.default)
def affine_grid_generator(
    info: Any, in_dims: Any, theta: Any, size: Any, align_corners: bool
) -> Any:
    """[B, N, d, d + 1] -> [B, N, *S, d]"""
    n, *others = size
    theta = fold(theta, in_dims[0], 0, info.batch_size)
    out = aten.affine_grid_generator(theta, [info.batch_size * n, *others], align_corners)
    return unfold(out, 0, info.batch_size), 0


@batching_rule(aten.channel_shuffle.default)
def channel_shuffle(info: Any, in_dims: Any, x: Any, groups: int) -> Any:
    """[B, N, C, *S] -> [B, N, C, *S]"""
    out = aten.channel_shuffle(fold(x, in_dims[0], 0, info.batch_size), groups)
    return unfold(out, 0, info.batch_size), 0


def _register_fractional(op: Any, spatial: int) -> None:
    @batching_rule(op, state="family")
    def fractional_max_pool(
        info: Any, in_dims: Any, x: Any, kernel_size: Any, output_size: Any, samples: Any
    ) -> Any:
        """[B, N, C, *S], [B, N, C, d] -> [B, N, C, *S'], twice. Samples always have N."""
        size = info.batch_size
        has_n = logical_rank(x, in_dims[0]) > spatial + 1
        x = fold(x, in_dims[0], 0, size) if has_n else ensure_batched(x, in_dims[0], size)
        samples = fold(samples, in_dims[3], 0, size)
        outs = op(x, kernel_size, output_size, samples)
        return tuple(unfold(out, 0, size) if has_n else out for out in outs), 0


_register_fractional(aten.fractional_max_pool2d.default, 2)
_register_fractional(aten.fractional_max_pool3d.default, 3)


def _register_grid_sampler(op: Any, op_backward: Any) -> None:
    @batching_rule(op, state="family")
    def grid_sampler(
        info: Any, in_dims: Any, x: Any, grid: Any, mode: int, padding: int, corners: bool
    ) -> Any:
        """[B, N, C, *S], [B, N, *S', d] -> [B, N, C, *S']. Shared operands are not copied."""
        size = info.batch_size
        x_bdim, grid_bdim = in_dims[:2]
        if grid_bdim is None:  # more channels
            out = op(fold(x, x_bdim, 1, size), grid, mode, padding, corners)
            return unfold(out, 1, size), 1
        if x_bdim is None:  # more points
            out = op(x, fold(grid, grid_bdim, 1, size), mode, padding, corners)
            return unfold(out, 2, size), 2
        x, grid = fold(x, x_bdim, 0, size), fold(grid, grid_bdim, 0, size)
        return unfold(op(x, grid, mode, padding, corners), 0, size), 0

    @batching_rule(op_backward, state="family")
    def grid_sampler_backward(
        info: Any, in_dims: Any, ct: Any, x: Any, grid: Any, *rest: Any
    ) -> Any:
        """[B, N, C, *S'], [B, N, C, *S], [B, N, *S', d] -> those of x and of grid."""
        size = info.batch_size
        operands = (fold(v, d, 0, size) for v, d in zip((ct, x, grid), in_dims[:3], strict=True))
        outs = op_backward(*operands, *rest)
        return tuple(None if out is None else unfold(out, 0, size) for out in outs), 0


_register_grid_sampler(aten.grid_sampler_2d.default, aten.grid_sampler_2d_backward.default)
_register_grid_sampler(aten.grid_sampler_3d.default, aten.grid_sampler_3d_backward.default)


# ATen hands back what is empty as it is, of the wrong shape.


@batching_rule(aten.pixel_shuffle.default)
def pixel_shuffle(info: Any, in_dims: Any, x: Any, factor: int) -> Any:
    """[B, *N, C, h, w] -> [B, *N, C', h', w']: takes any leading dims."""
    if not info.batch_size:
        raise EmptyBatchError
    return aten.pixel_shuffle(batch_first(x, in_dims[0]), factor), 0


@batching_rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(info: Any, in_dims: Any, x: Any, factor: int) -> Any:
    """[B, *N, C, h, w] -> [B, *N, C', h', w']: takes any leading dims."""
    if not info.batch_size:
        raise EmptyBatchError
    return aten.pixel_unshuffle(batch_first(x, in_dims[0]), factor), 0
