"""What a transform hands out as a view of its argument is a view to PyTorch too."""

from __future__ import annotations

import itertools

import pytest
import torch

from lamina import grad, jvp, vjp, vmap

VIEWS = {
    "select": lambda x: x[0],
    "slice": lambda x: x[:, 1:],
    "t": lambda x: x.t(),
    "reshape": lambda x: x.reshape(-1),
    "unbind": lambda x: x.unbind()[1],
    "of a view": lambda x: x[1].unsqueeze(0).expand(2, 2),
    "diagonal": lambda x: x.diagonal(),
    "of complex numbers": lambda x: torch.view_as_real(torch.view_as_complex(x)),
}
UNDER = {
    "vmap": lambda f, x: vmap(f)(x),
    "vmap last": lambda f, x: vmap(f, 2, -1)(x),
    "vmap(vmap)": lambda f, x: vmap(vmap(f))(x[None]),
    "vjp": lambda f, x: vjp(f, x[0])[0],
    "jvp": lambda f, x: jvp(f, (x[0],), (x[0],))[0],
    "aux of grad": lambda f, x: grad(lambda x: (x.sum(), f(x)), has_aux=True)(x[0])[1],
    "aux of vmap(grad)": lambda f, x: vmap(grad(lambda x: (x.sum(), f(x)), has_aux=True))(x)[1],
}


# A copy, for the batch dim lies between those that are merged; refused, for the last dim of an
# example is not dense.
NO_VIEWS = {("vmap last", "reshape"), ("vmap last", "of complex numbers")}


@pytest.mark.parametrize(
    ("transform", "name"),
    [pair for pair in itertools.product(UNDER, VIEWS) if pair not in NO_VIEWS],
)
def test_a_view(transform, name):
    x, w = torch.ones(2, 2, 2), torch.tensor(3.0, requires_grad=True)
    out = UNDER[transform](VIEWS[name], x)
    assert out._is_view()
    assert out._base is x
    if name != "of a view":  # which shows each element twice
        out.mul_(w)
        assert x.requires_grad
        assert torch.autograd.grad(x.sum(), w)[0] == out.numel()


@pytest.mark.parametrize("transform", UNDER)
def test_no_view(transform):
    for f in (lambda x: x * 1, lambda x: x.detach()[0], lambda x: torch.zeros(3)[0]):
        x = torch.ones(2, 2, 2)
        out = UNDER[transform](f, x)
        assert out._base is not x


def test_a_view_of_what_is_differentiated_outside():
    x = torch.ones(2, 2, requires_grad=True)
    base = x * 1
    out = vmap(lambda row: row[0])(base)
    assert out._base is base
    out.mul_(3)
    assert torch.autograd.grad(base.sum(), x)[0].tolist() == [[3.0, 1.0], [3.0, 1.0]]
