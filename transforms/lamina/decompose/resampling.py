"""`F.interpolate` as the kernels of images; every transform may use this.

The overloads it calls take a size or factors. PyTorch also has them in ordinary ops, which
`OpOverload.decompose` would pick: 45 ops in place of one, and rounding of its own for `uint8`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lamina_core.overloads import aten

__all__ = ["RESAMPLED"]

_OPS = [
    aten._upsample_bicubic2d_aa,
    aten._upsample_bilinear2d_aa,
    aten._upsample_lanczos2d_aa,
    aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d,
    aten.upsample_bicubic2d,
    aten.upsample_bilinear2d,
    aten.upsample_linear1d,
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten.upsample_trilinear3d,
]


def _resample(op: Any) -> Callable[..., Any]:
    def resample(input: Any, output_size: Any, *rest: Any) -> Any:
        """[N, C, *S] -> [N, C, *S']. The rest is align_corners, for some, and the factors."""
        *corners, factors = rest
        if output_size is None:
            sizes = input.shape[2:]
            output_size = [int(n * f) for n, f in zip(sizes, factors, strict=True)]
        scales = [None] * len(output_size) if factors is None else factors
        return op(input, output_size, *corners, *scales)

    return resample


RESAMPLED: dict[Any, Callable[..., Any]] = {op.vec: _resample(op.default) for op in _OPS}
