"""Derivatives by `torch.autograd` alone, which laws compare with."""

from __future__ import annotations

import torch

Tensors = tuple[torch.Tensor, ...]


def pull_back(outs: Tensors, xs: Tensors, cts: Tensors, **options: bool) -> Tensors:
    """The cotangents of `xs`, zeros where there is no influence.

    Args:
        outs: Outputs; those that do not require grad count for nothing.
        xs: What they were computed of.
        cts: The cotangents of the outputs.
        options: Of `torch.autograd.grad`.
    """
    used = [(out, ct) for out, ct in zip(outs, cts, strict=True) if out.requires_grad]
    if not used:
        return tuple(map(torch.zeros_like, xs))
    return torch.autograd.grad(
        [out for out, _ in used],
        xs,
        [ct for _, ct in used],
        allow_unused=True,
        materialize_grads=True,
        **options,
    )
