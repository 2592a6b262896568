"""Packed sequences as ordinary ops: steps of all sequences, longest first, in one tensor.

Where a step lies depends on the lengths alone, which are the numbers of a tensor that no transform
may have made its own: under `vmap` the examples must share them. PyTorch's kernels read that tensor
themselves, which a wrapper does not allow, so it is read here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina_core.errors import DataDependentError
from lamina_core.overloads import aten
from lamina_core.wrapper import LevelTensor, plain_of

__all__ = ["PACKED"]


def _shared(op: Any, numbers: Any) -> Any:
    """The plain tensor behind lengths or batch sizes.

    Raises:
        DataDependentError: If examples have lengths of their own.
    """
    value = numbers
    while isinstance(value, LevelTensor):
        if value.interpreter.alive and not value.interpreter.is_constant(value):
            raise value.interpreter.error(
                DataDependentError,
                f"{op} packs sequences by their lengths, and each example has its own",
                f"lengths or batch sizes: a mapped tensor of shape {list(numbers.shape)}",
                "to fix: pad the sequences to one length, and mask what follows the last step",
            )
        value = value.value
    return plain_of(value)


def _places(sizes: list[int], width: int, batch_first: bool, device: Any) -> Any:
    """[total]: where in the padded [T * N] (or [N * T]) the packed steps lie."""
    length = len(sizes)
    pairs = [(step, row) for step, size in enumerate(sizes) for row in range(size)]
    flat = [row * length + step if batch_first else step * width + row for step, row in pairs]
    return torch.tensor(flat, device=device)


def pack_padded_sequence(input: Any, lengths: Any, batch_first: bool) -> tuple[Any, Any]:
    """[T, N, *F], [N] -> [total, *F], [T]."""
    counts = _shared(aten._pack_padded_sequence.default, lengths).tolist()
    width, length = input.shape[:2] if batch_first else input.shape[1::-1]
    fits = len(counts) == width and counts == sorted(counts, reverse=True)
    if not fits or counts[-1] <= 0 or counts[0] > length:
        raise RuntimeError(
            f"lengths of packed sequences are {counts}: expected {width} numbers from {length} "
            "down to 1, in descending order"
        )
    sizes = [sum(count > step for count in counts) for step in range(counts[0])]
    padded = input.narrow(1 if batch_first else 0, 0, counts[0])
    places = _places(sizes, width, batch_first, input.device)
    return padded.flatten(0, 1).index_select(0, places), torch.tensor(sizes)


def pad_packed_sequence(
    data: Any, batch_sizes: Any, batch_first: bool, padding_value: Any, total_length: int
) -> tuple[Any, Any]:
    """[total, *F], [T] -> [T, N, *F], [N]."""
    sizes = _shared(aten._pad_packed_sequence.default, batch_sizes).tolist()
    width, steps = sizes[0], len(sizes)
    length = total_length if total_length > 0 else steps
    if length < steps:
        raise RuntimeError(
            f"total_length is {total_length}, and the longest packed sequence has {steps} steps"
        )
    places = _places([*sizes, *[0] * (length - steps)], width, batch_first, data.device)
    padded = data.new_full((length * width, *data.shape[1:]), padding_value)
    shape = (width, length) if batch_first else (length, width)
    lengths = [sum(size > row for size in sizes) for row in range(width)]
    return padded.index_copy(0, places, data).unflatten(0, shape), torch.tensor(lengths)


def _layers(op: Any) -> Callable[..., Any]:
    """A recurrent layer on packed data: PyTorch's decomposition, given numbers it can read."""

    def run(data: Any, batch_sizes: Any, *rest: Any) -> Any:
        return op.decompose(data, _shared(op, batch_sizes), *rest)

    return run


PACKED: dict[Any, Callable[..., Any]] = {
    aten._pack_padded_sequence.default: pack_padded_sequence,
    aten._pad_packed_sequence.default: pad_packed_sequence,
    aten.gru.data: _layers(aten.gru.data),
    aten.lstm.data: _layers(aten.lstm.data),
    aten.rnn_relu.data: _layers(aten.rnn_relu.data),
    aten.rnn_tanh.data: _layers(aten.rnn_tanh.data),
}
