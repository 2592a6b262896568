"""Half precision: fused kernels compute in float32 and round once, so what stands for them must."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["HALF", "widened"]

HALF = (torch.bfloat16, torch.float16)


def widened(x: Any) -> Any:
    """A value in float32 if it is in half precision."""
    return x.float() if x is not None and x.dtype in HALF else x
