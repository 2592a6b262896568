"""The user's own autograd through our derivatives, where PyTorch has no formula of a fused op."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lamina import grad, hvp, jacfwd, jacrev, jvp, linear_transpose, linearize, vhp, vjp, vmap

DOUBLE = torch.float64
X = torch.linspace(-4.1, 4.2, 24, dtype=DOUBLE).reshape(2, 4, 3).sin() * 2.3
TANGENT = X.cos()
WEIGHT = torch.linspace(0.5, 2, 4, dtype=DOUBLE)
FUNCTIONS = {
    "group_norm": lambda x: F.group_norm(x, 2, WEIGHT, WEIGHT.cos()),
    "group_norm, plain": lambda x: F.group_norm(x, 2),
    "hardsigmoid": lambda x: F.hardsigmoid(x) * x,
    "mish": F.mish,
    "pad, circular": lambda x: F.pad(x, (1, 2), mode="circular").sin(),
    "silu": F.silu,
}
TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).sin().sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (TANGENT,))[1],
    "vjp": lambda f, x: vjp(lambda x: f(x)[..., :3].sin(), x)[1](TANGENT)[0],
    "vmap(grad)": lambda f, x: vmap(grad(lambda x: f(x).sin().sum()))(torch.stack([x, x * 2])),
    "grad(vmap)": lambda f, x: grad(lambda xs: vmap(f)(xs).sin().sum())(torch.stack([x, x * 2])),
    "grad(grad)": lambda f, x: grad(lambda x: grad(lambda x: f(x).sin().sum())(x).exp().sum())(x),
    "jvp(grad)": lambda f, x: jvp(grad(lambda x: f(x).sin().sum()), (x,), (TANGENT,))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_backward_through_a_derivative(name, transform):
    run, f = TRANSFORMS[transform], FUNCTIONS[name]
    weights = torch.linspace(1, 2, 24, dtype=DOUBLE).reshape(X.shape)

    def value(x):
        out = run(f, x)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=DOUBLE).reshape(out.shape)).sum()

    leaf = X.clone().requires_grad_()
    loss = value(leaf)
    torch.testing.assert_close(loss.detach(), value(X))
    (found,) = torch.autograd.grad(loss, leaf)
    slopes = [(value(X + h * weights) - value(X - h * weights)) / (2 * h) for h in (1e-3, 5e-4)]
    expected = (4 * slopes[1] - slopes[0]) / 3
    torch.testing.assert_close((found * weights).sum(), expected, rtol=1e-6, atol=1e-6)


def test_the_affine_parameters_of_a_group_norm():
    x = torch.linspace(-1, 1, 24, dtype=DOUBLE).reshape(2, 4, 3).exp()

    def value(weight, bias):
        first, second = grad(lambda w, b: F.group_norm(x, 2, w, b).sin().sum(), argnums=(0, 1))(
            weight, bias
        )
        return (first * second).sum()

    leaves = [WEIGHT.clone().requires_grad_(), WEIGHT.cos().requires_grad_()]
    found = torch.autograd.grad(value(*leaves), leaves)
    expected = grad(value, argnums=(0, 1))(WEIGHT, WEIGHT.cos())
    torch.testing.assert_close(found, expected)


def test_under_no_grad_the_fused_ops_are_used():
    x = torch.linspace(-1, 1, 5, dtype=DOUBLE, requires_grad=True)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        grad(lambda x: F.silu(x).sum())(x)
    assert torch.ops.aten.silu_backward.default in seen


DIRECTIONS = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "jvp(jvp)": lambda f, x, v: jvp(lambda x: jvp(f, (x,), (v,))[1], (x,), (v.sin(),))[1],
    "jvp(grad)": lambda f, x, v: jvp(grad(lambda x: f(x).sin().sum()), (x,), (v,))[1],
    "jvp(vmap)": lambda f, x, v: jvp(vmap(f), (x,), (v,))[1],
    "vmap(jvp)": lambda f, x, v: vmap(lambda v: jvp(f, (x[0],), (v,))[1])(v),
    "vjp": lambda f, x, v: vjp(f, x)[1](v)[0],
    "vmap(vjp)": lambda f, x, v: vmap(lambda v: vjp(f, x[0])[1](v)[0])(v),
    "vjp(vmap)": lambda f, x, v: vjp(vmap(f), x)[1](v)[0],
    "jvp(vjp)": lambda f, x, v: jvp(lambda x: vjp(f, x)[1](v)[0], (x,), (x,))[1],
    "linearize": lambda f, x, v: linearize(f, x)[1](v),
    "linearize(vmap)": lambda f, x, v: linearize(vmap(f), x)[1](v),
    "vmap(linearize)": lambda f, x, v: vmap(lambda v: linearize(f, x[0])[1](v))(v),
    "hvp": lambda f, x, v: hvp(lambda x: f(x).sin().sum(), (x,), (v,))[1][0],
    "vhp": lambda f, x, v: vhp(lambda x: f(x).sin().sum(), (x,), (v,))[1][0],
    "linear_transpose": lambda f, x, v: linear_transpose(lambda x: x * 2, x)(v)[0],
}


@pytest.mark.parametrize("transform", DIRECTIONS)
def test_backward_to_a_direction_at_a_point_that_needs_none(transform):
    def f(x):
        return x.sin() * x.exp().cumsum(-1)

    def value(v):
        out = DIRECTIONS[transform](f, X[0], v)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=DOUBLE).reshape(out.shape)).sum()

    leaf = TANGENT[0].clone().requires_grad_()
    (found,) = torch.autograd.grad(value(leaf), leaf)
    weights = torch.linspace(1, 2, leaf.numel(), dtype=DOUBLE).reshape(leaf.shape)
    step = 1e-4
    slope = (value(TANGENT[0] + step * weights) - value(TANGENT[0] - step * weights)) / (2 * step)
    torch.testing.assert_close((found * weights).sum(), slope, rtol=1e-6, atol=1e-6)


def test_a_parameter_that_an_outer_tape_has_stamped_is_lifted_without_a_false_alarm():
    p = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.3, 0.4], dtype=torch.float64)

    def f(y):
        return torch.tanh(p * y).sum()

    third = jacfwd(jacrev(grad(f)))(x)
    t = torch.tanh(p * x)
    expected = p**3 * (1 - t * t) * (6 * t * t - 2)
    torch.testing.assert_close(torch.stack([third[i, i, i] for i in range(2)]), expected)
    (found,) = torch.autograd.grad(third.sum(), p)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), p)[0])


def test_a_trained_parameter_is_not_taken_for_one_that_was_written_to_since():
    """Its version is not 0, and at a level that maps it is lifted."""
    w = torch.nn.Parameter(torch.ones(2, 3))
    with torch.no_grad():
        w.mul_(2)
    xs = torch.randn(4, 3)
    found = vmap(grad(lambda x: F.linear(x, w).square().sum()))(xs)
    assert torch.allclose(found, 2 * xs @ w.T @ w)
