"""A loss of a model of `zoo.py`, and what has to hold of its derivatives.

A check takes the library that computes the derivatives, so that others can be held to the same.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.models import zoo

# Several of the models compute their norms or recurrences in float32 whatever their dtype is.
TOLERANCE = 1e-4


class Problem:
    """A loss of parameters and one example, and what torch.autograd says about it."""

    def __init__(self, name):
        self.model, self.batch = zoo.build(name)
        self.params = {k: v.detach() for k, v in self.model.named_parameters()}
        self.buffers = {k: v.detach() for k, v in self.model.named_buffers()}
        self.rows = [{k: v[i] for k, v in self.batch.items()} for i in range(zoo.BATCH)]
        generator = torch.Generator().manual_seed(1)
        self.direction = {
            k: torch.randn(v.shape, dtype=v.dtype, generator=generator)
            for k, v in self.params.items()
        }

    def loss_by(self, lib):
        """The loss, with the parameters swapped in by a library."""

        def loss(params, example):
            batch = {k: v.unsqueeze(0) for k, v in example.items()}
            out = lib.functional_call(self.model, (params, self.buffers), (), batch)
            return out[0].square().mean()

        return loss

    def reference(self, example, *, twice=False):
        """Gradients and their product with the direction, or with `twice` the hessian's."""
        leaves = {k: v.clone().requires_grad_() for k, v in self.params.items()}
        options = {"allow_unused": True, "materialize_grads": True}
        # PyTorch's fused attention has no double backward.
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.loss_by(torch.func)(leaves, example)
            grads = torch.autograd.grad(loss, [*leaves.values()], create_graph=twice, **options)
            along = sum((g * v).sum() for g, v in zip(grads, self.direction.values(), strict=True))
            if twice:
                return torch.autograd.grad(along, [*leaves.values()], **options)
        return grads, along


def agree(actual, expected):
    """Equal to within rounding of the largest entry of all: some gradients are exactly zero."""
    scale = max(e.abs().max().item() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=TOLERANCE, atol=TOLERANCE * scale)


def per_sample_gradients(problem, lib):
    grads = lib.vmap(lib.grad(problem.loss_by(lib)), (None, 0))(problem.params, problem.batch)
    for i, example in enumerate(problem.rows):
        agree([g[i] for g in grads.values()], problem.reference(example)[0])


def directional_derivative(problem, lib):
    loss, example = problem.loss_by(lib), problem.rows[0]
    _, loss_t = lib.jvp(
        lambda params: loss(params, example), (problem.params,), (problem.direction,)
    )
    agree([loss_t], [problem.reference(example)[1]])


def hessian_vector_product(problem, lib):
    gradient, example = lib.grad(problem.loss_by(lib)), problem.rows[0]
    _, product = lib.jvp(
        lambda params: gradient(params, example), (problem.params,), (problem.direction,)
    )
    agree([*product.values()], problem.reference(example, twice=True))


CHECKS = {
    "vmap(grad)": per_sample_gradients,
    "jvp": directional_derivative,
    "jvp(grad)": hessian_vector_product,
}
