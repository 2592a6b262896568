"""A batch as large as a matrix: what is a vector and what a matrix is not to be guessed from it."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, vmap

A = torch.tensor([[[2.0, 0.5], [0.0, 2.0]], [[1.0, 2.0], [0.5, 3.0]]], dtype=torch.float64)
B = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)

CALLS = {
    "solve": lambda a: torch.linalg.solve(a, B),
    "solve on the right": lambda a: torch.linalg.solve(a, B, left=False),
    "solve of a mapped matrix": lambda a: torch.linalg.solve(a, a.mT),
    "solve of a vector": lambda a: torch.linalg.solve(a, B[0]),
    "solve of a mapped vector": lambda a: torch.linalg.solve(a, a[0]),
    "solve by a captured matrix": lambda a: torch.linalg.solve(B, a),
    "solve a mapped vector by a captured matrix": lambda a: torch.linalg.solve(B, a[0]),
    "solve_ex": lambda a: torch.linalg.solve_ex(a, B)[0],
    "slogdet": lambda a: torch.linalg.slogdet(a)[1],
}


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_those_of_a_loop(name):
    f = CALLS[name]
    torch.testing.assert_close(vmap(f)(A), torch.stack([f(a) for a in A]))

    def loss(a):
        return f(a).sum()

    leaves = A.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(a) for a in leaves), leaves)
    torch.testing.assert_close(vmap(grad(loss))(A), expected)
