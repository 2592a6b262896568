"""What does the gradient of a loop over the rows of a tensor cost, as there are more of them?

A recurrent function reads `x[0]`, `x[1]`, ... Each of these views sends back a cotangent that is
zero outside its row. Added up as tensors of the size of `x` they make the backward pass quadratic
in the number of rows.

    python benchmarks/rows.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import harness
import lamina

WIDTH = 64


def recurrent(x: Tensor) -> Tensor:
    """[length, width] -> []: one state, and one step a row."""
    state = torch.zeros(WIDTH)
    for i in range(x.shape[0]):
        state = torch.tanh(state + x[i])
    return state.sum()


def autograd(x: Tensor) -> Any:
    """The gradient by PyTorch itself."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(recurrent(x), x)[0]


def measure(lengths: list[int], rounds: int, min_seconds: float) -> harness.Table:
    """One row a length."""
    table = harness.Table(
        f"Gradient of a loop over rows of {WIDTH}",
        ["rows", "lamina us a row", "torch.func us a row", "ratio", "torch.autograd us a row"],
    )
    for length in lengths:
        x = torch.randn(length, WIDTH)
        contenders = {
            "lamina": partial(lamina.grad(recurrent), x),
            "torch.func": partial(torch.func.grad(recurrent), x),
            "torch.autograd": partial(autograd, x),
        }
        result = harness.race({length: contenders}, rounds=rounds, min_seconds=min_seconds)
        ours, peer, plain = (result.seconds[length][name] for name in contenders)
        table.add(
            str(length),
            harness.median(ours) / length * 1e6,
            harness.median(peer) / length * 1e6,
            harness.median(ours / peer),
            harness.median(plain) / length * 1e6,
        )
        table.note_failures(result.failures)
    return table


def main(arguments: list[str] | None = None) -> harness.Report:
    """Runs the measurement; returns what it printed."""
    report = harness.start("Gradients of loops over the rows of a tensor.", arguments)
    quick = report.settings.quick
    rounds, min_seconds = (3, 0.002) if quick else (11, 0.02)
    report.add(measure([5, 20] if quick else [50, 200, 800, 3200], rounds, min_seconds))
    report.save()
    return report


if __name__ == "__main__":
    main()
