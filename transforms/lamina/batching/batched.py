"""`BatchedTensor`: a value with one more dim than it shows."""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.errors import EscapedTensorError, message
from lamina_core.torch_hooks.tensors import make_wrapper
from lamina_core.wrapper import LevelTensor, box

__all__ = ["BatchedTensor", "wrap", "wrap_exact", "wrap_like"]

default_dtype = torch.get_default_dtype


class BatchedTensor(LevelTensor):
    """One example as user code sees it; `value` holds all of them.

    Attributes:
        bdim: The dim of `value` that runs over the examples; None for a value that is the same for
            every example.
        logical: The shape as a plain tuple; reading it back from the tensor costs 0.3 us.
        strides: The logical strides, or None if the tensor is contiguous.
    """

    __slots__ = ("bdim", "logical", "strides")
    holds = ("value",)

    bdim: int | None
    logical: Any
    strides: Any

    def describe(self) -> str:
        """Level, batch dim and batch size, for the repr."""
        size = "" if self.bdim is None else f", size={self.value.shape[self.bdim]}"
        return f"level={self.interpreter.level}, bdim={self.bdim}{size}"

    def fault(self) -> str | None:
        """A batch dim that is none, or another shape or dtype than an example has."""
        value, bdim = self.value, self.bdim
        if bdim is None:
            return super().fault()
        size = value.shape[bdim] if 0 <= bdim < value.dim() else None
        interpreter: Any = self.interpreter
        if size != interpreter.batch_size:
            return (
                f"output of shape {list(value.shape)} with batch dim {bdim}, "
                f"but the batch size is {interpreter.batch_size}"
            )
        return self.unlike(value, value.shape[:bdim] + value.shape[bdim + 1 :])

    def example(self, value: Any) -> Any:
        """The first example, with the strides that user code sees; or zeros if there is none."""
        if self.bdim is None:
            return value
        if not value.shape[self.bdim]:
            return value.new_zeros(self.logical)
        value = value.select(self.bdim, 0)
        if self.strides is None:
            return value.contiguous()
        if value.stride() == self.strides or 0 in self.strides:
            return value
        return torch.empty_strided(
            value.shape, self.strides, dtype=value.dtype, device=value.device
        ).copy_(value)

    def need_meaning(self) -> None:
        """An unbatched value stands for itself; a batched one has no meaning outside its vmap."""
        if self.bdim is None or self.interpreter.asleep is not None:
            super().need_meaning()
            return
        raise EscapedTensorError(
            message(
                f"a batched tensor of shape {list(self.shape)} is used after its vmap returned",
                f"escaped from level {self.interpreter.level}: {self.interpreter}",
                "to fix: return the tensor from the mapped function instead of storing it",
            )
        )


def wrap(interpreter: Any, value: Any, bdim: int | None) -> BatchedTensor:
    """Box a value at the level of `interpreter`."""
    size = value.shape
    if bdim is not None:
        size = size[1:] if bdim == 0 else size[:bdim] + size[bdim + 1 :]
    stride = None
    if not value.is_contiguous():
        stride = value.stride()
        if bdim is not None:
            stride = stride[:bdim] + stride[bdim + 1 :]
    out = box(BatchedTensor, value, size, stride)
    out.interpreter = interpreter
    out.value = value
    out.recipe = None
    out.bdim = bdim
    out.logical = size
    out.strides = stride
    return out


def wrap_exact(interpreter: Any, value: Any, bdim: int | None) -> BatchedTensor:
    """As `wrap`, for an argument or a view of one: the strides are those that an example has.

    What is computed shows as contiguous where its value is, for outside it would be; the example of
    an argument has other strides than the whole if the batch dim is not the first.
    """
    out = wrap(interpreter, value, bdim)
    if not bdim or out.strides is not None:
        return out
    strides = value.stride()
    strides = strides[:bdim] + strides[bdim + 1 :]
    dense = 1
    for size, stride in zip(reversed(out.logical), reversed(strides), strict=True):
        if size != 1 and stride != dense and value.numel():
            exact = box(BatchedTensor, value, out.logical, strides)
            for name in ("interpreter", "value", "recipe", *BatchedTensor.__slots__):
                setattr(exact, name, getattr(out, name))
            exact.strides = strides
            return exact
        dense *= size
    return out


def wrap_like(x: Any, value: Any) -> Any:
    """Box a value of the physical shape of `x.value`, at the level and with the bdim of `x`.

    HOT: a contiguous operand of an elementwise op has a contiguous result, so nothing but the dtype
    has to be looked at (0.7 us less than `wrap`).
    """
    if x.strides is not None:
        return wrap(x.interpreter, value, x.bdim)
    size = x.logical
    dtype = value.dtype
    if value.is_cpu and dtype is default_dtype():
        out: Any = make_wrapper(BatchedTensor, size)
    else:
        out = box(BatchedTensor, value, size, None)
    out.interpreter = x.interpreter
    out.value = value
    out.recipe = None
    out.bdim = x.bdim
    out.logical = size
    out.strides = None
    return out
