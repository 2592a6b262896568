"""Batching rules of fused optimisers: elementwise but for the rate and the numbers of the steps.

Where all examples share these, one call of the kernel takes the steps of all. Otherwise a step is
decomposed. So it is in half precision: there the kernel of SGD on a CPU is wrong for tensors of 16
elements and more, and a stack has more elements than an example.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import ensure_batched
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten

__all__: list[str] = []

# One op a line, and the place of its numbers of steps.
_OPTIMISERS = {
    aten._fused_adagrad.default: 3,
    aten._fused_adagrad.tensor_lr: 3,
    aten._fused_adam.default: 5,
    aten._fused_adam.tensor_lr: 5,
    aten._fused_adamw.default: 5,
    aten._fused_adamw.tensor_lr: 5,
    aten._fused_sgd.default: None,
    aten._fused_sgd.tensor_lr: None,
}


def _register(op: Any, steps: int | None) -> None:
    @batching_rule(op, state="family")
    def optimiser(info: Any, in_dims: Any, *lists: Any, **options: Any) -> Any:
        """Lists of [B, *S], and perhaps one of [] -> the lists of the new ones."""
        alone = [*info.kwarg_dims.values(), *([] if steps is None else in_dims[steps])]
        exact = all(x.dtype in (torch.float32, torch.float64) for x in lists[0])
        if not exact or any(bdim is not None for bdim in alone):
            return NotImplemented
        # The kernels read memory in its order, so that of all operands has to be the same.
        stacked = [
            [ensure_batched(x, d, info.batch_size).contiguous() for x, d in zip(*pair, strict=True)]
            for pair in zip(lists, in_dims, strict=True)
        ]
        if steps is not None:
            stacked[steps] = lists[steps]
        outs = op(*stacked, **options)
        return tuple(outs), [[None if at == steps else 0 for _ in o] for at, o in enumerate(outs)]


for _op, _steps in _OPTIMISERS.items():
    _register(_op, _steps)
