"""`x[i]` and `x[i] = v`, where `i` has no dims and is another number for each example.

# NOTE [Indices without dims]
PyTorch's indexing asks an integer tensor without dims for its one value, and then looks at `x[3]`.
A batched `i` has no such value. In ATen's own words `x[i]` is then a narrow of length 1 that starts
at `i`, without its dim: a view, which may be written to.

The plain `x` of `x[i]` has no method of ours, and PyTorch gives the index a say only by its
`__torch_function__`, which costs every op on it a microsecond. It is looked up on the instance,
though. So wrappers without dims that may be an index, and no others, have one of their own:
`index_door`.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.errors import DataDependentError, message
from lamina_core.torch_hooks.tensors import no_torch_function, torch_function_off
from lamina_core.wrapper import LevelTensor

__all__ = ["differs"]

Tensor = torch.Tensor
_CLASSES = LevelTensor.classes
_READ = Tensor.__getitem__
_WRITE = Tensor.__setitem__
_NUMBER: Any = Tensor.__index__
_MASKS = (torch.bool, torch.uint8)


def differs(tensor: Any) -> bool:
    """Whether a value without a derivative is another one for each example of some level."""
    while type(tensor) in _CLASSES:
        if not tensor.interpreter.is_constant(tensor):
            return True
        tensor = tensor.value
    return False


def _index_door(
    func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """What PyTorch calls in place of a function that is given an index without dims."""
    kwargs = kwargs or {}
    meaning = _MEANINGS.get(func)
    if len(types) > 1:
        others = [kind for kind in types if kind not in _CLASSES]
        if others and (meaning is None or any(map(_has_its_say, others))):
            return others[0].__torch_function__(func, tuple(others), args, kwargs)
    if meaning is None:
        return no_torch_function(func, types, args, kwargs)
    with torch_function_off():
        return meaning(*args, **kwargs)


_USUAL = getattr(Tensor.__torch_function__, "__func__", None)


def _has_its_say(kind: Any) -> bool:
    """Whether a user's subclass of tensors has a `__torch_function__` of its own."""
    return getattr(kind.__torch_function__, "__func__", None) is not _USUAL


def _read(x: Any, index: Any) -> Any:
    if not _holds_number(index):
        return _READ(x, index)
    view, rest = _apart(x, index)
    return _READ(view, rest)


def _write(x: Any, index: Any, value: Any) -> None:
    """`x[index] = value`; also for masks without dims, which ask for a value just so."""
    if type(index) is not int and _holds_number(index):
        x, index = _apart(x, index)
    _WRITE(x, index, value)


def _as_number(index: Any) -> int:
    if not differs(index):
        return _NUMBER(index)
    raise DataDependentError(
        message(
            "an index of one Python number is wanted, but each example has its own",
            _where_it_differs(index).interpreter.where(),
            "it comes from x[i:j], range(i) or a_list[i] with a batched i",
            "to fix: use torch.narrow(x, dim, i, length) for x[i:j], and torch.stack(a_list)[i]",
        )
    )


def _narrow(x: Any, dim: Any, start: Any, length: Any) -> Any:
    return torch.narrow(x, dim, _kept(start), length)


_MEANINGS: dict[Any, Any] = {
    Tensor.__getitem__: _read,
    Tensor.__index__: _as_number,
    Tensor.__setitem__: _write,
    Tensor.narrow: _narrow,
    torch.narrow: _narrow,
}
LevelTensor.index_door = staticmethod(_index_door)
LevelTensor.__setitem__ = _write  # type: ignore[method-assign]


def _holds_number(index: Any) -> bool:
    items = index if type(index) is tuple else (index,)
    return any(_is_number(item) for item in items)


def _is_number(item: Any) -> bool:
    return type(item) in _CLASSES and not item.dim() and differs(item)


def _apart(x: Any, index: Any) -> tuple[Any, tuple[Any, ...]]:
    """`x` narrowed to where the numbers of an index point, and what is left of the index."""
    items = list(index) if type(index) is tuple else [index]
    rank = x.dim()
    taken = sum(_dims_of(item) for item in items)
    if taken > rank:
        raise IndexError(f"too many indices for tensor of dimension {rank}")
    dim = 0
    for at, item in enumerate(items):
        if item is Ellipsis:
            dim += rank - taken
        elif not _is_number(item):
            dim += _dims_of(item)
        elif item.dtype in _MASKS:  # it asks for a dim of its own, of size 1 or 0
            x = x.unsqueeze(dim)
            items[at] = item.reshape(1).to(torch.bool)  # a byte with dims is no mask to all writes
            dim += 1
        else:
            x = torch.narrow(x, dim, _kept(item), 1)
            items[at] = 0
            dim += 1
    return x, tuple(items)


def _dims_of(item: Any) -> int:
    """How many dims of `x` an entry of an index speaks of."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if not isinstance(item, Tensor):
        return _depth(item) if isinstance(item, (list, tuple)) and _of_bools(item) else 1
    if item.dtype in _MASKS:
        return item.dim()
    return 1


def _of_bools(item: Any) -> bool:
    while isinstance(item, (list, tuple)) and item:
        item = item[0]
    return isinstance(item, bool)


def _depth(item: Any) -> int:
    return 1 + _depth(item[0]) if isinstance(item, (list, tuple)) else 0


def _kept(start: Any) -> Any:
    """A start of our own: a view is made again after a write, from where it was made first.

    It is of the level at which it differs, so that those above leave the view of a tensor that is
    not theirs to that level.
    """
    if not _is_number(start):
        return start
    return _where_it_differs(start.clone())


def _where_it_differs(index: Any) -> Any:
    while index.interpreter.is_constant(index):
        index = index.value
    return index
