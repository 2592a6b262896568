"""Batching rules of Fourier transforms: PyTorch's three primitives take lists of dims.

All of `torch.fft` is composed of them, of padding and of slicing.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.vmap.dims import batch_first, physical_dims
from lamina.vmap.fallback import loop_over_examples
from lamina.vmap.table import batching_rule

aten = torch.ops.aten


@batching_rule(aten._fft_r2c.default)
def fft_r2c(info: Any, in_dims: Any, x: Any, dim: Any, normalization: int, onesided: bool) -> Any:
    """[B, *S] -> [B, *S with the last of dim halved if onesided]."""
    dims = physical_dims(dim, x, in_dims[0])
    return aten._fft_r2c(x, dims, normalization, onesided), in_dims[0]


@batching_rule(aten._fft_c2r.default)
def fft_c2r(
    info: Any, in_dims: Any, x: Any, dim: Any, normalization: int, last_dim_size: int
) -> Any:
    """[B, *S] -> [B, *S with last_dim_size as the last of dim]."""
    dims = physical_dims(dim, x, in_dims[0])
    return aten._fft_c2r(x, dims, normalization, last_dim_size), in_dims[0]


@batching_rule(aten._fft_c2c.default)
def fft_c2c(info: Any, in_dims: Any, x: Any, dim: Any, normalization: int, forward: bool) -> Any:
    """[B, *S] -> [B, *S]."""
    dims = physical_dims(dim, x, in_dims[0])
    return aten._fft_c2c(x, dims, normalization, forward), in_dims[0]


@batching_rule(aten.stft.default)
def stft(
    info: Any,
    in_dims: Any,
    x: Any,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Any = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Any:
    """[B, *S, T] -> [B, *S, frequencies, frames]. ATen takes at most one dim in front of T."""
    window_bdim = in_dims[4] if len(in_dims) > 4 else None
    if window_bdim is not None:
        return loop_over_examples(
            info.interpreter,
            aten.stft.default,
            [
                x,
                n_fft,
                hop_length,
                win_length,
                window,
                normalized,
                onesided,
                return_complex,
                align_to_window,
            ],
            (in_dims[0], *[None] * 3, window_bdim, *[None] * 4),
            {},
            {},
        )
    x = batch_first(x, in_dims[0])
    out = aten.stft(
        x.reshape(torch.Size(x.shape[:-1]).numel(), x.shape[-1]),
        n_fft,
        hop_length,
        win_length,
        window,
        normalized,
        onesided,
        return_complex,
        align_to_window,
    )
    return out.reshape(*x.shape[:-1], *out.shape[1:]), 0
