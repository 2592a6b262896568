"""Derivatives of embedding: linear in the table, and its pullback linear in the cotangent.

The cotangent of a table is dense, also where `sparse=True` asks PyTorch for a sparse one.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import linear

aten = torch.ops.aten


def _spread(ct: Any, x_shape: Any, indices: Any, padding_idx: Any, scale_grad_by_freq: bool) -> Any:
    """[*I, D], indices [*I] -> [N, D]."""
    return aten.embedding_dense_backward.default(
        ct, indices, x_shape[0], padding_idx, scale_grad_by_freq
    )


def _looked_up(
    ct: Any, indices: Any, num_weights: Any, padding_idx: Any, scale_grad_by_freq: bool
) -> Any:
    """[N, D], indices [*I] -> [*I, D]. Rows of the padding index have no part in the gradient."""
    out = aten.embedding.default(ct, indices)
    if padding_idx >= 0:
        out = out.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    if scale_grad_by_freq:
        flat = indices.flatten()
        counts = (flat.unsqueeze(0) == flat.unsqueeze(1)).sum(0).reshape(indices.shape)
        out = out / counts.unsqueeze(-1)
    return out


linear(aten.embedding.default, _spread)
linear(aten.embedding_dense_backward.default, _looked_up)
