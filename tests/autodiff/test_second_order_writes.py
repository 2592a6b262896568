"""Second derivatives where values were written behind the back of the derivative."""

from __future__ import annotations

import pytest
import torch

import lamina
from lamina import grad, jvp, vjp, vmap
from tests.autodiff.slopes import double, draw, near


def clamped(x):
    y = x.clone()
    with torch.no_grad():
        y.clamp_(min=0.1)
        y[1:] *= 2
    return (x * y**3).sum()


def test_a_value_written_under_no_grad_keeps_its_derivative_at_every_level():
    x, batch = draw(4), draw(3, 4)
    second = torch.autograd.functional.hessian(clamped, x)
    near(lamina.jacrev(lamina.jacrev(clamped))(x), second)
    # Forward mode does not ask whether gradients are enabled, and follows the write.
    for outer in ("jacrev", "jacfwd"):
        for inner in ("jacrev", "jacfwd"):
            found, expected = (
                getattr(lib, outer)(getattr(lib, inner)(clamped))(x) for lib in (lamina, torch.func)
            )
            near(found, expected)
    each = torch.stack([torch.autograd.functional.jacobian(clamped, x) for x in batch])
    near(vjp(vmap(clamped), batch)[1](torch.ones(3, dtype=double))[0], each)
    near(vmap(grad(clamped))(batch), each)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(grad(clamped)(leaf).sum(), leaf)
    near(found, second.sum(0))


def test_an_infinity_written_over_under_no_grad():
    def f(x):
        y = x.log()
        with torch.no_grad():
            y.clamp_(min=-1.0)
        return (y * x).sum()

    x = torch.tensor([0.0, 2.0], dtype=double)
    found = vmap(lambda x: grad(grad(lambda x: f(x)))(x))(x)
    expected = torch.stack([torch.autograd.functional.hessian(f, v) for v in x])
    near(found[1], expected[1])


def written_behind(x):
    y = x.sin()
    y.detach()[1:].mul_(2)
    return (y * y * x).sum()


def test_a_write_through_detach_changes_the_value_alone():
    batch = draw(2, 4)
    leaves = [x.clone().requires_grad_() for x in batch]
    expected = torch.stack([torch.autograd.grad(written_behind(x), x)[0] for x in leaves])
    near(torch.stack([grad(written_behind)(x) for x in batch]), expected)
    near(vmap(grad(written_behind))(batch), expected)
    near(vjp(vmap(written_behind), batch)[1](torch.ones(2, dtype=double))[0], expected)
    for x, slopes in zip(batch, expected, strict=True):
        near(jvp(written_behind, (x,), (x,))[1], slopes @ x)


@pytest.mark.parametrize("sample", ["Gamma", "Chi2", "StudentT"])
def test_samples_that_are_clamped_behind_their_derivative(sample):
    def draw_with(a):
        torch.manual_seed(0)
        rest = (torch.ones_like(a),) if sample == "Gamma" else ()
        return getattr(torch.distributions, sample)(a, *rest).rsample()

    a, u = draw(5).abs() + 1, draw(5, seed=1)
    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(draw_with(leaf), leaf, u)
    near(vjp(draw_with, a)[1](u)[0], expected)
    near((jvp(draw_with, (a,), (a,))[1] * u).sum(), (expected * a).sum())
