"""Derivative of `as_strided_scatter`, which is linear in both operands together."""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import jvp_rule, vjp_rule
from lamina.autodiff.outside import whole
from lamina_core.dispatch import followed
from lamina_core.overloads import aten


@whole(aten.as_strided_scatter.default)
@vjp_rule(aten.as_strided_scatter.default)
def as_strided_scatter_rule(
    needs: Any, x: Any, src: Any, size: Any, stride: Any, storage_offset: Any = None
) -> Any:
    """[*S], [*size] -> [*S]; the strides count elements of a contiguous x."""
    out = followed(aten.as_strided_scatter.default, x, src, size, stride, storage_offset)
    return out, (size, stride, storage_offset), _as_strided_scatter_pullback


def _as_strided_scatter_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    size, stride, offset = residuals
    if ct is None:
        return None, None
    ct = ct.contiguous()
    part = torch.as_strided(ct, size, stride, offset)
    x_ct = None
    if needs[0]:
        x_ct = followed(
            aten.as_strided_scatter.default, ct, torch.zeros_like(part), size, stride, offset
        )
    return x_ct, part if needs[1] else None


@jvp_rule(aten.as_strided_scatter.default)
def as_strided_scatter_jvp(
    tangents: Any, x: Any, src: Any, size: Any, stride: Any, storage_offset: Any = None
) -> Any:
    """[*S], [*size] -> [*S]; the strides count elements of a contiguous x."""
    x_t, src_t = tangents
    out = followed(aten.as_strided_scatter.default, x, src, size, stride, storage_offset)
    x_t = torch.zeros_like(x) if x_t is None else x_t.contiguous()
    src_t = torch.zeros_like(src) if src_t is None else src_t
    return out, followed(aten.as_strided_scatter.default, x_t, src_t, size, stride, storage_offset)
