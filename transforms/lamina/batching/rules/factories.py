"""Batching rules of factories that take tensors; all others never see a batched operand.

PyTorch counts the first half of the numbers from the start and the others from the end.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.table import decomposition
from lamina_core.overloads import aten


@decomposition(
    aten.linspace.Scalar_Tensor, aten.linspace.Tensor_Scalar, aten.linspace.Tensor_Tensor
)
def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None, **options: Any) -> Any:
    """[], [] -> [steps]"""
    ends = [torch.as_tensor(v, device=options.get("device")) for v in (start, end)]
    dtype = dtype or _dtype(*ends)
    exact = dtype.is_floating_point or dtype.is_complex
    return _numbers(ends[0], ends[1], steps, dtype if exact else torch.float64).to(dtype)


@decomposition(
    aten.logspace.Scalar_Tensor, aten.logspace.Tensor_Scalar, aten.logspace.Tensor_Tensor
)
def logspace(
    start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: Any = None, **options: Any
) -> Any:
    """[], [] -> [steps]"""
    ends = [torch.as_tensor(v, device=options.get("device")) for v in (start, end)]
    dtype = dtype or _dtype(*ends)
    exact = dtype.is_floating_point or dtype.is_complex
    powers = _numbers(ends[0], ends[1], steps, dtype if exact else torch.float64)
    return (base**powers).to(dtype)


def _dtype(start: Any, end: Any) -> torch.dtype:
    default = torch.get_default_dtype()
    return default.to_complex() if start.is_complex() or end.is_complex() else default


def _numbers(start: Any, end: Any, steps: int, dtype: torch.dtype) -> Any:
    start, end = start.to(dtype), end.to(dtype)
    at = torch.arange(steps, device=start.device)
    step = (end - start) / max(steps - 1, 1)
    return torch.where(at < (steps + 1) // 2, start + at * step, end - (steps - 1 - at) * step)
