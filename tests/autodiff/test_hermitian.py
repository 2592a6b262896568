"""Derivatives of the eigenvalues and eigenvectors of Hermitian matrices, in every order."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jvp, vjp
from tests.autodiff.slopes import double, draw, near


def _of_values(x):
    return (torch.linalg.eigvalsh(x) * torch.tensor([1.0, 2.0, 4.0], dtype=double)).sum()


def _of_vectors(x):
    return (torch.linalg.eigh(x)[1].abs().square() * draw(3, 3, seed=5)).sum()


@pytest.mark.parametrize("f", [_of_values, _of_vectors])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_cotangents_of_hermitian_matrices_are_hermitian(f, kind):
    x, v = draw(3, 3), draw(3, 3, seed=1)
    if kind == "complex":
        x, v = torch.complex(x, draw(3, 3, seed=2)), torch.complex(v, draw(3, 3, seed=3))
    x = x @ x.mH + 3 * torch.eye(3)

    def first(x):
        return (grad(f)(x) * v.conj()).real.sum()

    leaf = x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((pulled * v.conj()).real.sum(), leaf)
    near(grad(f)(x), pulled.detach())
    near(grad(first)(x), expected)
    near(grad(first)(x), expected.mH)
    # The two modes are dual at any direction, be it Hermitian or not.
    tangent, u = v, draw(3, 3, seed=4)
    eigh = lambda x: tuple(torch.linalg.eigh(x))
    values_t, vectors_t = jvp(eigh, (x,), (tangent,))[1]
    (ct,) = vjp(eigh, x)[1]((u[0], u.to(x.dtype)))
    near((ct.conj() * tangent).real.sum(), (values_t * u[0]).sum() + (vectors_t * u).real.sum())
