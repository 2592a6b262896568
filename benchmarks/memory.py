"""How much memory does a gradient hold at its peak, next to torch.autograd and torch.func?

The function is a chain of ten `x.sin().cos()` over one tensor of 64 MiB. Reverse mode must keep an
input for each of the twenty ops, about twenty times the tensor; what exceeds that is overhead. All
numbers are in units of the tensor, so they depend neither on the machine nor on its size.

The second table is a stack of feed-forward blocks, four times as wide inside, under checkpoints
that keep nothing but the input of each block, or the matrix products as well. There torch.autograd
runs PyTorch's own checkpointing, with its selective form for the products.

    python benchmarks/memory.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import harness
import lamina

LINKS = 10
BATCH = 16
BLOCKS = 6
WIDTH = 64


def chain(x: Tensor) -> Tensor:
    """Ten links of two ops each, and one number for a result."""
    for _ in range(LINKS):
        x = x.sin().cos()
    return x.sum()


def checkpointed_chain(x: Tensor) -> Tensor:
    """The same, keeping only the input of each link and computing the rest again."""
    for _ in range(LINKS):
        x = checkpoint(lambda x: x.sin().cos(), x, use_reentrant=False)
    return x.sum()


def block(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """One feed-forward block of a transformer."""
    wide, narrow = weights
    hidden = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (WIDTH,)) @ wide)
    return x + torch.nn.functional.gelu(hidden * hidden.sigmoid()) @ narrow


def dots_policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """PyTorch's form of `dots_saveable`."""
    keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def by_torch(*, dots: bool) -> Callable[..., Tensor]:
    """The block under PyTorch's own checkpointing."""
    contexts = partial(create_selective_checkpoint_contexts, dots_policy)
    more = {"context_fn": contexts} if dots else {}
    return partial(checkpoint, block, use_reentrant=False, **more)


def stack(run: Callable[..., Tensor], weights: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """All blocks, each run by `run`, and one number for a result."""
    for pair in weights:
        x = run(x, pair)
    return x.square().sum()


def autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient from PyTorch itself, which is what there is to match.

    Examples do not mix in these functions, so the rows of this one gradient are the per-sample
    gradients too.
    """
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def transform_grad(lib: ModuleType, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient by a transform."""
    return lib.grad(function)(x)


def transform_vmap_grad(lib: ModuleType, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Per-sample gradients by two transforms."""
    return lib.vmap(lib.grad(function))(x)


def blocks(*, quick: bool) -> harness.Table:
    """The stack of blocks without a checkpoint, with one a block, and with the products kept."""
    x = torch.randn(2**8 if quick else 2**14, WIDTH)
    weights = [
        (torch.randn(WIDTH, 4 * WIDTH) / WIDTH**0.5, torch.randn(4 * WIDTH, WIDTH) / WIDTH)
        for _ in range(BLOCKS)
    ]
    dots = lamina.checkpoint_policies.dots_saveable
    table = harness.Table(
        f"Peak memory beyond input and weights, in units of the input ({x.nbytes / 2**20:g} MiB)",
        [f"gradient of {BLOCKS} blocks", "lamina", "torch.autograd"],
    )
    for row, ours, theirs in [
        ("all kept", block, block),
        ("checkpoint", lamina.checkpoint(block), by_torch(dots=False)),
        ("checkpoint, dots_saveable", lamina.checkpoint(block, policy=dots), by_torch(dots=True)),
    ]:
        contenders = {
            "lamina": partial(lamina.grad(partial(stack, ours, weights)), x),
            "torch.autograd": partial(autograd, partial(stack, theirs, weights), x),
        }
        harness.assert_agree(
            {who: thunk() for who, thunk in contenders.items()}, row, rtol=1e-3, atol=1e-3
        )
        peaks = {
            who: harness.peak_memory(thunk, warmup=False) / x.nbytes
            for who, thunk in contenders.items()
        }
        table.add(row, *(peaks[who] for who in table.columns[1:]))
    return table


def main(arguments: list[str] | None = None) -> harness.Report:
    """Measures each way of taking the gradient; returns what it printed."""
    report = harness.start("Peak memory of a gradient, in units of its input.", arguments)
    mebibytes = 1 if report.settings.quick else 64
    x = torch.randn(BATCH, mebibytes * 2**20 // (4 * BATCH))
    unit = x.nbytes

    table = harness.Table(
        f"Peak memory beyond the input, in units of the input ({mebibytes} MiB)",
        ["gradient of 10 x sin.cos", "lamina", "torch.autograd", "torch.func"],
    )
    for row, function, transform in [
        ("grad", chain, transform_grad),
        ("vmap(grad)", chain, transform_vmap_grad),
        ("grad, checkpointed", checkpointed_chain, transform_grad),
        ("vmap(grad), checkpointed", checkpointed_chain, transform_vmap_grad),
    ]:
        contenders = {
            "lamina": partial(transform, lamina, function, x),
            "torch.func": partial(transform, torch.func, function, x),
            "torch.autograd": partial(autograd, function, x),
        }
        peaks: dict[str, float] = {}
        answers: dict[str, Tensor] = {}
        for who, thunk in contenders.items():
            try:
                answers[who] = thunk()  # also the warm-up
                peaks[who] = harness.peak_memory(thunk, warmup=False) / unit
            except Exception as error:  # a refusal is a result, which the table reports
                peaks[who] = math.nan
                table.note_failures({(row, who): f"{type(error).__name__}: {error}"})
        harness.assert_agree(answers, row, rtol=1e-3, atol=1e-4)
        table.add(row, *(peaks[who] for who in table.columns[1:]))
    report.add(table)
    report.add(blocks(quick=report.settings.quick))
    report.save()
    return report


if __name__ == "__main__":
    main()
