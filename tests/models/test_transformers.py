"""Models of other people, unmodified: every kind of architecture of `transformers`.

Per-sample gradients, a directional derivative and a Hessian-vector product of each, held against
`torch.autograd`, with the per-example loop forbidden.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import lamina
from lamina import functional_call, grad, jvp, vmap

pytest.importorskip("transformers", reason="the extra 'models' is not installed")

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

    def loss(self, params, example):
        batch = {k: v.unsqueeze(0) for k, v in example.items()}
        out = functional_call(self.model, (params, self.buffers), (), batch)
        return out[0].square().mean()

    def reference(self, example, *, twice=False):
        leaves = {k: v.clone().requires_grad_() for k, v in self.params.items()}
        options = {"allow_unused": True, "materialize_grads": True}
        # PyTorch's fused attention has no double backward.
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.loss(leaves, example)
            grads = torch.autograd.grad(loss, [*leaves.values()], create_graph=twice, **options)
            along = sum((g * v).sum() for g, v in zip(grads, self.direction.values(), strict=True))
            if twice:
                return torch.autograd.grad(along, [*leaves.values()], **options)
        return grads, along


@functools.cache
def problem(name):
    return Problem(name)


def agree(actual, expected):
    """Equal to within rounding of the largest entry of all: some gradients are exactly zero."""
    scale = max(e.abs().max().item() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=TOLERANCE, atol=TOLERANCE * scale)


@pytest.fixture(autouse=True)
def _no_loop(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "error")


@pytest.mark.parametrize("name", zoo.NAMES)
def test_per_sample_gradients(name):
    it = problem(name)
    grads = vmap(grad(it.loss), (None, 0))(it.params, it.batch)
    for i, example in enumerate(it.rows):
        agree([g[i] for g in grads.values()], it.reference(example)[0])


@pytest.mark.parametrize("name", zoo.NAMES)
def test_directional_derivative(name):
    it = problem(name)
    _, loss_t = jvp(lambda params: it.loss(params, it.rows[0]), (it.params,), (it.direction,))
    agree([loss_t], [it.reference(it.rows[0])[1]])


@pytest.mark.parametrize("name", zoo.NAMES)
def test_hessian_vector_product(name):
    it = problem(name)
    gradient = grad(it.loss)
    _, product = jvp(lambda params: gradient(params, it.rows[0]), (it.params,), (it.direction,))
    agree([*product.values()], it.reference(it.rows[0], twice=True))
