"""Batching rules of Fourier transforms: PyTorch's three primitives take lists of dims.

All of `torch.fft` is composed of them, of padding and of slicing.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.vmap.dims import physical_dims
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
