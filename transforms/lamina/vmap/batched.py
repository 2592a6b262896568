"""`BatchedTensor`: a value with one more dim than it shows."""

from __future__ import annotations

from typing import Any

from lamina_core.errors import EscapedTensorError, message
from lamina_core.wrapper import LevelTensor, make_wrapper

__all__ = ["BatchedTensor", "wrap"]


class BatchedTensor(LevelTensor):
    """One example as user code sees it; `value` holds all of them.

    Attributes:
        bdim: The dim of `value` that runs over the examples; None for a value that is the same for
            every example.
    """

    bdim: int | None

    def describe(self) -> str:
        """Level, batch dim and batch size, for the repr."""
        size = "" if self.bdim is None else f", size={self.value.shape[self.bdim]}"
        return f"level={self.interpreter.level}, bdim={self.bdim}{size}"

    def dead_value(self) -> Any:
        """An unbatched value stands for itself; a batched one has no meaning outside its vmap."""
        if self.bdim is None:
            return self.value
        raise EscapedTensorError(
            message(
                f"a batched tensor of shape {list(self.shape)} is used after its vmap returned",
                f"escaped from level {self.interpreter.level}: {self.interpreter}",
                "to fix: return the tensor from the mapped function instead of storing it elsewhere",
            )
        )


def wrap(interpreter: Any, value: Any, bdim: int | None) -> BatchedTensor:
    """Box a value at the level of `interpreter`."""
    size = value.shape
    if bdim is not None:
        size = size[1:] if bdim == 0 else size[:bdim] + size[bdim + 1 :]
    if value.is_contiguous():
        out: Any = make_wrapper(BatchedTensor, size, dtype=value.dtype, device=value.device)
    else:
        stride = value.stride()
        if bdim is not None:
            stride = stride[:bdim] + stride[bdim + 1 :]
        out = make_wrapper(BatchedTensor, size, stride, dtype=value.dtype, device=value.device)
    out.interpreter = interpreter
    out.value = value
    out.bdim = bdim
    return out  # type: ignore[no-any-return]
