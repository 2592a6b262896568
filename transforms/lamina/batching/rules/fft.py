"""Batching rules of Fourier transforms: PyTorch's three primitives take lists of dims.

All of `torch.fft` is composed of them, of padding and of slicing; the composites take dims as well,
and cost one call when they are batched whole.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import (
    EmptyBatchError,
    batch_first,
    logical_rank,
    pad_rank,
    physical_dims,
)
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten


def _dims(info: Any, dim: Any, x: Any, x_bdim: int) -> list[int]:
    if not info.batch_size:  # the libraries below refuse to plan for no signals
        raise EmptyBatchError
    return physical_dims(dim, x, x_bdim)


@batching_rule(aten._fft_r2c.default)
def fft_r2c(info: Any, in_dims: Any, x: Any, dim: Any, normalization: int, onesided: bool) -> Any:
    """[B, *S] -> [B, *S with the last of dim halved if onesided]."""
    dims = _dims(info, dim, x, in_dims[0])
    return aten._fft_r2c(x, dims, normalization, onesided), in_dims[0]


@batching_rule(aten._fft_c2r.default)
def fft_c2r(
    info: Any, in_dims: Any, x: Any, dim: Any, normalization: int, last_dim_size: int
) -> Any:
    """[B, *S] -> [B, *S with last_dim_size as the last of dim]."""
    dims = _dims(info, dim, x, in_dims[0])
    return aten._fft_c2r(x, dims, normalization, last_dim_size), in_dims[0]


@batching_rule(aten._fft_c2c.default)
def fft_c2c(info: Any, in_dims: Any, x: Any, dim: Any, normalization: int, forward: bool) -> Any:
    """[B, *S] -> [B, *S]."""
    dims = _dims(info, dim, x, in_dims[0])
    return aten._fft_c2c(x, dims, normalization, forward), in_dims[0]


# -- what is composed of them, where nothing but dims has to be told ------------------------------

_ONE_DIM = [  # (x, n, dim, norm)
    aten.fft_fft.default,
    aten.fft_hfft.default,
    aten.fft_ifft.default,
    aten.fft_ihfft.default,
    aten.fft_irfft.default,
    aten.fft_rfft.default,
]
_TWO_DIMS = [  # (x, sizes, dims, norm)
    aten.fft_fft2.default,
    aten.fft_hfft2.default,
    aten.fft_ifft2.default,
    aten.fft_ihfft2.default,
    aten.fft_irfft2.default,
    aten.fft_rfft2.default,
]
_MANY_DIMS = [  # (x, sizes, dims, norm): without dims the last ones, or all of them
    aten.fft_fftn.default,
    aten.fft_hfftn.default,
    aten.fft_ifftn.default,
    aten.fft_ihfftn.default,
    aten.fft_irfftn.default,
    aten.fft_rfftn.default,
]


def _register_one_dim(op: Any) -> None:
    @batching_rule(op, state="family")
    def one_dim(
        info: Any, in_dims: Any, x: Any, n: int | None = None, dim: int = -1, norm: Any = None
    ) -> Any:
        """[B, *S] -> [B, *S with another size at dim]"""
        if not logical_rank(x, in_dims[0]):
            return NotImplemented
        (at,) = _dims(info, [dim], x, in_dims[0])
        return op(x, n, at, norm), in_dims[0]


def _register_dims(op: Any, default: Any) -> None:
    @batching_rule(op, state="family")
    def dims(
        info: Any, in_dims: Any, x: Any, s: Any = None, dim: Any = default, norm: Any = None
    ) -> Any:
        """[B, *S] -> [B, *S with other sizes at dim]"""
        rank = logical_rank(x, in_dims[0])
        if dim is None:
            dim = range(-rank if s is None else -len(s), 0)
        if rank < max(len(dim), 1):
            return NotImplemented
        return op(x, s, _dims(info, dim, x, in_dims[0]), norm), in_dims[0]


for _op in _ONE_DIM:
    _register_one_dim(_op)
for _op in _TWO_DIMS:
    _register_dims(_op, (-2, -1))
for _op in _MANY_DIMS:
    _register_dims(_op, None)


# -- windows ---------------------------------------------------------------------------------------


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
    if not info.batch_size:
        raise EmptyBatchError
    window_bdim = in_dims[4] if len(in_dims) > 4 else None
    if window_bdim is not None:
        hop = hop_length if hop_length is not None else n_fft // 4
        span = window.shape[-1] if align_to_window else n_fft
        window = batch_first(window, window_bdim)
        frames = _frames(x, in_dims[0], window, n_fft, hop, span)
        if onesided is None:
            onesided = not frames.is_complex()
        transform = torch.fft.rfft if onesided else torch.fft.fft
        out = transform(frames, norm="ortho" if normalized else None).transpose(-1, -2)
        return (out if return_complex else torch.view_as_real(out)), 0
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


def _frames(x: Any, x_bdim: int | None, window: Any, n_fft: int, hop: int, span: int) -> Any:
    """[B, *S, T], [B, W] -> [B, *S, frames, n_fft], each frame of `span` times its window."""
    x = batch_first(x, x_bdim)
    frames = x.unfold(-1, span, hop)
    rank = logical_rank(frames, None if x_bdim is None else 0)
    frames = frames * pad_rank(_centred(window, span), 0, rank)
    return _centred(frames, n_fft)


def _centred(x: Any, length: int) -> Any:
    """Zeros on both sides of the last dim, up to a length."""
    left = (length - x.shape[-1]) // 2
    return aten.constant_pad_nd(x, [left, length - x.shape[-1] - left])
