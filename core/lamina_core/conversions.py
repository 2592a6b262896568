"""What leaves a transform as a Python value: NumPy arrays, lists, formatted numbers, lengths.

A tensor that is the same for all examples, and has no derivative where that would be lost, gives
what it gives outside. Any other is an error that says what to do.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.errors import DataDependentError, NoLengthError, message
from lamina_core.schema import resolved
from lamina_core.views import refresh_levels
from lamina_core.wrapper import LevelTensor

__all__: list[str] = []

Tensor = torch.Tensor
_CLASSES = LevelTensor.classes


def _plain(tensor: Any, what: str, advice: str, *, derivatives: bool = True) -> Any:
    """The plain tensor behind a wrapper.

    Raises:
        DataDependentError: If it is another one for each example, or has a derivative that `what`
            may not lose.
    """
    refresh_levels([tensor])
    while type(tensor) in _CLASSES:
        level = tensor.interpreter
        if not level.is_constant(tensor) and (derivatives or not level.differentiates):
            why = "its derivative would be lost" if level.differentiates else "examples differ"
            raise DataDependentError(
                message(f"{what} of {tensor!r}: {why}", level.where(), f"to fix: {advice}")
            )
        tensor = tensor.value
    return tensor


_BY_ARRAY = "use torch functions, or a torch.autograd.Function with a vmap of its own"


def _numpy(self: Any, *, force: bool = False) -> Any:
    """The memory as a NumPy array, of a tensor that is a constant of all transforms."""
    return resolved(_plain(self, "the NumPy array", _BY_ARRAY)).numpy(force=force)


def _array(self: Any, dtype: Any = None, *, copy: bool | None = None) -> Any:
    """What NumPy functions ask for; from NumPy 2 on they say whether it has to be a copy.

    Raises:
        ValueError: If it must not be one and has to.
    """
    array = resolved(_plain(self, "the NumPy array", _BY_ARRAY)).numpy()
    if dtype is None or array.dtype == dtype:
        return array.copy() if copy else array
    if copy is False:
        raise ValueError(f"unable to avoid a copy of an array of {array.dtype} as {dtype}")
    return array.astype(dtype)


def _tolist(self: Any) -> Any:
    """The numbers, of a tensor that is the same for all examples."""
    advice = "keep the tensor; x.unbind() gives a list of tensors"
    return _plain(self, "the list of numbers", advice, derivatives=False).tolist()


def _format(self: Any, spec: str) -> str:
    """A number like any other, if it is one for all examples; otherwise what `repr` gives."""
    if not spec:
        return str(self)
    advice = "print the tensor itself, as f'{x}', or return it and print the result"
    return format(_plain(self, "the number to format", advice, derivatives=False), spec)


def _len(self: Any) -> int:
    """The size of the first dim."""
    if not self.dim():
        raise NoLengthError(
            message(
                "len() of a 0-d tensor",
                f"it is {self!r}",
                "to fix: use torch.stack([x, y]) where torch.tensor([x, y]) asked for it",
            )
        )
    return int(self.shape[0])


_Wrapper: Any = LevelTensor
_Wrapper.numpy = _numpy
_Wrapper.__array__ = _array
_Wrapper.tolist = _tolist
_Wrapper.__format__ = _format
_Wrapper.__len__ = _len
