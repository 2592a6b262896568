"""What LAMINA_DEBUG=1 asks of tangents and cotangents: to be like the primal they belong to."""

from __future__ import annotations

from typing import Any

from lamina_core.config import tensor_summary

__all__ = ["Likeness"]


class Likeness:
    """Shape, dtype and device of a primal, without the primal."""

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, primal: Any) -> None:
        self.shape = primal.shape
        self.dtype = primal.dtype
        self.device = primal.device

    def fault(self, tensor: Any) -> str | None:
        """How a tangent or cotangent differs from the primal; None if it does not, or is None."""
        if tensor is None or (
            tensor.shape == self.shape
            and tensor.dtype == self.dtype
            and tensor.device == self.device
        ):
            return None
        mine, its = tensor_summary(self), tensor_summary(tensor)
        return f"is {its} on {tensor.device}, and the primal {mine} on {self.device}"
