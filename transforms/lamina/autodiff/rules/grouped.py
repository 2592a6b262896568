"""Grouped matrix products: one product per group of rows, as mixtures of experts use them.

`_grouped_mm` is bilinear. Whatever side is ragged (rows of the first factor, columns of the second,
or the dim summed over), the transpose in one factor is a grouped product with the other transposed,
under the same offsets.
"""

from __future__ import annotations

from typing import Any

from lamina.autodiff.declare import jvp_rule, vjp_rule
from lamina_core.overloads import aten

__all__: list[str] = []

_ALIGNED = 16  # bytes: the kernel wants every stride but that of the innermost dim to be a multiple


def _laid_out(ct: Any) -> Any:
    """The cotangent in a layout that the kernel takes; one of `sum` has strides of zero."""
    columns = ct.shape[-1] * ct.element_size() % _ALIGNED
    return ct.mT.contiguous().mT if columns else ct.contiguous()


@vjp_rule(aten._grouped_mm.default)
def grouped_mm(
    needs: Any, x: Any, y: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Ragged [n, k], [groups, k, m] -> [n, m], and its three relatives"""
    out = aten._grouped_mm.default(x, y, offs, bias, out_dtype)
    return out, (y if needs[0] else None, x if needs[1] else None, offs), _grouped_mm_pullback


def _grouped_mm_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    y, x, offs = residuals
    ct = _laid_out(ct)
    x_ct = aten._grouped_mm.default(ct, y.mT, offs) if needs[0] else None
    y_ct = aten._grouped_mm.default(x.mT, ct, offs) if needs[1] else None
    return (x_ct, y_ct, *[None] * (len(needs) - 2))


@jvp_rule(aten._grouped_mm.default)
def grouped_mm_jvp(
    tangents: Any, x: Any, y: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Ragged [n, k], [groups, k, m] -> [n, m], and its three relatives"""
    x_t, y_t = tangents[:2]
    parts = []
    if x_t is not None:
        parts.append(aten._grouped_mm.default(_laid_out(x_t), y, offs, None, out_dtype))
    if y_t is not None:
        parts.append(aten._grouped_mm.default(x, _laid_out(y_t), offs, None, out_dtype))
    out = aten._grouped_mm.default(x, y, offs, bias, out_dtype)
    return out, sum(parts[1:], parts[0]) if parts else None
