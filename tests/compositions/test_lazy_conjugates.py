"""Values that are lazily conjugated or negated below what a tensor of a transform shows.

Where PyTorch asks for `resolve_conj()`, the function that has asked gets the same under every
transform; where a rule of ours brings a lazy value about, nobody has to ask.
"""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jvp, linearize, vmap

X = torch.arange(12.0).reshape(3, 4) / 4 + 1
TURN = torch.tensor([1j, 2.0])


def _made():
    return (torch.ones(2) + 1j).conj()


def _of(x):
    return torch.complex(x, x * x).conj()


def _rope(x):
    return (torch.view_as_complex(x.reshape(2, 2)) * (TURN + 0)).real


def _zeroed(x):
    z = torch.complex(x, x)
    torch.view_as_real(z)[..., 0].zero_()
    return z.abs().pow(2)


FUNCTIONS = {
    "made, as real": lambda x: torch.view_as_real(_made().resolve_conj()) * x[0],
    "made, its bits": lambda x: _made().resolve_conj().view(torch.float32) * x[0],
    "made, as numpy": lambda x: torch.from_numpy(_made().resolve_conj().numpy()).imag * x[0],
    "made, negated": lambda x: _made().imag.resolve_neg().view(torch.int32) * x[0],
    "made, negated numpy": lambda x: torch.from_numpy(_made().imag.resolve_neg().numpy()) * x[0],
    "captured": lambda x: torch.view_as_real(TURN.conj().resolve_conj()) * x[0],
    "of x, as real": lambda x: torch.view_as_real(_of(x).resolve_conj()),
    "of x, resolved by a clone": lambda x: torch.view_as_real(_of(x).clone()),
    "of x, negated": lambda x: _of(x).imag.resolve_neg(),
    "rotated": _rope,
    "written through": _zeroed,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_transform(name):
    f = FUNCTIONS[name]

    def loss(x):
        return f(x).sin().sum()

    torch.testing.assert_close(vmap(f)(X), torch.stack([f(x) for x in X]))
    first, second = [], []
    for x in X:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        first.append(g.detach())
        second.append(torch.autograd.grad(g.sum(), leaf)[0])
    torch.testing.assert_close(vmap(grad(loss))(X), torch.stack(first))
    torch.testing.assert_close(vmap(grad(lambda x: grad(loss)(x).sum()))(X), torch.stack(second))
    for x, g, h in zip(X, first, second, strict=True):
        ones = torch.ones_like(x)
        torch.testing.assert_close(grad(loss)(x), g)
        torch.testing.assert_close(jvp(loss, (x,), (ones,))[1], g.sum())
        torch.testing.assert_close(grad(lambda x: grad(loss)(x).sum())(x), h)
        torch.testing.assert_close(jvp(grad(loss), (x,), (ones,))[1], h)
        torch.testing.assert_close(linearize(grad(loss), x)[1](ones), h)


def test_what_is_not_lazy_is_itself():
    def f(x):
        assert x.resolve_conj() is x
        assert x.resolve_neg() is x
        z = torch.complex(x, x)
        assert z.resolve_conj() is z
        return x

    assert torch.equal(vmap(f)(X), X)
    assert torch.equal(grad(lambda x: f(x).sum())(X[0]), torch.ones(4))
