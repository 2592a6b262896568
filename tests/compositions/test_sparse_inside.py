"""Sparse constants made inside a transform, which are what they are outside."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jvp, vmap

AT = torch.tensor([[0, 1, 2], [0, 2, 1]])


def sparse():
    return torch.sparse_coo_tensor(AT, torch.tensor([1.0, 2.0, 3.0]), (3, 3))


PROGRAMS = {
    "layout": lambda y: y.sum() * (2 if sparse().is_sparse else 3),
    "mm": lambda y: torch.sparse.mm(sparse(), y[:, None]).sum(),
    "mv": lambda y: torch.mv(torch.eye(3).to_sparse(), y).sum(),
    "addmm": lambda y: torch.sparse.addmm(torch.zeros(3, 1), sparse(), y[:, None]).sum(),
    "csr": lambda y: (torch.eye(3).to_sparse_csr() @ y).sum(),
    "to_dense": lambda y: ((sparse() * 2).to_dense() @ y).sum(),
    "coalesce": lambda y: (sparse().coalesce().to_dense() * y).sum(),
    "values": lambda y: (sparse().coalesce().values() * y).sum(),
    "sum": lambda y: torch.sparse.sum(sparse()) * y.sum(),
    "facts": lambda y: sparse()._nnz() * sparse().sparse_dim() * y.sum(),
}


@pytest.mark.filterwarnings("ignore")  # sparse products loop over the examples
@pytest.mark.parametrize("name", PROGRAMS)
def test_constants(name):
    f = PROGRAMS[name]
    x = torch.tensor([1.0, 2.0, 3.0])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(grad(f)(x), gradient)
    torch.testing.assert_close(jvp(f, (x,), (x,))[1], gradient @ x)
    torch.testing.assert_close(vmap(f)(torch.stack([x, 2 * x])), torch.stack([f(x), f(2 * x)]))
    torch.testing.assert_close(vmap(grad(f))(torch.stack([x, x])), torch.stack([gradient] * 2))


def test_the_gradient_of_a_dense_tensor_is_dense():
    x = torch.tensor([1.0, 0.0, 3.0])
    found = grad(lambda y: (y.to_sparse().to_dense() ** 2).sum())(x)
    assert found.layout is torch.strided
    torch.testing.assert_close(found, 2 * x)
